"""What holds for every registered rule, whatever it teaches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svdalign as sva
from svdalign import rules

B, C = 8, 3
RULES = rules.available()


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def perceptron(width: int, *tail: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, width), *tail
    )
    return sva.factorize(net, {"0": 4, "2": 4})


def learner_of(name: str, model: nn.Module | None = None, loss=None, **options) -> sva.Learner:
    model = perceptron(C) if model is None else model
    return sva.Learner(
        model, options.pop("rule", name), optimizer=sgd, example=inputs(), loss=loss, **options
    )


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(B, 6, generator=torch.Generator().manual_seed(seed))


Y = torch.arange(B) % C
SOFT = torch.rand(B, C, generator=torch.Generator().manual_seed(2)).softmax(1)
SEVERAL = torch.maximum(F.one_hot(Y, C), F.one_hot(Y.flip(0), C)).float()


def yes_or_no(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z.flatten(), y.float())


TASKS = {
    "classes": (C, Y, None),
    "probabilities": (C, SOFT, None),
    "labels": (C, SEVERAL, F.binary_cross_entropy_with_logits),
    "one number": (1, inputs(3)[:, :1], F.mse_loss),
    "numbers": (C, inputs(3)[:, :C], F.mse_loss),
    "yes or no": (1, Y.clamp_max(1), yes_or_no),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", RULES)
def test_every_task_teaches_every_weight(name: str, task: str) -> None:
    width, y, loss = TASKS[task]
    learner = learner_of(name, perceptron(width), loss)
    found = learner.gradients(inputs(), y)
    assert {n for n, g in found.items() if g.any()} == set(dict(learner.model.named_parameters()))
    assert all(g.isfinite().all() for g in found.values())
    assert torch.isfinite(learner.step(inputs(), y).loss)


@pytest.mark.parametrize("name", [n for n in RULES if rules.get(n).local])
def test_without_a_horizon_it_is_backpropagation(name: str) -> None:
    rule = replace(rules.get(name), horizon=None, beta=0.0, gamma=0.0)
    if hasattr(rule, "alpha"):
        rule = replace(rule, alpha=0.0)
    learner = learner_of(name, rule=rule)
    found = learner.gradients(inputs(), Y)
    named = dict(learner.model.named_parameters())
    grads = torch.autograd.grad(F.cross_entropy(learner.model(inputs()), Y), list(named.values()))
    for n, expected in zip(named, grads, strict=True):
        torch.testing.assert_close(found[n], expected)


@pytest.mark.parametrize("name", RULES)
def test_a_run_goes_on_bit_for_bit(name: str, tmp_path) -> None:
    learner = learner_of(name)
    learner.step(inputs(1), Y)
    sva.save(learner, tmp_path / "run")
    learner.step(inputs(2), Y)
    again = learner_of(name, seed=7)
    sva.load(tmp_path / "run", into=again)
    again.step(inputs(2), Y)
    expected = learner.model.state_dict()
    for key, value in again.model.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", RULES)
def test_bad_targets_are_refused_with_their_name(name: str) -> None:
    learner = learner_of(name, loss=nn.CrossEntropyLoss())
    learner.step(inputs(), Y)
    for y in (Y + 1, Y[:-1], F.one_hot(Y, C)):
        with pytest.raises(ValueError, match="y must hold"):
            learner.step(inputs(), y)
