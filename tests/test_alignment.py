"""Angles to backpropagation, against cases whose answer is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import svdalign as sva
from svdalign.alignment import Descent, _angle, _cosine, descent


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(8 * 9, 4),
    )  # fmt: skip


def learner(rule: str, model: nn.Module, **options: object) -> sva.Learner:
    return sva.Learner(
        model,
        rule,
        optimizer=lambda p: torch.optim.AdamW(p, 1e-2),
        example=torch.randn(4, 2, 6, 6, dtype=torch.float64),
        **options,  # type: ignore[arg-type]
    )


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 2, 6, 6, dtype=torch.float64), torch.randint(0, 4, (n,))


@pytest.mark.parametrize("factored", [False, True])
def test_backpropagation_makes_no_angle_with_itself(factored: bool) -> None:
    model = (sva.factorize(net(), 0.6) if factored else net()).double()
    result = sva.alignment(model, learner("bp", model), *batch())
    assert {layer.name for layer in result.layers} == {"0", "4", "8"}
    for layer in result.layers:
        assert layer.factor_angle < 1e-5
        assert layer.tangent_angle < 1e-5
        assert layer.norm_ratio == pytest.approx(1.0, abs=1e-10)
    assert result.cosine == pytest.approx(1.0, abs=1e-10)
    assert result.descent


def test_the_layer_that_the_task_teaches_is_exact_and_others_are_not() -> None:
    model = sva.factorize(net(), 0.6).double()
    result = sva.alignment(model, learner("dfa", model), *batch())
    angles = {layer.name: layer.factor_angle for layer in result.layers}
    assert angles["8"] < 1e-5
    assert angles["0"] > 1.0
    assert [unit.name for unit in result.units] == ["3", "6"]
    assert all(0.0 <= unit.feedback_angle <= 180.0 for unit in result.units)


def test_a_random_direction_is_near_ninety_degrees() -> None:
    # The cosine of random directions in d dimensions has standard deviation 1 / sqrt(d).
    d = 100_000
    a, b = torch.randn(2, d, dtype=torch.float64)
    assert abs(_angle(_cosine([a], [b])) - 90.0) < math.degrees(6 / math.sqrt(d))


def test_feedback_that_is_the_transposed_jacobian_makes_no_angle() -> None:
    # From the last unit's output the network is linear: z = W h. Feedback B = W^T is its Jacobian.
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 3, (6,))
    dfa = sva.Learner(model, "dfa", optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x)
    (feedback,) = dfa.feedback.children()
    feedback.B.copy_(model[2].weight.detach().mT)
    result = sva.alignment(model, dfa, x, y)
    assert result.units[0].feedback_angle < 1e-5
    assert all(layer.factor_angle < 1e-5 for layer in result.layers)
    feedback.B.neg_()
    assert sva.alignment(model, dfa, x, y).units[0].feedback_angle == pytest.approx(180.0, abs=1e-5)


def test_measuring_leaves_training_as_it_was() -> None:
    model = sva.factorize(net(), 0.6).double()
    ssa = learner("ssa", model)
    x, y = batch()
    ssa.step(x, y)
    model[1].eval()  # a norm that is kept as it is
    modes = [module.training for module in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = {n: p.grad for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    sva.alignment(model, ssa, x, y)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is gradients[n] for n, p in model.named_parameters())
    assert [module.training for module in model.modules()] == modes


def test_another_models_learner_is_refused() -> None:
    model = net().double()
    with pytest.raises(ValueError, match="learner must be the one that trains model"):
        sva.alignment(net().double(), learner("bp", model), *batch())


def test_the_share_of_downhill_steps() -> None:
    # Frozen but for the first layer, whose one feedback matrix is the transposed Jacobian on one
    # batch and its opposite on the next, the rule goes downhill on the first, uphill on the other.
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    model[2].requires_grad_(False)
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 3, (6,))
    dfa = sva.Learner(model, "dfa", optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x)
    (feedback,) = dfa.feedback.children()
    feedback.B.copy_(model[2].weight.mT)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for sign in (1, 1, -1, 1):
            feedback.B.mul_(sign)
            yield x, y

    assert descent(dfa, batches()) == Descent(steps=0.5, layers=0.5)
    backpropagation = learner("bp", sva.factorize(net(), 0.6).double())
    assert descent(backpropagation, [batch()]) == Descent(1.0, 1.0)
    nothing = descent(dfa, [])
    assert math.isnan(nothing.steps)
    assert math.isnan(nothing.layers)


def test_the_share_of_downhill_layers_leaves_out_what_the_task_teaches() -> None:
    # The feedback of the first layer is turned against its path, that of the second is its path.
    model = nn.Sequential(
        nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
    ).double()  # fmt: skip
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 3, (6,))
    dfa = sva.Learner(model, "dfa", optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x)
    first, second = dfa.feedback.children()
    first.B.copy_(-model[1].weight.mT @ model[2].weight.mT)
    second.B.copy_(model[2].weight.mT)
    assert descent(dfa, [(x, y)]).layers == 0.5
    first.B.neg_()
    assert descent(dfa, [(x, y)]).layers == 1.0
