"""What the stream computes, against a pass that keeps everything and against autograd."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tests.oracles import keep_everything as oracle
from tests.oracles.nets import TOYS, LongSkips, RunningMean, Toy
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import svdalign as sva
from svdalign import rules
from svdalign.feedback import GaussianFeedback
from svdalign.lab.costs import LiveTensors

EXACT = {"rtol": 1e-9, "atol": 1e-10}
SSA = replace(rules.get("ssa"), alpha=0.7)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, 0.1)


def learner_of(toy: Toy, model: nn.Module, rule, **options) -> sva.Learner:
    x, _ = toy.batch()
    return sva.Learner(model, rule, units=toy.units, optimizer=sgd, example=x, **options)


def matrices(learner: sva.Learner) -> list[Tensor]:
    """The feedback matrices, dense, in the order of the units."""
    dense = []
    for feedback in learner.feedback.values():
        if isinstance(feedback, GaussianFeedback):
            dense.append(feedback.B)
        else:
            dense.append(feedback.U @ torch.diag(feedback.s) @ feedback.V.T)
    return dense


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("rule", ["bp", "ssa"])
def test_no_horizon_gives_autograds_gradients(name: str, rule: str) -> None:
    toy = TOYS[name]
    model = toy.model()
    x, y = toy.batch()
    found = learner_of(toy, model, rule, horizon=None).gradients(x, y)
    F.cross_entropy(model(x), y).backward()
    assert_same(found, {n: p.grad for n, p in model.named_parameters()})


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("horizon", [0, 1, 2, 3, 99])
class TestAgainstKeepingEverything:
    def check(self, name: str, rule, loss_of, horizon: int) -> None:
        toy = TOYS[name]
        model = toy.model()
        x, y = toy.batch()
        learner = learner_of(toy, model, rule, horizon=horizon)
        found = learner.gradients(x, y)
        expected = oracle.gradients(
            model,
            x,
            y,
            exits=toy.exits,
            parameters=toy.parameters(model),
            loss=loss_of(matrices(learner)),
            horizon=horizon,
            every_output=name == "pairs",  # of which neither depends on all weights
        )
        assert_same(found, expected)

    def test_local_error(self, name: str, horizon: int) -> None:
        self.check(name, SSA, lambda B: oracle.local_loss(B, SSA.grid, SSA.alpha), horizon)

    def test_output_error(self, name: str, horizon: int) -> None:
        self.check(name, "dfa", lambda B: oracle.output_loss(B, None), horizon)

    def test_target_error(self, name: str, horizon: int) -> None:
        self.check(name, "drtp", lambda B: oracle.target_loss(B, None), horizon)


@pytest.mark.parametrize("name", TOYS)
def test_a_horizon_of_all_units_is_the_sum_of_all_losses(name: str) -> None:
    toy = TOYS[name]
    model = toy.model()
    x, y = toy.batch()
    learner = learner_of(toy, model, SSA, horizon=len(toy.exits))
    found = learner.gradients(x, y)
    outputs = []
    for path in toy.exits:
        model.get_submodule(path).register_forward_hook(
            lambda m, a, out: outputs.extend(tree_leaves(out))
        )
    z = model(x)
    loss_of = oracle.local_loss(matrices(learner), SSA.grid, SSA.alpha)
    total = F.cross_entropy(z, y) + sum(loss_of(i, h, z, y) for i, h in enumerate(outputs))
    total.backward()
    assert_same(found, {n: p.grad for n, p in model.named_parameters()})


@pytest.mark.parametrize("name", TOYS)
def test_learned_feedback_gets_the_gradient_of_its_own_units_loss(name: str) -> None:
    toy = TOYS[name]
    model = toy.model()
    x, y = toy.batch()
    learner = learner_of(toy, model, SSA, horizon=2)
    learner.backward(x, y)
    outputs = []
    for path in toy.exits:
        model.get_submodule(path).register_forward_hook(
            lambda m, a, out: outputs.extend(tree_leaves(out))
        )
    z = model(x).detach()
    B = matrices(learner)
    loss_of = oracle.local_loss(B, SSA.grid, SSA.alpha)
    for i, feedback in enumerate(learner.feedback.values()):
        values = [feedback.U, feedback.s, feedback.V]
        expected = torch.autograd.grad(loss_of(i, outputs[i].detach(), z, y), values)
        for value, grad in zip(values, expected, strict=True):
            torch.testing.assert_close(value.grad, grad, **EXACT)


@pytest.mark.parametrize("name", TOYS)
def test_reported_losses_are_the_networks_and_the_units(name: str) -> None:
    toy = TOYS[name]
    model = toy.model()
    x, y = toy.batch()
    learner = learner_of(toy, model, SSA)
    outputs = []
    for path in toy.exits:
        model.get_submodule(path).register_forward_hook(
            lambda m, a, out: outputs.extend(tree_leaves(out))
        )
    z = model(x)
    kept = list(outputs)
    loss_of = oracle.local_loss(matrices(learner), SSA.grid, SSA.alpha)
    report = learner.backward(x, y)
    torch.testing.assert_close(report.loss, F.cross_entropy(z, y), **EXACT)
    torch.testing.assert_close(report.accuracy, (z.argmax(1) == y).float().mean())
    assert list(report.unit_losses) == [*toy.exits, "output"]
    each = len(kept) // len(toy.exits)  # outputs of a unit
    for i, path in enumerate(toy.exits):
        loss = sum(loss_of(k, kept[k], z, y) for k in range(each * i, each * (i + 1)))
        torch.testing.assert_close(report.unit_losses[path], loss, **EXACT)
    for value in (report.loss, report.accuracy, *report.unit_losses.values()):
        assert value.ndim == 0
        assert not value.requires_grad


# --- nothing crosses a boundary beyond the horizon ----------------------------------------------


@dataclass(frozen=True)
class Louder(rules.SSA):
    """SSA whose losses from unit ``since`` on are a thousand times as large."""

    since: tuple[str, ...] = ()

    def loss(self, unit, feedback, h, supervision):
        factor = 1000.0 if unit.name in self.since else 1.0
        return factor * super().loss(unit, feedback, h, supervision)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("horizon", [0, 1, 2])
def test_no_teaching_crosses_beyond_the_horizon(name: str, horizon: int) -> None:
    """Units further downstream than the horizon may say what they like, skips or no skips."""
    toy = TOYS[name]
    model = toy.model()
    x, y = toy.batch()
    quiet = learner_of(toy, model, Louder(name="louder"), horizon=horizon).gradients(x, y)
    owned = toy.parameters(model)
    for first in range(1, len(toy.exits)):
        rule = Louder(name="louder", since=toy.exits[first:])
        loud = learner_of(toy, model, rule, horizon=horizon).gradients(x, y)
        assert set(loud) == set(quiet)
        for i, names in enumerate(owned[:-1]):
            for n in names:
                if n in quiet and i + horizon < first:
                    assert torch.equal(loud[n], quiet[n]), n
        # It is heard within: the test can tell.
        heard = [n for n in owned[max(0, first - horizon)] if n in quiet]
        assert any(not torch.allclose(loud[n], quiet[n]) for n in heard)


@pytest.mark.parametrize("horizon", [0, 1, 2])
def test_the_task_teaches_only_the_last_units(horizon: int) -> None:
    toy = TOYS["long skips"]
    model = toy.model()
    x, y = toy.batch()

    def gradients(factor: float) -> dict[str, Tensor]:
        learner = learner_of(
            toy,
            model,
            "drtp",  # whose other units do not ask for the task's loss
            horizon=horizon,
            loss=lambda z, y: factor * F.cross_entropy(z, y),
        )
        return learner.gradients(x, y)

    one, thousand = gradients(1.0), gradients(1000.0)
    owned = toy.parameters(model)
    for i, names in enumerate(owned):
        reached = i + horizon >= len(owned) - 1
        for n in names:
            assert torch.equal(one[n], thousand[n]) is not reached


# --- state: batch norm, dropout, random numbers -------------------------------------------------


def dropout_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4),
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4),
        nn.Linear(8, 3),
    )  # fmt: skip


DROPOUT = Toy(dropout_net, ("3", "7"), (("0", "1"), ("4", "5"), ("8",)), (6,))


@pytest.mark.parametrize("rule", ["dfa", "drtp", "ssa", "ssa-reconstruction", "bp", "fa"])
def test_statistics_and_random_numbers_count_once(rule: str) -> None:
    """After a step, buffers and generator stand where a single forward pass leaves them."""
    x, y = DROPOUT.batch()
    single, model = DROPOUT.model(), DROPOUT.model()
    learner = learner_of(DROPOUT, model, rule)
    torch.manual_seed(3)
    single(x)
    after_one_pass = torch.rand(3)
    torch.manual_seed(3)
    learner.backward(x, y)
    assert torch.equal(torch.rand(3), after_one_pass)
    for (name, expected), found in zip(single.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(found, expected, **EXACT, msg=name)


def test_both_passes_drop_the_same_activations() -> None:
    """The output error belongs to the masks that the stream sees."""
    x, y = DROPOUT.batch()
    model = DROPOUT.model()
    learner = learner_of(DROPOUT, model, "dfa")
    torch.manual_seed(3)
    found = learner.gradients(x, y)
    torch.manual_seed(3)
    expected = oracle.gradients(
        model,
        x,
        y,
        exits=DROPOUT.exits,
        parameters=DROPOUT.parameters(model),
        loss=oracle.output_loss(matrices(learner), None),
        horizon=0,
    )
    assert_same(found, expected)


def test_a_buffer_that_is_reassigned_counts_once_too() -> None:
    toy = Toy(
        lambda: nn.Sequential(nn.Linear(6, 8), RunningMean(8), nn.Tanh(), nn.Linear(8, 3)),
        ("2",),
        (("0", "1"), ("3",)),
        (6,),
    )
    x, y = toy.batch()
    single, model = toy.model(), toy.model()
    learner = learner_of(toy, model, "dfa")
    assert torch.equal(model[1].mean, torch.zeros(8))
    single(x)
    learner.backward(x, y)
    torch.testing.assert_close(model[1].mean, single[1].mean)


# --- awkward models -----------------------------------------------------------------------------


class CalledTwice(nn.Module):
    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        self.into = nn.Linear(6, 8)
        self.body = nn.Linear(8, 8)
        self.again = self.body if shared else nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x))
        h = torch.tanh(self.body(h))
        return self.head(torch.tanh(self.again(h)))


@pytest.mark.parametrize("horizon", [0, 1, 2, 3])
def test_a_module_called_twice_is_two_units_whose_gradients_add(horizon: int) -> None:
    torch.manual_seed(0)
    model = CalledTwice().double()
    twin = CalledTwice(shared=False).double()
    twin.load_state_dict(model.state_dict())
    toy = Toy(lambda: model, ("into", "body"), (), (6,))
    x, y = toy.batch()
    learner = learner_of(toy, model, SSA, horizon=horizon)
    assert [unit.name for unit in learner.units] == ["into", "body", "body#1", "output"]
    found = learner.gradients(x, y)
    expected = oracle.gradients(
        twin,
        x,
        y,
        exits=["into", "body", "again"],
        parameters=[
            [f"{layer}.weight", f"{layer}.bias"] for layer in ("into", "body", "again", "head")
        ],
        loss=oracle.local_loss(matrices(learner), SSA.grid, SSA.alpha),
        horizon=horizon,
    )
    for kind in ("weight", "bias"):
        expected[f"body.{kind}"] = expected[f"body.{kind}"] + expected.pop(f"again.{kind}")
    assert_same(found, expected)


class Tied(nn.Module):
    """An embedding whose weight is also the classifier's."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.fc1 = nn.Linear(5, 6)
        self.fc2 = nn.Linear(6, 5)
        self.head = nn.Linear(5, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc1(self.embed(x).mean(1)))
        return self.head(torch.tanh(self.fc2(h)))


@pytest.mark.parametrize("horizon", [0, 1, 2])
def test_a_tied_weight_learns_in_both_of_its_units(horizon: int) -> None:
    torch.manual_seed(0)
    model, twin = Tied().double(), Tied(tied=False).double()
    twin.load_state_dict(model.state_dict())
    x, y = torch.randint(0, 7, (4, 3)), torch.arange(4)
    toy = Toy(lambda: model, ("fc1", "fc2"), (), (3,))
    learner = sva.Learner(
        model, SSA, units=toy.units, horizon=horizon, optimizer=sgd, example=x
    )  # fmt: skip
    found = learner.gradients(x, y)
    expected = oracle.gradients(
        twin,
        x,
        y,
        exits=toy.exits,
        parameters=[
            ["embed.weight", "fc1.weight", "fc1.bias"],
            ["fc2.weight", "fc2.bias"],
            ["head.weight"],
        ],
        loss=oracle.local_loss(matrices(learner), SSA.grid, SSA.alpha),
        horizon=horizon,
    )
    expected["embed.weight"] = expected["embed.weight"] + expected.pop("head.weight")
    assert_same(found, expected)


@pytest.mark.parametrize("horizon", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("frozen", range(4))
def test_frozen_units_stay_as_they_are_and_the_others_learn_the_same(
    horizon: int, when: str, frozen: int
) -> None:
    """Freezing ``frozen`` after the units are known changes no other unit's gradient."""
    toy = TOYS["long skips"]
    model = toy.model()
    x, y = toy.batch()
    free = learner_of(toy, model, SSA, horizon=horizon).gradients(x, y)
    if when == "before":
        model.stages[frozen].requires_grad_(False)
        learner = learner_of(toy, model, SSA, horizon=horizon)
        found = learner.gradients(x, y)
        assert {n for n in free if not n.startswith(f"stages.{frozen}.")} == set(found)
        return
    learner = learner_of(toy, model, SSA, horizon=horizon)
    model.stages[frozen].requires_grad_(False)
    found = learner.gradients(x, y)
    assert_same(found, {n: g for n, g in free.items() if not n.startswith(f"stages.{frozen}.")})


def test_a_frozen_classifier_still_reports_the_loss() -> None:
    toy = TOYS["mlp"]
    model = toy.model()
    x, y = toy.batch()
    learner = learner_of(toy, model, SSA, horizon=0)
    model[8].requires_grad_(False)
    report = learner.backward(x, y)
    torch.testing.assert_close(report.loss, F.cross_entropy(model(x), y), **EXACT)
    assert model[8].weight.grad is None
    assert model[6].weight.grad is not None


class InPlace(nn.Module):
    """Changes what its units hand on, in place."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.one(x), inplace=self.inplace)
        h = self.two(h)
        h = h.mul_(0.5).add_(1.0) if self.inplace else h * 0.5 + 1.0
        h = F.relu(self.three(h), inplace=self.inplace)
        return self.head(h)


@pytest.mark.parametrize("horizon", [0, 1, 2, 3])
def test_changes_in_place_after_an_exit_do_no_harm(horizon: int) -> None:
    toy = Toy(
        lambda: InPlace(inplace=True),
        ("one", "two", "three"),
        (("one",), ("two",), ("three",), ("head",)),
        (6,),
    )
    model, twin = toy.model(), InPlace(inplace=False).double()
    twin.load_state_dict(model.state_dict())
    x, y = toy.batch()
    learner = learner_of(toy, model, SSA, horizon=horizon)
    expected = oracle.gradients(
        twin,
        x,
        y,
        exits=toy.exits,
        parameters=toy.parameters(twin),
        loss=oracle.local_loss(matrices(learner), SSA.grid, SSA.alpha),
        horizon=horizon,
    )
    assert_same(learner.gradients(x, y), expected)


class InPlaceSide(nn.Module):
    """The second output of a unit is changed in place."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.fc(x))
            return h, 2.0 * h

    def __init__(self) -> None:
        super().__init__()
        self.fork = self.Fork()
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fork(x)
        b += a
        return self.head(torch.tanh(self.fc(b)))


@pytest.mark.parametrize("horizon", [0, 1])
def test_a_second_output_may_be_changed_in_place(horizon: int) -> None:
    toy = Toy(InPlaceSide, ("fork",), (("fork",), ("fc", "head")), (6,))
    model = toy.model()
    x, y = toy.batch()
    learner = learner_of(toy, model, SSA, horizon=horizon)
    expected = oracle.gradients(
        model,
        x,
        y,
        exits=toy.exits,
        parameters=toy.parameters(model),
        loss=oracle.local_loss(matrices(learner), SSA.grid, SSA.alpha),
        horizon=horizon,
    )
    assert_same(learner.gradients(x, y), expected)


class Summed(nn.Module):
    """Two parameters with one and the same gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.a, self.b = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
        self.act, self.head = nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.fc(x) + (self.a + self.b)))


def test_equal_gradients_are_not_the_same_tensor() -> None:
    """Else clipping in place would scale it twice."""
    toy = Toy(Summed, ("act",), (), (6,))
    model = toy.model()
    x, y = toy.batch()
    learner_of(toy, model, SSA, horizon=0).backward(x, y)
    torch.testing.assert_close(model.a.grad, model.b.grad)
    assert model.a.grad.data_ptr() != model.b.grad.data_ptr()


class Depth(nn.Module):
    """A body that runs as often as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x[0, 0])):
            x = torch.tanh(self.body(x))
        return self.head(x)


def test_a_model_that_runs_otherwise_than_on_the_example_is_refused() -> None:
    model = Depth()
    x, y = torch.ones(4, 6), torch.arange(4) % 3
    learner = sva.Learner(
        model, "drtp", units=lambda n, m: n == "body", optimizer=sgd, example=2 * x
    )  # fmt: skip
    learner.backward(2 * x, y)
    with pytest.raises(RuntimeError, match="'body' was called 3 times"):
        learner.backward(3 * x, y)


def test_long_skips_reach_over_many_units() -> None:
    """The oracle itself: with a horizon, a skip carries what the chain does not."""
    toy = Toy(LongSkips, tuple(f"stages.{i}" for i in range(5)), (), (6,))
    model = toy.model()
    x, y = toy.batch()
    zero = learner_of(toy, model, SSA, horizon=0).gradients(x, y)
    four = learner_of(toy, model, SSA, horizon=4).gradients(x, y)
    assert not torch.allclose(zero["stages.0.weight"], four["stages.0.weight"])


@pytest.mark.parametrize("horizon", [0, 1, 2, 3])
def test_between_units_nothing_waits_but_what_they_put_out(horizon: int) -> None:
    B, d = 4096, 64
    sizes = [*[d] * 7, 2]
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))).double()
    x, y = torch.randn(B, d, dtype=torch.float64), torch.randint(2, (B,))
    learner = sva.Learner(model, replace(SSA, alpha=0.0), horizon=horizon, optimizer=sgd, example=x)
    learner.step(x, y)
    counts: list[float] = []
    with LiveTensors([x, y, *model.parameters()]) as live:
        start = live.live
        for layer in model:
            layer.register_forward_pre_hook(
                lambda *_: counts.append((live.live - start) / (B * d * 8))  # type: ignore[func-returns-value]
            )
        learner.step(x, y)
    # The outputs of the units in the window, and that of the one before, which the oldest reads.
    # Gradients and readouts' scores are little beside them.
    expected = [min(i, horizon + 1) for i in range(7)]
    assert [round(count) for count in counts] == expected


def test_a_unit_more_in_the_window_costs_its_reduced_map_alone() -> None:
    B, N, side, rank = 16, 32, 16, 4

    def unit(channels: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels, N, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(N), nn.ReLU()]

    units = [m for i in range(6) for m in unit(3 if i == 0 else N)]
    net = nn.Sequential(*units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(N, 2))
    names = {f"{3 * i}": rank for i in range(6)}
    model = sva.fuse(sva.factorize(net, names, "channel"))
    x, y = torch.randn(B, 3, side, side), torch.randint(2, (B,))

    rule = replace(SSA, grid=1)  # what a readout holds of a unit is little

    def peak(horizon: int) -> int:
        learner = sva.Learner(model, rule, horizon=horizon, optimizer=sgd, example=x)
        learner.step(x, y)
        existing = [x, y, *model.parameters(), *model.buffers(), *learner.feedback.parameters()]
        with LiveTensors(existing) as live:
            learner.step(x, y)
        return live.peak

    reduced, full = B * rank * side * side * 4, B * N * side * side * 4
    peaks = [peak(horizon) for horizon in (1, 2, 3, 4)]
    for less, more in pairwise(peaks):
        assert more - less < reduced + 0.1 * full  # what a loss keeps, and gradients of weights
