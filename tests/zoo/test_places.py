"""One answer a place: signals, images, volumes, tokens, with classes where the model has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svdalign as sva
from svdalign.rules import SSA

B, C, N = 3, 5, 6  # samples, classes, places along an axis
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SMOOTH = {1: "linear", 2: "bilinear", 3: "trilinear"}

Loss = Callable[[Tensor, Tensor], Tensor]


def by_place(z: Tensor, y: Tensor) -> Tensor:
    """For classes in the last axis."""
    return F.cross_entropy(z.flatten(0, -2), y.flatten())


def convolutions(axes: int, stride: int = 1) -> nn.Module:
    torch.manual_seed(0)
    conv = CONV[axes]
    return nn.Sequential(
        conv(2, 8, 3, stride, 1), nn.ReLU(), nn.Upsample(scale_factor=stride),
        conv(8, 8, 3, 1, 1), nn.ReLU(), conv(8, C, 1),
    ).double()  # fmt: skip


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, C)
    ).double()


def learner_of(model: nn.Module, x: Tensor, rule="ssa", **options) -> sva.Learner:
    return sva.Learner(
        model, rule, example=x, optimizer=lambda p: torch.optim.SGD(p, 0.05), **options
    )


def batch(axes: int, *, channels_last: bool = False) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    places = [N] * axes
    shape = (B, *places, 2) if channels_last else (B, 2, *places)
    return torch.randn(shape, dtype=torch.float64), torch.randint(0, C, (B, *places))


def matrix_of(learner: sva.Learner, unit: int = 0) -> Tensor:
    feedback = learner.feedback_of(learner.units[unit])
    return feedback.U @ feedback.s.diag() @ feedback.V.mT


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("axes", [2, 3])
def test_a_unit_is_read_out_place_by_place(axes: int, stride: int) -> None:
    """Its loss is the task's on ``z = B^T h``, spread to the output's resolution."""
    model, (x, y) = convolutions(axes, stride), batch(axes)
    rule = SSA(name="plain", horizon=0, alpha=0.0)
    learner = learner_of(model, x, rule, units=["0"])
    report = learner.step(x, y)
    learner = learner_of(model := convolutions(axes, stride), x, rule, units=["0"])
    z = torch.einsum("bc...,ck->bk...", model[0](x), matrix_of(learner))
    z = F.interpolate(z, (N,) * axes, mode=SMOOTH[axes])
    torch.testing.assert_close(report.unit_losses["0"], F.cross_entropy(z, y))


def test_a_signals_classes_are_its_channels() -> None:
    """(B, C, L) is no (B, T, C), though the loss would take it for one as long as L > C."""
    model, (x, y) = convolutions(1), batch(1)
    learner = learner_of(model, x, SSA(name="plain", horizon=0, alpha=0.0), units=["0"])
    z = torch.einsum("bcl,ck->bkl", model[0](x), matrix_of(learner))
    expected = F.cross_entropy(z, y)
    answers = model(x).argmax(1)
    report = learner.step(x, y)
    torch.testing.assert_close(report.unit_losses["0"], expected)
    torch.testing.assert_close(report.accuracy, (answers == y).float().mean())


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_classes_are_where_the_loss_takes_them(axes: int, channels_last: bool) -> None:
    """Also where the last layer is known for another axis, and as many places as classes."""
    x, y = batch(axes, channels_last=channels_last)
    if channels_last:
        model, loss, turned = linear(), by_place, lambda z, y: F.cross_entropy(z.movedim(-1, 1), y)
    else:
        model, loss = convolutions(axes), F.cross_entropy

        def turned(z: Tensor, y: Tensor) -> Tensor:
            return by_place(z.movedim(1, -1), y)

    for each in (
        loss,
        turned,
        nn.CrossEntropyLoss(torch.ones(C).double()) if not channels_last else loss,
    ):
        learner = learner_of(model, x, "bp", loss=each)
        right = model(x).argmax(-1 if channels_last else 1) == y
        torch.testing.assert_close(learner.step(x, y).accuracy, right.float().mean())


def test_the_loss_settles_what_the_layers_leave_open() -> None:
    """The output's last layer has its channels in axis 1 and the model turns them."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convolutions(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).mT[:, :C]  # as many places as classes

    model, (x, y) = Turned(), batch(1)
    y = y[:, :C]
    right = model(x).argmax(-1) == y
    learner = learner_of(model, x, "bp", loss=by_place)
    torch.testing.assert_close(learner.step(x, y).accuracy, right.float().mean())


@pytest.mark.parametrize("rule", sva.rules.available())
@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("targets", ["indices", "probabilities", "labels", "numbers"])
def test_signals_and_volumes_are_learned(axes: int, rule: str, targets: str) -> None:
    """By every rule; without a horizon the gradients are autograd's."""
    model, (x, y) = convolutions(axes, 2), batch(axes)
    loss: Loss = F.cross_entropy
    if targets == "probabilities":
        y = torch.rand(B, C, *[N] * axes).double().softmax(1)
    elif targets == "labels":
        y, loss = (torch.rand(B, C, *[N] * axes) > 0.5).double(), F.binary_cross_entropy_with_logits
    elif targets == "numbers":
        y, loss = torch.randn(B, C, *[N] * axes).double(), F.mse_loss
    learner = learner_of(model, x, rule, loss=loss)
    expected = loss(model(x), y)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    gradients = learner.gradients(x, y)
    for (name, _), wanted in zip(model.named_parameters(), expected_gradients, strict=True):
        assert gradients[name].abs().max() > 0, name
        if rule == "bp":
            torch.testing.assert_close(gradients[name], wanted)
    torch.testing.assert_close(learner.step(x, y).loss, expected)
