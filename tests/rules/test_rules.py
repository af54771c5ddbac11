"""Rules as data: names, fields, and what they refuse."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
from tests.oracles import losses as oracle
from torch import nn

import svdalign as sva
from svdalign import rules
from svdalign.rules import BP, FA, SSA, Rule


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05)


def test_names() -> None:
    names = ["bp", "brsf", "dfa", "drtp", "fa", "sign-symmetric"]
    assert rules.available() == [*names, "ssa", "ssa-reconstruction"]
    for name in rules.available():
        assert rules.get(name).name == name


def test_a_rule_is_its_own_name() -> None:
    rule = SSA(alpha=2.0)
    assert rules.get(rule) is rule


@pytest.mark.parametrize("name", ["sgd", "", "BP"])
def test_an_unknown_rule_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"rule must be .*'bp', .*'dfa'.*'ssa'.* got " + repr(name)
    ):
        rules.get(name)


def test_rules_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        rules.get("ssa").alpha = 1.0


@pytest.mark.parametrize("name", ["dfa", "drtp", "ssa"])
@pytest.mark.parametrize("horizon", [-1, 1.5, "1", True])
def test_horizon_is_a_whole_number_or_none(name: str, horizon) -> None:
    with pytest.raises(ValueError, match=r"horizon.*at least 0 or None.*got"):
        replace(rules.get(name), horizon=horizon)


@pytest.mark.parametrize("rule", [BP, FA])
def test_backpropagating_rules_refuse_a_horizon(rule) -> None:
    with pytest.raises(ValueError, match=r"horizon must be None.*got 1"):
        rule(horizon=1)


@pytest.mark.parametrize("rule", [BP, FA])
def test_backpropagating_rules_take_no_source_of_errors(rule) -> None:
    with pytest.raises(ValueError, match=r"error must be 'output' for rule .* got 'local'"):
        rule(error="local")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("error", "elsewhere"), ("alignment", "angle"), ("alpha", -1.0), ("alpha", float("nan")),
        ("beta", -0.1), ("gamma", -2.0), ("grid", 0), ("feedback_rank", 0), ("feedback_rank", 1.5),
        ("alpha", "abc"), ("beta", None), ("gamma", True), ("learn", "maybe"), ("learn", 1),
    ],
)  # fmt: skip
def test_ssa_refuses_fields_out_of_range(field: str, value) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be .*got"):
        SSA(**{field: value})


# --- the terms on weights -----------------------------------------------------------------------


def learner_of(rule, net: nn.Module, ranks, **options) -> sva.Learner:
    shape = (4, 2, 6, 6) if isinstance(net[0], nn.Conv2d) else (4, 6)
    model = sva.factorize(net.double(), ranks, **options)
    return sva.Learner(
        model, rule, optimizer=sgd, example=torch.randn(shape).double(), retraction=None
    )


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)
    )  # fmt: skip


def difference(rule: SSA, plain: SSA, net: nn.Module, ranks, **options):
    """Gradients that ``rule`` adds to those of ``plain``, and the model, off orthonormality."""
    torch.manual_seed(0)
    learner = learner_of(rule, net, ranks, **options)
    with torch.no_grad():
        for p in learner.model.parameters():
            p += 0.05 * torch.randn_like(p)
    other = sva.Learner(
        learner.model, plain, optimizer=sgd, example=batch(net)[0], retraction=None
    )  # fmt: skip
    x, y = batch(net)
    with_term, without = learner.gradients(x, y), other.gradients(x, y)
    return {n: with_term[n] - without[n] for n in without}, learner


def batch(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (4, 2, 6, 6) if isinstance(net[0], nn.Conv2d) else (4, 6)
    return torch.randn(shape, generator=generator).double(), torch.arange(4) % 3


PLAIN = SSA(alpha=0.0)


def test_beta_adds_the_gradient_of_the_orthogonality_penalty() -> None:
    """d/dU ||U^T U - I||_F^2 = 4 U (U^T U - I)."""
    added, learner = difference(replace(PLAIN, beta=0.3), PLAIN, perceptron(), {"0": 4, "4": 2})
    for path in ("0", "4"):  # the classifier's own unit included
        layer = learner.model.get_submodule(path)
        for name in ("U", "V"):
            X = getattr(layer, name).detach()
            expected = 0.3 * 4 * X @ (X.T @ X - torch.eye(layer.rank).double())
            torch.testing.assert_close(added[f"{path}.{name}"], expected, rtol=0, atol=1e-10)
        assert added[f"{path}.s"].abs().max() < 1e-12
    assert added["2.weight"].abs().max() < 1e-12


def test_gamma_adds_the_gradient_of_hoyers_measure() -> None:
    added, learner = difference(replace(PLAIN, gamma=0.3), PLAIN, perceptron(), {"0": 4})
    s = learner.model[0].s.detach()
    one, two = s.abs().sum(), s.norm()
    expected = 0.3 * (s.sign() / two - one * s / two**3)
    torch.testing.assert_close(added["0.s"], expected, rtol=0, atol=1e-10)


def test_share_alignment_turns_the_output_space_to_the_feedback() -> None:
    """Its gradient in U is that of 1 - ||P Q||^2 / k, found by finite differences."""
    rule = replace(PLAIN, alpha=0.7, alignment="share")
    added, learner = difference(rule, PLAIN, perceptron(), {"0": 4, "2": 2})
    for i, path in enumerate(("0", "2")):
        layer = learner.model.get_submodule(path)
        U = layer.U.detach().numpy().copy()
        Q = list(learner.feedback.values())[i].U.detach().numpy()
        for row, column in [(0, 0), (3, 1), (7, 1)]:
            step = 1e-6
            U[row, column] += step
            up = oracle.share(U, Q)
            U[row, column] -= 2 * step
            down = oracle.share(U, Q)
            U[row, column] += step
            slope = 0.7 * (up - down) / (2 * step)
            assert float(added[f"{path}.U"][row, column]) == pytest.approx(slope, abs=1e-7)
        assert added[f"{path}.V"].abs().max() < 1e-12


def test_share_alignment_of_a_map_reads_the_feedback_by_channels() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 9, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(9 * 36, 3)
    )  # fmt: skip
    rule = replace(PLAIN, alpha=0.7, alignment="share", grid=1)
    added, learner = difference(rule, replace(PLAIN, grid=1), net, {"0": 2}, scheme="channel")
    U = learner.model[0].U.detach().numpy().copy()
    Q = learner.feedback["0"].U.detach().numpy()  # (9, 3): one row a channel at grid 1
    step = 1e-6
    U[5, 1] += step
    up = oracle.share(U, Q)
    U[5, 1] -= 2 * step
    slope = 0.7 * (up - oracle.share(U, Q)) / (2 * step)
    assert float(added["0.U"][5, 1]) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
def test_share_alignment_of_a_layer_that_spans_all_channels_is_nothing(scheme: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    )  # fmt: skip
    rule = replace(PLAIN, alpha=0.7, alignment="share")
    added, _ = difference(rule, PLAIN, net, {"0": 4}, scheme=scheme)
    assert all(grad.abs().max() < 1e-12 for grad in added.values())


def test_cosine_alignment_adds_its_gradient() -> None:
    rule = replace(PLAIN, alpha=0.7, alignment="cosine", horizon=0)
    plain = replace(PLAIN, horizon=0)
    added, learner = difference(rule, plain, perceptron(), {"0": 4})
    x, y = batch(perceptron())
    model, B = learner.model, learner.feedback["0"]
    bias = model[0].bias.detach().numpy().copy()
    direction = (torch.eye(3).double()[y] @ (B.U * B.s @ B.V.T).T).detach().numpy()

    def loss() -> float:
        a = x.numpy() @ model[0].merged_weight().detach().numpy().T + bias
        return oracle.cosine_alignment(torch.tanh(torch.from_numpy(a)).numpy(), direction)

    for i in (0, 4):
        bias[i] += 1e-6
        up = loss()
        bias[i] -= 2e-6
        slope = 0.7 * (up - loss()) / 2e-6
        bias[i] += 1e-6
        assert float(added["0.bias"][i]) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("alignment", ["similarity", "share", "cosine", "none"])
def test_every_alignment_trains(alignment: str) -> None:
    rule = SSA(alignment=alignment, alpha=0.5, beta=0.1, gamma=0.01)
    learner = learner_of(rule, perceptron(), {"0": 4, "2": 3})
    x, y = batch(perceptron())
    first = learner.step(x, y).loss
    for _ in range(30):
        last = learner.step(x, y).loss
    assert last < first


# --- rules that send errors back through each layer ---------------------------------------------

LAYERWISE = [name for name in rules.available() if rules.get(name).needs_affine_layers]


def layerwise_gradients(rule: str, model: nn.Module, *shape: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(shape), torch.arange(shape[0]) % 3
    learner = sva.Learner(model, rule, optimizer=sgd, example=x)
    return list(learner.gradients(x, y).values())


def assert_all_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", LAYERWISE)
@pytest.mark.parametrize("factored", [False, True])
def test_activations_in_place_change_no_error_sent_back(rule: str, factored: bool) -> None:
    def net(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 8, 3), nn.ReLU(inplace),
            nn.Flatten(), nn.Linear(32, 3),
        )  # fmt: skip
        return sva.factorize(model, {"0": 4, "2": 4}) if factored else model

    one, other = (layerwise_gradients(rule, net(inplace), 4, 2, 6, 6) for inplace in (False, True))
    assert_all_equal(one, other)


class Gated(nn.Module):
    """Two layers side by side, at paths of choice, that take their input by place or by name."""

    def __init__(self, names: tuple[str, str], by_name: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names, self.by_name = names, by_name
        for name in names:
            self.add_module(name, nn.Linear(6, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = [self.get_submodule(name) for name in self.names]
        if self.by_name:
            a, b = (layer(input=x.tanh()) for layer in layers)
            return self.head(input=a * b)
        a, b = (layer(x.tanh()) for layer in layers)
        return self.head(a * b)


@pytest.mark.parametrize("rule", LAYERWISE)
def test_any_path_of_a_layer_will_do(rule: str) -> None:
    plain = layerwise_gradients(rule, Gated(("a", "b")), 4, 6)
    for names in (("keys", "values"), ("items", "pop")):
        assert_all_equal(layerwise_gradients(rule, Gated(names), 4, 6), plain)


@pytest.mark.parametrize("rule", LAYERWISE)
def test_layers_may_be_given_their_input_by_name(rule: str) -> None:
    plain, by_name = (Gated(("a", "b"), by_name) for by_name in (False, True))
    one, other = (layerwise_gradients(rule, model, 4, 6) for model in (plain, by_name))
    assert_all_equal(one, other)


@pytest.mark.parametrize("rule", LAYERWISE)
def test_a_model_that_is_one_layer_learns_as_by_backpropagation(rule: str) -> None:
    """Nothing is sent back: the only layer gets its own gradient."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    assert_all_equal(
        layerwise_gradients(rule, model, 4, 6), layerwise_gradients("bp", model, 4, 6)
    )  # fmt: skip


# --- batches of another size than the example's -------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        SSA(), SSA(grid=1), SSA(widen=32), SSA(alignment="cosine"), SSA(alignment="none"),
        rules.DFA(grid=3), rules.DRTP(grid=2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("example", [4, 8, 16])
def test_images_may_be_smaller_or_larger_than_the_examples(rule, fused: bool, example: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip
    model = sva.factorize(model, {"0": 3, "3": 4, "6": 4}, "channel")
    model = sva.fuse(model) if fused else model
    learner = sva.Learner(model, rule, optimizer=sgd, example=torch.randn(2, 2, example, example))
    for size in ((3, 5), (4, 4), (8, 8), (17, 16)):
        gradients = learner.gradients(torch.randn(4, 2, *size), torch.arange(4) % 3)
        assert gradients.keys() == dict(model.named_parameters()).keys()
        assert all(torch.isfinite(g).all() for g in gradients.values())


# --- rules by name ------------------------------------------------------------------------------


@pytest.fixture
def registered():
    """The names of registered rules, put back when the test is over."""
    from svdalign.rules import _registry

    before = dict(_registry._rules)
    yield _registry._rules
    _registry._rules.clear()
    _registry._rules.update(before)


def test_a_rule_registers_itself(registered) -> None:
    @rules.register
    @dataclass(frozen=True)
    class Mine(SSA):
        name: str = "mine"

    rules.register(Mine(name="mine-greedy", horizon=0))
    assert {"mine", "mine-greedy"} <= set(rules.available())
    assert rules.get("mine") == Mine()
    assert rules.get("mine-greedy").horizon == 0
    rules.register(Mine)  # the cell of a notebook, run again
    with pytest.raises(ValueError, match="another rule with the name 'mine'"):
        rules.register(SSA(name="mine"))


def test_a_rule_is_found_by_the_path_of_its_class() -> None:
    for given in ("svdalign.rules.ssa:SSA", SSA):
        assert rules.get(given) == SSA()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no.such.module:Rule", "there is no module 'no.such.module'"),
        ("svdalign.rules:Nothing", "module 'svdalign.rules' has no 'Nothing'"),
        ("svdalign.rules:available", "must be a subclass of svdalign.rules.Rule"),
        (":", "there is no module ''"),
    ],
)
def test_a_path_to_no_rule_is_refused(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rules.get(given)


@pytest.mark.parametrize("given", [None, 3, [], nn.Linear, Rule])
def test_what_is_no_rule_is_refused(given) -> None:
    with pytest.raises(TypeError, match="rule"):
        rules.get(given)
