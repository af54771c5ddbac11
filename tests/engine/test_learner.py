"""What users hold: the promises of each method, the errors, and factors that stay orthonormal."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import svdalign as sva
from svdalign import rules
from svdalign.factors import FactoredLayer
from svdalign.factors.stiefel import RETRACTIONS, orthogonality_error
from svdalign.losses import hoyer_sparsity

#: All but the one that draws new random numbers for every batch, so that no two runs are alike.
RULES = [name for name in rules.available() if name != "brsf"]


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 2e-3)


def net(seed: int = 0, dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip
    return sva.factorize(model, {"4": 6, "9": 5})


def batch(seed: int = 0, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 2, 6, 6, generator=generator), torch.arange(size) % 3


def learner_of(rule="ssa", model: nn.Module | None = None, **options) -> sva.Learner:
    options = {"optimizer": adamw, "example": batch()[0], **options}
    return sva.Learner(net() if model is None else model, rule, **options)


def snapshot(learner: sva.Learner) -> dict:
    return {
        "state": copy.deepcopy(learner.state_dict()),
        "grads": [
            None if p.grad is None else p.grad.clone()
            for p in (*learner.model.parameters(), *learner.feedback.parameters())
        ],
        "requires": [p.requires_grad for p in learner.model.parameters()],
        "training": [m.training for m in learner.model.modules()],
        "rng": torch.get_rng_state(),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules(learner)],
    }


def modules(learner: sva.Learner) -> list[nn.Module]:
    return list(learner.model.modules())


def assert_equal(one: object, two: object) -> None:
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_equal(a, b)
    elif isinstance(one, Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two


@pytest.mark.parametrize("rule", RULES)
class TestEveryRule:
    def test_gradients_leaves_everything_as_it_was(self, rule: str) -> None:
        learner = learner_of(rule)
        x, y = batch()
        learner.step(x, y)
        learner.backward(x, y)  # leaves .grad behind, which is to stay
        before = snapshot(learner)
        learner.gradients(*batch(5))
        assert_equal(snapshot(learner), before)

    def test_making_a_learner_leaves_the_model_as_it_was(self, rule: str) -> None:
        model = net()
        before = copy.deepcopy(model.state_dict())
        state = torch.get_rng_state()
        learner = learner_of(rule, model)
        assert_equal(dict(model.state_dict()), dict(before))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())
        assert snapshot(learner)["hooks"] == [0] * len(modules(learner))

    def test_gradients_are_those_that_backward_adds(self, rule: str) -> None:
        learner = learner_of(rule, net(dropout=0.0))
        x, y = batch()
        gradients = learner.gradients(x, y)
        learner.backward(x, y)
        for name, parameter in learner.model.named_parameters():
            assert torch.equal(gradients[name], parameter.grad)

    def test_backward_accumulates(self, rule: str) -> None:
        learner = learner_of(rule, net(dropout=0.0).eval())
        one, two = batch(1), batch(2)
        first, second = learner.gradients(*one), learner.gradients(*two)
        learner.backward(*one)
        learner.backward(*two)
        for name, parameter in learner.model.named_parameters():
            torch.testing.assert_close(parameter.grad, first[name] + second[name])

    def test_step_is_backward_and_update(self, rule: str) -> None:
        one, two = learner_of(rule), learner_of(rule)
        x, y = batch()
        for _ in range(3):
            torch.manual_seed(7)
            one.step(x, y)
            torch.manual_seed(7)
            two.optimizer.zero_grad()
            two.backward(x, y)
            two.update()
        assert_equal(one.state_dict(), two.state_dict())

    def test_the_same_seeds_give_the_same_run(self, rule: str) -> None:
        runs = []
        for _ in range(2):
            learner = learner_of(rule, seed=3)
            torch.manual_seed(1)
            reports = [learner.step(*batch(i)) for i in range(4)]
            runs.append((learner.state_dict(), [report.loss for report in reports]))
        assert_equal(*runs)

    def test_a_saved_run_goes_on_as_if_it_had_not_stopped(self, rule: str) -> None:
        whole = learner_of(rule, net(dropout=0.0))
        for i in range(2):
            whole.step(*batch(i))
        resumed = learner_of(rule, net(seed=9, dropout=0.0), seed=9)
        resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        for i in range(2, 4):
            one, two = whole.step(*batch(i)), resumed.step(*batch(i))
            assert torch.equal(one.loss, two.loss)
        assert_equal(whole.state_dict(), resumed.state_dict())

    def test_learns(self, rule: str) -> None:
        learner = learner_of(
            rule, net(dropout=0.0), optimizer=lambda p: torch.optim.AdamW(p, 1e-2)
        )  # fmt: skip
        x, y = batch()
        x = x + torch.randn(3, 2, 6, 6)[y]  # a mean for every class
        losses = [float(learner.step(x, y).loss) for _ in range(60)]
        assert losses[-1] < 0.5 * losses[0]

    def test_runs_under_autocast(self, rule: str) -> None:
        learner = learner_of(rule, net(dropout=0.0))
        x, y = batch()
        exact = learner.gradients(x, y)
        with torch.autocast("cpu", torch.bfloat16):
            report = learner.step(x, y)
        assert torch.isfinite(report.loss)
        for name, parameter in learner.model.named_parameters():
            assert parameter.grad.dtype == torch.float32
            cosine = F.cosine_similarity(parameter.grad.flatten(), exact[name].flatten(), dim=0)
            # Biases in front of a batch norm have no gradient but rounding.
            assert cosine > 0.9 or exact[name].abs().max() < 1e-6

    def test_every_parameter_gets_a_gradient(self, rule: str) -> None:
        learner = learner_of(rule)
        gradients = learner.gradients(*batch())
        assert list(gradients) == [name for name, _ in learner.model.named_parameters()]

    def test_report(self, rule: str) -> None:
        learner = learner_of(rule, net(dropout=0.0))
        x, y = batch()
        z = copy.deepcopy(learner.model)(x)
        report = learner.step(x, y)
        torch.testing.assert_close(report.loss, F.cross_entropy(z, y))
        torch.testing.assert_close(report.accuracy, (z.argmax(1) == y).float().mean())
        assert report.unit_losses["output"] is report.loss


def test_accuracy_is_none_without_class_indices() -> None:
    torch.manual_seed(0)
    model = sva.factorize(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2)), {"0": 3})
    x, y = torch.randn(5, 6), torch.randn(5, 2)
    learner = sva.Learner(
        model,
        replace(rules.get("dfa"), horizon=0),
        optimizer=adamw,
        example=x,
        loss=lambda z, y: F.mse_loss(z, y),
    )
    report = learner.step(x, y)
    assert report.accuracy is None


def test_optimizer_is_given_the_model_and_learned_feedback() -> None:
    given: list[nn.Parameter] = []

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        given.extend(parameters)
        return adamw(parameters)

    model = net()
    model[0].bias.requires_grad_(False)
    learner = learner_of("ssa", model, optimizer=optimizer)
    expected = [p for p in model.parameters() if p.requires_grad]
    expected += list(learner.feedback.parameters())
    assert [id(p) for p in given] == [id(p) for p in expected]


def test_the_rules_own_horizon_and_error_hold_unless_given() -> None:
    assert learner_of("ssa").horizon == rules.get("ssa").horizon
    assert learner_of("ssa", horizon=2).horizon == 2
    assert learner_of("ssa", horizon=None).horizon is None
    assert learner_of("ssa", error="output").rule.error == "output"
    assert learner_of("dfa").rule == rules.get("dfa")


def test_the_seed_decides_the_feedback() -> None:
    one, same, other = (learner_of("dfa", seed=s).feedback.state_dict() for s in (1, 1, 2))
    assert_equal(dict(one), dict(same))
    assert not torch.equal(next(iter(one.values())), next(iter(other.values())))


def test_inputs_may_be_tuples_and_dicts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.head = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.act(self.a(left + right)))}

    torch.manual_seed(0)
    model = Two()
    left, right, y = torch.randn(4, 4), torch.randn(4, 4), torch.arange(4) % 3
    by_place = sva.Learner(model, "dfa", optimizer=adamw, example=(left, right))
    by_name = sva.Learner(
        model, "dfa", optimizer=adamw, example={"left": left, "right": right}
    )  # fmt: skip
    one = by_place.gradients((left, right), y)
    assert_equal(one, by_name.gradients({"left": left, "right": right}, y))


# --- orthonormality -----------------------------------------------------------------------------


def worst_error(learner: sva.Learner) -> float:
    """Largest |X^T X - I| entry-wise norm over the model's factors and learned feedback."""
    factors = [X for m in learner.model.modules() if isinstance(m, FactoredLayer)
               for X in (m.U, m.V)]  # fmt: skip
    factors += [X for f in learner.feedback.values() for X in (f.U, f.V)]
    return max(float(orthogonality_error(X.detach())) for X in factors)


@pytest.mark.parametrize("retraction", sorted(RETRACTIONS))
@pytest.mark.parametrize("rule", ["ssa", "ssa-reconstruction"])
def test_with_retraction_factors_stay_orthonormal_to_rounding(rule: str, retraction: str) -> None:
    learner = learner_of(rule, retraction=retraction)
    for i in range(50):
        learner.step(*batch(i))
        assert worst_error(learner) <= 1e-5


def test_with_the_penalty_alone_the_error_stays_bounded() -> None:
    """Below 0.2 over 50 steps, where without penalty and retraction it goes on growing."""
    errors = {}
    for beta in (0.0, 1.0):
        rule = replace(rules.get("ssa"), beta=beta, learn=False)
        learner = learner_of(rule, retraction=None)
        for i in range(50):
            learner.step(*batch(i))
            if beta:
                assert worst_error(learner) < 0.2
        errors[beta] = worst_error(learner)
    assert errors[0.0] > 2 * errors[1.0]


@pytest.mark.parametrize("retraction", ["qr", None])
def test_factors_that_are_changed_between_steps_can_be_brought_back(retraction: str | None) -> None:
    learner = learner_of(retraction=retraction)
    with torch.no_grad():
        for p in learner.model.parameters():
            p.mul_(1.1)
    assert worst_error(learner) > 0.1
    learner.retract()
    assert (worst_error(learner) <= 1e-5) == (retraction is not None)


class TestEarlyUpdates:
    """Each unit's weights are updated as soon as it has gone backward."""

    @pytest.mark.parametrize("horizon", [0, 1, 5])
    @pytest.mark.parametrize("rule", ["ssa", "ssa-reconstruction"])
    @pytest.mark.parametrize(
        "optimizer", [adamw, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2)]
    )
    def test_change_nothing_where_parameters_are_treated_one_by_one(
        self, rule: str, horizon: int, optimizer
    ) -> None:
        after = []
        for early in (False, True):
            learner = learner_of(rule, optimizer=optimizer, horizon=horizon, update_early=early)
            torch.manual_seed(1)  # of the dropout
            for seed in range(3):
                learner.step(*batch(seed))
            after.append(learner.state_dict())
        torch.testing.assert_close(after[1]["model"], after[0]["model"], rtol=0, atol=0)
        torch.testing.assert_close(after[1]["feedback"], after[0]["feedback"], rtol=0, atol=0)
        torch.testing.assert_close(
            after[1]["optimizer"]["state"], after[0]["optimizer"]["state"], rtol=0, atol=0
        )

    def test_hold_gradients_of_one_unit_at_a_time(self) -> None:
        learner = learner_of(update_early=True)
        parameters = [*learner.model.parameters(), *learner.feedback.parameters()]
        held = []

        def note(*_: object) -> None:
            held.append({id(p) for p in parameters if p.grad is not None})

        learner.optimizer.register_step_pre_hook(note)
        learner.step(*batch())
        assert len(held) == len(learner.units)
        assert sum(map(len, held)) == len(set().union(*held)) == len(parameters)
        assert all(p.grad is None for p in parameters)

    def test_are_refused_where_units_share_weights(self) -> None:
        shared = nn.Linear(6, 6)
        model = nn.Sequential(nn.Linear(4, 6), shared, nn.ReLU(), shared, nn.Linear(6, 3))
        with pytest.raises(ValueError, match=r"update_early .*1\.weight.* belong to several"):
            learner_of(model=model, example=torch.randn(5, 4), update_early=True)


def test_retraction_every_k_steps() -> None:
    learner = learner_of(retraction="qr", retract_every=3)
    errors = []
    for i in range(6):
        learner.step(*batch(i))
        errors.append(worst_error(learner) <= 1e-5)
    assert errors == [False, False, True, False, False, True]


@settings(max_examples=5)
@given(rate=st.floats(1e-4, 1e-1))
def test_the_default_retraction_copes_with_large_steps(rate: float) -> None:
    """Whatever the learning rate, the factors end on the manifold, not at infinity."""
    torch.manual_seed(0)
    model = sva.factorize(
        nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 3)), {"0": 16}
    )  # fmt: skip
    x, y = torch.randn(16, 128), torch.arange(16) % 3
    learner = sva.Learner(
        model, optimizer=lambda p: torch.optim.AdamW(p, rate), example=x
    )  # fmt: skip
    for _ in range(5):
        learner.step(x, y)
        assert worst_error(learner) <= 1e-5


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "backprop"}, ValueError, r"rule must be .*'bp', .*'ssa'.*got 'backprop'"),
        ({"horizon": -1}, ValueError, r"horizon .*at least 0 or None.*got -1"),
        ({"horizon": 1.0}, ValueError, r"horizon .*at least 0 or None.*got 1\.0"),
        ({"rule": "fa", "horizon": 1}, ValueError, r"'fa'.*horizon must be None.*got 1"),
        ({"rule": "bp", "horizon": 0}, ValueError, r"'bp'.*horizon must be None.*got 0"),
        ({"error": "global"}, ValueError, r"error must be .*'output', 'local', 'target'.*'global'"),
        ({"units": "layers"}, ValueError, r"units must be 'layer', 'block', 'stage'.*got 'layers'"),
        ({"units": 0}, ValueError, r"units must be at least 1 block, got 0"),
        ({"units": True}, ValueError, r"units must be .*got True"),
        ({"units": lambda name, module: False}, ValueError, r"units chose no module"),
        ({"optimizer": lambda p: "sgd"}, TypeError, r"optimizer must .*Optimizer.*got 'sgd'"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)},
            TypeError,
            r"optimizer must be called with .*lambda p: .*got SGD",
        ),
        ({"retraction": "cayley"}, ValueError, r"retraction .*'newton-schulz'.*None.*'cayley'"),
        ({"retract_every": 0}, ValueError, r"retract_every .*at least 1, got 0"),
        ({"update_early": True, "horizon": None}, ValueError, r"update_early .*horizon .*got None"),
        (
            {"update_early": True, "optimizer": torch.optim.LBFGS},
            ValueError,
            r"update_early .*LBFGS evaluates the loss by itself",
        ),
        ({"model": "net"}, TypeError, r"model must be a torch\.nn\.Module, got str"),
        ({"model": nn.Sequential(nn.ReLU())}, ValueError, r"model has no parameter to train"),
    ],
)
def test_bad_arguments_are_named_with_what_is_allowed(options, error, message) -> None:
    with pytest.raises(error, match=message):
        learner_of(**options)


def bad_batches() -> dict[str, tuple]:
    x, y = batch()
    nan = x.clone()
    nan[3, 0, 0, 0] = float("nan")
    infinite = x.clone()
    infinite[0] = float("inf")
    return {
        "label too large": (x, y + 1, ValueError, r"y must .*\[0, 2\], got values in \[1, 3\]"),
        "label negative": (x, y - 1, ValueError, r"y must .*\[0, 2\], got values in \[-1, 1\]"),
        "float labels": (x, y.float(), ValueError, r"y must .*torch\.int64.*got torch\.float32"),
        "short labels": (x, y.int(), ValueError, r"y must .*torch\.int64.*got torch\.int32"),
        "too few": (x, y[:-1], ValueError, r"y must .*each of the 12 samples.*got shape \(11,\)"),
        "too many": (x, y.repeat(2), ValueError, r"y must .*12 samples.*got shape \(24,\)"),
        "one": (x, y[0], ValueError, r"y must .*12 samples.*got shape \(\)"),
        "none": (x[:0], y[:0], ValueError, r"batch is empty"),
        "no inputs": (x[:0], y, ValueError, r"batch is empty"),
        "a list": (x, y.tolist(), TypeError, r"y must be a tensor.*got list"),
        "NaN": (nan, y, ValueError, r"x must be finite, got NaN"),
        "infinity": (infinite, y, ValueError, r"x must be finite, got NaN or infinite"),
    }


@pytest.mark.parametrize("case", bad_batches())
@pytest.mark.parametrize("rule", ["bp", "ssa", "dfa"])
def test_a_bad_first_batch_is_refused_before_anything_changes(rule: str, case: str) -> None:
    x, y, error, message = bad_batches()[case]
    learner = learner_of(rule)
    before = snapshot(learner)
    with pytest.raises(error, match=message):
        learner.step(x, y)
    assert_equal(snapshot(learner), before)
    learner.step(*batch())  # and a good one is taken


def test_parameters_outside_every_unit_are_told_of() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.act, self.head = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)
            self.spare = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.body(x)))

    with pytest.warns(UserWarning, match=r"do not reach.*'spare\.weight', 'spare\.bias'"):
        sva.Learner(Spare(), "dfa", optimizer=adamw, example=torch.randn(2, 4))


def test_targets_are_counted_along_the_axis_of_the_batch() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.act, self.head = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.body(x))).mean(0)

    class Flattened(SequenceFirst):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.body(x))).flatten(0, 1)

    y = torch.arange(6) % 3
    for model, example, shape in (
        (SequenceFirst(), (7, 5, 4), (7, 6, 4)),
        (Flattened(), (2, 5, 4), (2, 3, 4)),
        (Flattened(), (1, 3, 4), (2, 3, 4)),
    ):
        learner = sva.Learner(
            model, "dfa", units="layer", optimizer=adamw, example=torch.randn(example)
        )  # fmt: skip
        right = 6 * learner.step(torch.randn(shape), y).accuracy
        torch.testing.assert_close(right, right.round())


def test_pixels_and_probabilities_are_targets_too() -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 6, 3, padding=1), nn.ReLU()]
    x, _ = batch()
    pixels = learner_of(model=nn.Sequential(*body, nn.Conv2d(6, 3, 1)))
    assert pixels.step(x, torch.randint(3, (12, 6, 6))).accuracy is not None
    soft = torch.rand(12, 3).softmax(1)
    report = learner_of().step(x, soft)
    assert report.loss.isfinite()
    assert report.accuracy is None  # a distribution is not right or wrong


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        *((rule, "output") for rule in [*RULES, "sign-symmetric"]),
        ("dfa", "local"),
        ("ssa", "local"),
    ],
)
def test_a_callers_no_grad_does_not_keep_it_from_learning(rule: str, error) -> None:
    learner = learner_of(rule, net(dropout=0.0), error=error)
    wanted = learner.gradients(*batch())
    with torch.no_grad():
        found = learner.gradients(*batch())
    assert_equal(found, wanted)


@pytest.mark.parametrize("rule", ["bp", "ssa"])
def test_a_layer_that_is_called_again_is_penalised_once(rule: str) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.into(x)
            for _ in range(3):
                h = torch.tanh(self.body(h))
            return self.head(h)

    torch.manual_seed(0)
    model = sva.factorize(Again(), {"body": 3})
    U, s, V = (X.detach() for X in (model.body.U, model.body.s, model.body.V))
    with torch.no_grad():
        model.body.set_factors(1.1 * U, s, V)
    x, y = torch.randn(5, 4), torch.arange(5) % 3

    def gradients(**weights: float) -> dict[str, Tensor]:
        changed = replace(rules.get(rule), **weights)
        learner = sva.Learner(model, changed, units="layer", optimizer=adamw, example=x)
        return learner.gradients(x, y)

    # d/dU ||U^T U - I||^2 = 4 U (U^T U - I), with U^T U = 1.21 I.
    added = gradients(beta=1.0)["body.U"] - gradients()["body.U"]
    torch.testing.assert_close(added, 4 * 1.1 * U * 0.21, rtol=1e-4, atol=1e-5)
    leaf = s.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(hoyer_sparsity(leaf), leaf)
    added = gradients(gamma=1.0)["body.s"] - gradients()["body.s"]
    torch.testing.assert_close(added, wanted, rtol=1e-4, atol=1e-5)
