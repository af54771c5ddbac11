"""What holds for every registered rule, whatever it teaches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracles import keep_everything as oracle
from tests.oracles.nets import TOYS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import svdalign as sva
from svdalign import rules
from svdalign.lab.costs import pretending
from svdalign.rules import Supervision

B, C = 8, 3
RULES = rules.available()
LOCAL = [name for name in RULES if rules.get(name).local]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def perceptron(width: int, *tail: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, width), *tail
    )
    return sva.factorize(net, {"0": 4, "2": 4})


def pixels(width: int) -> nn.Module:
    """Of (B, 6, 4, 5) an answer for each pixel."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(6, 9, 3, padding=1), nn.Tanh(), nn.Conv2d(9, 8, 3, padding=1), nn.Tanh(),
        nn.Conv2d(8, width, 1),
    )  # fmt: skip
    return sva.factorize(net, {"0": 4, "2": 4}, "channel")


def learner_of(name: str, model: nn.Module | None = None, loss=None, **options) -> sva.Learner:
    model = perceptron(C) if model is None else model
    example = options.pop("example", inputs())
    return sva.Learner(
        model, options.pop("rule", name), optimizer=sgd, example=example, loss=loss, **options
    )


def inputs(seed: int = 1, shape: tuple[int, ...] = (6,)) -> Tensor:
    return torch.randn(B, *shape, generator=torch.Generator().manual_seed(seed))


Y = torch.arange(B) % C
SOFT = torch.rand(B, C, generator=torch.Generator().manual_seed(2)).softmax(1)
SEVERAL = torch.maximum(F.one_hot(Y, C), F.one_hot(Y.flip(0), C)).float()


def yes_or_no(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z.flatten(), y.float())


def each_token(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


#: The model, its input, targets, and the loss where it is not cross-entropy.
TASKS: dict[str, tuple[Callable[[int], nn.Module], int, Tensor, Tensor, Any]] = {
    "classes": (perceptron, C, inputs(), Y, None),
    "probabilities": (perceptron, C, inputs(), SOFT, None),
    "labels": (perceptron, C, inputs(), SEVERAL, F.binary_cross_entropy_with_logits),
    "one number": (perceptron, 1, inputs(), inputs(3)[:, :1], F.mse_loss),
    "numbers": (perceptron, C, inputs(), inputs(3)[:, :C], F.mse_loss),
    "yes or no": (perceptron, 1, inputs(), Y.clamp_max(1), yes_or_no),
    "a class a token": (
        perceptron, C, inputs(1, (5, 6)), torch.arange(B * 5).reshape(B, 5) % C, each_token
    ),
    "numbers a token": (perceptron, 2, inputs(1, (5, 6)), inputs(3, (5, 2)), F.mse_loss),
    "a class a pixel": (
        pixels, C, inputs(1, (6, 4, 5)), torch.arange(B * 20).reshape(B, 4, 5) % C, None
    ),
    "labels a pixel": (
        pixels, 2, inputs(1, (6, 4, 5)), (inputs(3, (2, 4, 5)) > 0).float(),
        F.binary_cross_entropy_with_logits,
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", RULES)
def test_every_task_teaches_every_weight(name: str, task: str) -> None:
    make, width, x, y, loss = TASKS[task]
    learner = learner_of(name, make(width), loss, example=x)
    found = learner.gradients(x, y)
    assert {n for n, g in found.items() if g.any()} == set(dict(learner.model.named_parameters()))
    assert all(g.isfinite().all() for g in found.values())
    assert torch.isfinite(learner.step(x, y).loss)


@pytest.mark.parametrize("name", LOCAL)
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


# --- the stream against a pass that keeps everything ----------------------------------------------


@pytest.mark.parametrize("horizon", [0, 1, 99])
@pytest.mark.parametrize("toy", ["mlp", "convnet", "resnet", "long skips"])
@pytest.mark.parametrize("name", LOCAL)
def test_streaming_gives_the_gradients_of_a_whole_graph(name: str, toy: str, horizon: int) -> None:
    net = TOYS[toy]
    model, (x, y) = net.model(), net.batch()
    rule = replace(rules.get(name), horizon=horizon)
    learner = learner_of(name, model, rule=rule, example=x, units=net.units)
    found = learner.gradients(x, y)
    assert learner.task is not None

    def loss(i: int, h: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """What the rule itself has the i-th unit learn from."""
        unit, output = learner.units[i], z.detach().requires_grad_()
        (error,) = torch.autograd.grad(F.cross_entropy(output, y), output)
        supervision = Supervision(y, F.cross_entropy, error, learner.task)
        return rule.loss(learner.unit_spec(unit), learner.feedback_of(unit), h, supervision)

    expected = oracle.gradients(
        model, x, y, exits=net.exits, parameters=net.parameters(model), loss=loss, horizon=horizon
    )
    named = dict(model.named_parameters())
    for unit in learner.units:  # what the factors of each learn besides
        extra = rule.weights_loss(learner.unit_spec(unit), learner.feedback_of(unit))
        if extra is not None and extra.requires_grad:
            own = [n for n in unit.parameters if named[n].requires_grad]
            grads = torch.autograd.grad(extra, [named[n] for n in own], allow_unused=True)
            for n, grad in zip(own, grads, strict=True):
                if grad is not None:
                    expected[n] = expected.get(n, torch.zeros_like(grad)) + grad
    assert set(found) == set(expected)
    for n, grad in expected.items():
        torch.testing.assert_close(found[n], grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in RULES if n not in LOCAL])
def test_a_rule_without_local_losses_gives_what_autograd_does(name: str) -> None:
    """With its own way back through the layers, if it has one."""
    net = TOYS["resnet"]
    model, (x, y) = net.model(), net.batch()
    learner = learner_of(name, model, example=x)
    torch.manual_seed(3)
    found = learner.gradients(x, y)
    torch.manual_seed(3)
    way = contextlib.nullcontext()
    if learner.transport is not None:
        way = learner.rule.transporting(model, learner.transport)
    with way:
        F.cross_entropy(model(x), y).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(found[n], p.grad, rtol=1e-9, atol=1e-10)


# --- no host sync ---------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Notes operations that take tensors with values to the device, or from it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_iter((args, kwargs, result)) if isinstance(t, Tensor)]
        if len({t.device for t in tensors if t.ndim}) > 1:
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("task", ["classes", "labels", "a class a token", "a class a pixel"])
@pytest.mark.parametrize("name", RULES)
def test_a_step_waits_for_no_value(name: str, task: str) -> None:
    """On the meta device reading a value (``item``, ``nonzero``, a branch on a tensor) is an error;
    copies from and to the CPU are noted."""
    make, width, x, y, loss = TASKS[task]
    model, x, y = make(width).to("meta"), x.to("meta"), y.to("meta")
    with pretending():  # what is checked at the start and of the first batch may read values
        learner = learner_of(name, model, loss, example=x, task="classes" if y.ndim < 2 else None)
        learner.step(x, y)
    with Copies() as copies:
        learner.step(x, y)
    assert copies.found == []
    for value in (x.sum().item, x.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            value()
