"""What is worked out without running agrees with what is measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import svdalign as sva
from svdalign.lab import models
from svdalign.lab.costs import Memory, pretending, step_macs, step_memory


def step_of(rule: str, horizon: int | None, optimizer: type[torch.optim.Optimizer]):
    net = sva.factorize(models.build("vgg8", num_classes=5, width=0.125), 0.25)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    learner = sva.Learner(
        net,
        rule,
        units="layer",
        horizon=horizon,
        optimizer=lambda parameters: optimizer(parameters, lr=1e-3),
        example=x,
    )

    def step() -> None:
        learner.step(x, y)

    step()
    memory = step_memory(step, [net, learner.feedback], learner.optimizer, [x, y])
    return memory, step_macs(step)


@pytest.mark.parametrize(
    ("rule", "horizon", "optimizer"),
    [
        ("bp", None, torch.optim.AdamW),
        ("dfa", 0, torch.optim.AdamW),
        ("ssa", 0, torch.optim.SGD),
        ("ssa", 2, torch.optim.AdamW),
    ],
)
def test_estimate_and_measurement_agree(rule: str, horizon: int | None, optimizer) -> None:
    measured, macs = step_of(rule, horizon, optimizer)
    with pretending():
        estimate, estimated_macs = step_of(rule, horizon, optimizer)
    assert estimate.peak == pytest.approx(measured.peak, rel=0.05)
    assert estimate.activations == pytest.approx(measured.activations, rel=0.05)
    assert (estimate.parameters, estimate.optimizer) == (measured.parameters, measured.optimizer)
    assert estimated_macs == macs


@pytest.mark.parametrize("horizon", [None, 1])
def test_they_agree_on_attention(horizon: int | None) -> None:
    def measure() -> tuple[Memory, int]:
        net = models.build("vit_b16", num_classes=5, image_size=48, width=1 / 12)
        del net.get_submodule("blocks")[2:]
        x, y = torch.randn(4, 3, 48, 48), torch.arange(4)
        learner = sva.Learner(
            net,
            "bp" if horizon is None else "ssa",
            horizon=horizon,
            optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-3),
            example=x,
        )

        def step() -> None:
            learner.step(x, y)

        step()
        memory = step_memory(step, [net, learner.feedback], learner.optimizer, [x, y])
        return memory, step_macs(step)

    measured, macs = measure()
    with pretending():
        estimate, estimated_macs = measure()
    assert estimate.peak == pytest.approx(measured.peak, rel=0.05)
    assert estimated_macs == macs


def test_nothing_is_allocated() -> None:
    with pretending():
        net = nn.Linear(10**6, 10**6)  # 4 TB
        out = net(torch.randn(1, 10**6))
        assert out.shape == (1, 10**6)
        assert bool(torch.isfinite(out).all())
        assert torch.randn(3, generator=torch.Generator()).sum().item() == 1.0
    assert torch.ones(1).device.type == "cpu"


def test_memory_adds_up() -> None:
    assert Memory(10, 4, 3, 2).activations == 1
