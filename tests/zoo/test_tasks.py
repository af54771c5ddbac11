"""Tasks beyond one class a sample: the loss is a callable, targets are what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.zoo.nets import GPT, UNet
from torch import Tensor, nn

import svdalign as sva
from svdalign import rules
from svdalign.rules import SSA, Supervision, UnitSpec

Loss = Callable[[Tensor, Tensor], Tensor]
RULES = ["ssa", SSA(horizon=2), "ssa-reconstruction", "dfa", "drtp"]
B = 32


def convnet(outputs: int, *tail: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(64, outputs), *tail,
    )  # fmt: skip


def several_labels(x: Tensor, y: Tensor) -> tuple[nn.Module, Tensor, Tensor, Loss]:
    both = torch.maximum(F.one_hot(y, 10), F.one_hot(y.flip(0), 10)).float()
    return (
        convnet(10),
        torch.maximum(x, x.flip(0)),
        both,
        F.binary_cross_entropy_with_logits,
    )


def brightness(x: Tensor, y: Tensor) -> tuple[nn.Module, Tensor, Tensor, Loss]:
    shift = torch.linspace(-1, 1, len(x))[torch.randperm(len(x))]
    return convnet(1), x + shift[:, None, None, None], shift[:, None], F.mse_loss


def brightness_flat(x: Tensor, y: Tensor) -> tuple[nn.Module, Tensor, Tensor, Loss]:
    net, x, shift, loss = brightness(x, y)
    return nn.Sequential(*net, nn.Flatten(0)), x, shift.flatten(), loss


def masks(x: Tensor, y: Tensor) -> tuple[nn.Module, Tensor, Tensor, Loss]:
    return UNet(4, 1), x, (x > 0).float(), F.binary_cross_entropy_with_logits


def letters(x: Tensor, y: Tensor) -> tuple[nn.Module, Tensor, Tensor, Loss]:
    text = (torch.arange(8)[:, None] * 5 + torch.arange(13) * 3) % 20
    net = GPT(20, 16, 2, 12, tied=False)
    return (
        net,
        text[:, :-1],
        text[:, 1:],
        lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()),
    )


def soft_labels(x: Tensor, y: Tensor) -> tuple[nn.Module, Tensor, Tensor, Loss]:
    mixed = 0.7 * F.one_hot(y, 10).float() + 0.3 * F.one_hot(y.flip(0), 10).float()
    return convnet(10), 0.7 * x + 0.3 * x.flip(0), mixed, F.cross_entropy


TASKS = [several_labels, brightness, brightness_flat, masks, letters, soft_labels]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_a_custom_loss_is_learned(
    task: Callable[..., tuple[nn.Module, Tensor, Tensor, Loss]],
    rule: str,
    fashion: tuple[Tensor, Tensor],
) -> None:
    net, x, y, loss = task(fashion[0][:B], fashion[1][:B])
    model = sva.factorize(net, 0.5)
    learner = sva.Learner(
        model, rule, optimizer=lambda p: torch.optim.AdamW(p, 5e-3), example=x, loss=loss
    )
    gradients = learner.gradients(x, y)
    for name, _ in model.named_parameters():
        assert gradients[name].abs().max() > 0, name
    losses = [float(learner.step(x, y).loss) for _ in range(30 if task is masks else 15)]
    # A head on features that move under it may lose ground before it gains some.
    assert losses[-1] < 0.97 * max(losses)
    if rule == "ssa":
        assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("task", TASKS)
def test_the_error_is_the_losss_gradient(
    task: Callable[..., tuple[nn.Module, Tensor, Tensor, Loss]], fashion: tuple[Tensor, Tensor]
) -> None:
    """``e = dL/dz`` for whatever ``L``, and the signal at an exit is ``P^T B e``."""
    net, x, y, loss = task(fashion[0][:B], fashion[1][:B])
    seen: list[tuple[UnitSpec, nn.Module, Tensor, Supervision]] = []

    class Watched(SSA):
        def loss(
            self, unit: UnitSpec, feedback: nn.Module | None, h: Tensor, supervision: Supervision
        ) -> tuple[Tensor, ...]:
            assert feedback is not None
            seen.append((unit, feedback, h, supervision))
            return super().loss(unit, feedback, h, supervision)

    rule = Watched(name="watched", error="output", alpha=0.0)
    learner = sva.Learner(
        net, rule, optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x, loss=loss
    )
    torch.manual_seed(2)
    learner.gradients(x, y)
    torch.manual_seed(2)
    z = net(x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(loss(z, y), z)
    assert seen
    for unit, feedback, h, supervision in list(seen):
        torch.testing.assert_close(supervision.error, expected)
        h = h.detach().requires_grad_()
        (delta,) = torch.autograd.grad(rule.loss(unit, feedback, h, supervision), h)
        rows = unit.pool(h, rule.grid)
        if rows.shape[:-1] != expected.shape[:-1]:
            continue  # pixels at another resolution: the transpose of interpolation stands between
        (by_hand,) = torch.autograd.grad(rows, h, feedback.project(expected))
        torch.testing.assert_close(delta, by_hand)


def test_similarity_is_for_one_class_a_sample(fashion: tuple[Tensor, Tensor]) -> None:
    """It compares samples by class. Real and several labels leave it out; probabilities do not."""
    for task, used in ((several_labels, False), (brightness, False), (soft_labels, True)):
        net, x, y, loss = task(fashion[0][:B], fashion[1][:B])
        losses = []
        for alpha in (0.0, 4.0):
            rule = replace(rules.get("ssa"), alpha=alpha)
            learner = sva.Learner(
                net, rule, optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x, loss=loss
            )
            with torch.random.fork_rng():
                losses.append(learner.backward(x, y).unit_losses[learner.units[0].name])
        assert (losses[0] != losses[1]) == used


def test_a_large_vocabulary_keeps_its_feedback_small() -> None:
    """B of d x C is held as factors of rank k: (d + C + 1) k numbers, k at most 64 by default."""
    unit = UnitSpec("u", (2, 8, 1024), (2, 8, 50_000), ())
    generator = torch.Generator().manual_seed(0)
    for rule, k in ((rules.get("ssa"), 64), (replace(rules.get("ssa"), feedback_rank=8), 8)):
        feedback = rule.feedback(unit, generator)
        assert sum(p.numel() for p in feedback.parameters()) == (1024 + 50_000 + 1) * k


def test_default_loss_on_token_logits_is_refused_with_what_to_write() -> None:
    net = GPT(20, 16, 2, 12, tied=False)
    tokens = torch.randint(0, 20, (4, 12))
    learner = sva.Learner(net, optimizer=lambda p: torch.optim.SGD(p, 0.1), example=tokens)
    with pytest.raises(ValueError, match=r"loss=lambda z, y: .*z\.flatten\(0, 1\)"):
        learner.step(tokens, tokens)


def test_targets_that_are_not_of_the_outputs_layout_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(6, 4)
    learner = sva.Learner(
        net, "drtp", optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x,
        loss=lambda z, y: F.mse_loss(z.sum(1), y.sum(1)),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"targets of shape \(6, 5\) are not of the layout"):
        learner.step(x, torch.randn(6, 5))
