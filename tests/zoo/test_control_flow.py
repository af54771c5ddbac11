"""Shared, repeated, skipped and frozen modules; outputs of odd layout: handled, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.ownership import owners
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import svdalign as sva

B, D, C = 8, 6, 3


def linear_relu() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, D), nn.ReLU())


def learner(model: nn.Module, x: Any, rule: Any = "ssa", **options: Any) -> sva.Learner:
    return sva.Learner(
        model, rule, optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x, **options
    )


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(B, D), torch.randint(0, C, (B,))


class Net(nn.Module):
    """A network whose forward is a function of its parts."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


# --- shared and repeated --------------------------------------------------------------------------


def test_tied_weights_learn_from_each_unit_they_serve() -> None:
    a, b = nn.Linear(D, D), nn.Linear(D, D)
    b.weight = a.weight
    model = nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Linear(D, C))
    x, y = batch()
    tied = learner(model, x)
    untied_model = nn.Sequential(
        nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, C)
    )
    untied_model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    untied = learner(untied_model, x)
    g, h = tied.gradients(x, y), untied.gradients(x, y)
    torch.testing.assert_close(g["0.weight"], h["0.weight"] + h["2.weight"])


def test_a_module_called_again_ends_a_unit_each_time() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        for _ in range(3):
            x = net.body(x)
        return net.head(x)

    model = Net(run, body=linear_relu(), head=nn.Linear(D, C))
    x, y = batch()
    local = learner(model, x)
    assert [u.name for u in local.units[:-1]] == ["body.0", "body.0#1", "body.0#2"]
    for unit in local.units[:-1]:
        assert set(unit.parameters) == {"body.0.weight", "body.0.bias"}
    assert local.step(x, y).unit_losses.keys() == {u.name for u in local.units}


def test_one_module_under_two_names_stays_one() -> None:
    shared = nn.Linear(D, D)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(D, C))
    x, y = batch()
    report = learner(sva.factorize(model, {"0": 2}), x).step(x, y)
    assert report.unit_losses.keys() == {"0", "0#1", "output"}


def test_more_calls_than_on_the_example_are_refused() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        for _ in range(int(x[0, 0])):
            x = net.body(x)
        return net.head(x)

    model = Net(run, body=linear_relu(), head=nn.Linear(D, C))
    x, y = batch()
    x[0, 0] = 2.0
    local = learner(model, x)
    local.step(x, y)
    x[0, 0] = 1.0
    local.step(x, y)  # fewer are fine
    x[0, 0] = 3.0
    with pytest.raises(RuntimeError, match=r"'body.0' was called 3 times .* 2 times"):
        local.step(x, y)


# --- other ways through the network ---------------------------------------------------------------


def test_a_block_that_is_dropped_now_and_then_learns_when_it_runs() -> None:
    """Layer drop in plain Python, on and off between example and batch."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = net.first(x)
        if net.run_it:  # type: ignore[attr-defined]
            x = x + net.second(x)
        return net.head(x)

    for on_example in (True, False):
        model = Net(run, first=linear_relu(), second=linear_relu(), head=nn.Linear(D, C))
        x, y = batch()
        model.run_it = on_example
        if on_example:
            local = learner(model, x, horizon=0)
        else:
            with pytest.warns(UserWarning, match=r"do not reach .*second.0.weight"):
                local = learner(model, x, horizon=0)
        everything = {name for name, _ in model.named_parameters()}
        dropped = {"second.0.weight", "second.0.bias"}
        model.run_it = True
        assert local.gradients(x, y).keys() == everything
        model.run_it = False
        assert local.gradients(x, y).keys() == everything - dropped


def test_an_early_exit_teaches_the_head_it_takes() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        x = net.first(x)
        if net.early:  # type: ignore[attr-defined]
            return net.side(x)
        return net.head(net.second(x))

    model = Net(
        run, first=linear_relu(), second=linear_relu(), side=nn.Linear(D, C), head=nn.Linear(D, C)
    )
    x, y = batch()
    model.early = False
    with pytest.warns(UserWarning, match=r"do not reach .*side.weight"):
        local = learner(model, x, horizon=1)
    late = local.gradients(x, y)
    model.early = True
    early = local.gradients(x, y)
    assert {n.split(".")[0] for n in late} == {"first", "second", "head"}
    assert {n.split(".")[0] for n in early} == {"first", "side"}
    z = model(x)
    (expected,) = torch.autograd.grad(F.cross_entropy(z, y), [model.side.weight])
    torch.testing.assert_close(early["side.weight"], expected)


# --- frozen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["ssa", sva.rules.SSA(horizon=2), "dfa", "bp"], ids=str)
@pytest.mark.parametrize("frozen", ["0", "2", "4"])
def test_frozen_units_stay_and_the_others_learn(rule: str | sva.rules.Rule, frozen: str) -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, C)
        )

    x, y = batch()
    for when in ("before", "after"):
        model = net()
        if when == "before":
            model.get_submodule(frozen).requires_grad_(False)
        local = learner(model, x, rule)
        model.get_submodule(frozen).requires_grad_(False)
        before = {n: p.clone() for n, p in model.named_parameters()}
        assert torch.isfinite(local.step(x, y).loss)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == name.startswith(f"{frozen}."), name


def test_what_was_frozen_at_first_can_be_thawed() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, C))
    model[0].requires_grad_(False)
    x, y = batch()
    local = learner(model, x)
    assert local.gradients(x, y).keys() == {"2.weight", "2.bias"}
    model[0].requires_grad_(True)
    local.optimizer.add_param_group({"params": list(model[0].parameters())})
    before = model[0].weight.clone()
    local.step(x, y)
    assert not torch.equal(model[0].weight, before)


# --- checkpointing --------------------------------------------------------------------------------


class Recomputed(nn.Module):
    """Two layers with dropout, optionally recomputed backwards."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(D, D), nn.Linear(D, D), nn.Dropout(0.5)
        self.reentrant = reentrant

    def body(self, x: Tensor) -> Tensor:
        return x + self.b(self.drop(torch.tanh(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("horizon", [0, 1, 2])
@pytest.mark.parametrize("units", ["block", "layer"])
def test_checkpointing_inside_a_unit_changes_nothing(horizon: int, units: str) -> None:
    x, y = batch()
    grads = []
    for reentrant in (None, False):
        torch.manual_seed(3)
        model = nn.Sequential(Recomputed(reentrant), Recomputed(reentrant), nn.Linear(D, C))
        local = learner(model, x, horizon=horizon, units=units)
        torch.manual_seed(4)
        grads.append(local.gradients(x, y))
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_that_hides_the_graph_is_refused() -> None:
    model = nn.Sequential(nn.Linear(D, D), Recomputed(True), Recomputed(True), nn.Linear(D, C))
    with pytest.raises(ValueError, match="use_reentrant=False"):
        learner(model, torch.randn(B, D))


# --- layouts --------------------------------------------------------------------------------------


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 5, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, C),
    )  # fmt: skip


def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 5, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(5, C),
    )  # fmt: skip


class ChannelsLast(nn.Module):
    """A linear layer on maps (B, h, w, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(2, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mix(x)).mean((1, 2)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x.transpose(0, 1))  # sequence first, and a tuple
        return self.head(states[-1])


@pytest.mark.parametrize(
    ("build", "shape", "features"),
    [
        (conv1d, (4, 2, 7), (2, 7, 4)),
        (conv3d, (4, 1, 4, 5, 6), (2, 4, 20, 6)),
        (ChannelsLast, (4, 6, 7, 2), (2, 5, 6, 7)),
        (Recurrent, (4, 9, 2), (2, 9, 5)),
    ],
)
def test_rules_see_one_layout(
    build: Callable[[], nn.Module], shape: tuple[int, ...], features: tuple[int, ...]
) -> None:
    model, x, y = build(), torch.randn(shape), torch.tensor([0, 1, 2, 0])
    local = learner(model, x, horizon=0)
    assert local.units[0].features[0].shape == features
    owned = owners(model, x, [(u.exit, u.call) for u in local.units[:-1]])
    assert {n for n, i in owned.items() if 0 in i} == set(local.units[0].parameters)
    grads = local.gradients(x, y)
    assert all(grads[n].abs().max() > 0 for n, _ in model.named_parameters())


def test_windows_are_no_place_to_end_a_unit() -> None:
    """Where samples have been taken apart, B is not an axis of the output."""

    def run(net: Net, x: Tensor) -> Tensor:
        windows = net.inside(x.reshape(-1, 4, D))  # (B * 3, 4, D)
        return net.head(net.outside(windows.reshape(len(x), 12, D)).mean(1))

    model = Net(run, inside=linear_relu(), outside=linear_relu(), head=nn.Linear(D, C))
    x, y = torch.randn(B, 12, D), torch.randint(0, C, (B,))
    local = learner(model, x)
    assert [u.name for u in local.units] == ["outside.1", "output"]
    assert local.gradients(x, y).keys() == {n for n, _ in model.named_parameters()}
    with pytest.raises(ValueError, match=r"'inside', .* does not keep the batch"):
        learner(model, x, units=lambda name, module: name == "inside")


def test_tokens_as_samples() -> None:
    """(B T, classes) at the output, (B, T, d) inside, as many language models have it."""

    def run(net: Net, x: Tensor) -> Tensor:
        return net.head(net.body(x).flatten(0, 1))

    model = Net(run, body=linear_relu(), head=nn.Linear(D, C))
    x, y = torch.randn(B, 5, D), torch.randint(0, C, (B * 5,))
    local = learner(model, x)
    assert local.units[0].features[0].shape == (10, D)
    assert torch.isfinite(local.step(x, y).loss)


@pytest.mark.parametrize("rule", ["ssa", "ssa-reconstruction", "dfa", "drtp"])
def test_lengths_may_differ_from_the_examples(rule: str) -> None:
    model = nn.Sequential(nn.Embedding(9, D), linear_relu(), nn.Linear(D, 9))
    local = learner(
        model, torch.randint(0, 9, (B, 7)), rule, loss=lambda z, y: F.cross_entropy(z.mT, y)
    )
    for length in (7, 4, 11):
        tokens = torch.randint(0, 9, (5, length))
        assert torch.isfinite(local.step(tokens, tokens.flip(1)).loss)
