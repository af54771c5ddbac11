"""Held activations grow with the horizon, not with the depth: in bytes that autograd saves."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.saved import peak_saved_bytes
from torch import nn

import svdalign as sva
from svdalign.lab.costs import step_memory

DEPTHS = (4, 8, 16, 32)
WIDTH, BATCH = 32, 64


def perceptron(depth: int) -> nn.Module:
    layers = [m for _ in range(depth) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return sva.factorize(nn.Sequential(*layers, nn.Linear(WIDTH, 4)), 8)


def convnet(depth: int) -> nn.Module:
    layers = [
        m
        for _ in range(depth)
        for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return sva.factorize(nn.Sequential(*layers, *head), 8, "spatial")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.body(x))


def resnet(depth: int) -> nn.Module:
    blocks = [Residual() for _ in range(depth)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(*blocks, *head)


NETS = {"perceptron": perceptron, "convnet": convnet, "resnet": resnet}
EXITS = {"perceptron": nn.ReLU, "convnet": nn.ReLU, "resnet": Residual}


def held(name: str, depth: int, rule: str, horizon: int | None) -> int:
    torch.manual_seed(0)
    model = NETS[name](depth)
    x = torch.randn(BATCH, WIDTH) if name == "perceptron" else torch.randn(16, 8, 8, 8)
    y = torch.arange(len(x)) % 4
    learner = sva.Learner(
        model,
        rule,
        units=lambda path, module: isinstance(module, EXITS[name]),
        horizon=horizon,
        optimizer=lambda p: torch.optim.SGD(p, 0.01),
        example=x,
    )
    everything = [*model.parameters(), *learner.feedback.parameters(), *learner.feedback.buffers()]
    return peak_saved_bytes(lambda: learner.backward(x, y), everything)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("rule", ["ssa", "dfa"])
def test_a_horizon_of_zero_holds_the_same_at_every_depth(name: str, rule: str) -> None:
    bytes_held = [held(name, depth, rule, 0) for depth in DEPTHS]
    assert bytes_held == [bytes_held[0]] * len(DEPTHS)
    assert bytes_held[0] > 0


@pytest.mark.parametrize("name", NETS)
def test_a_horizon_holds_so_many_more_units_and_no_more(name: str) -> None:
    by_horizon = [held(name, 16, "ssa", h) for h in (0, 1, 2, 3)]
    assert [held(name, 32, "ssa", h) for h in (0, 1, 2, 3)] == by_horizon
    steps = [b - a for a, b in itertools.pairwise(by_horizon)]
    assert steps[1] == steps[2] > 0  # every further unit adds the same
    assert by_horizon[3] <= 4 * by_horizon[0]


@pytest.mark.parametrize("name", NETS)
def test_backpropagation_holds_the_depth(name: str) -> None:
    bytes_held = [held(name, depth, "bp", None) for depth in DEPTHS]
    per_unit = (bytes_held[-1] - bytes_held[0]) / (DEPTHS[-1] - DEPTHS[0])
    assert per_unit > 0
    for depth, held_now in zip(DEPTHS, bytes_held, strict=True):
        assert held_now == pytest.approx(bytes_held[0] + per_unit * (depth - DEPTHS[0]), rel=0.02)
    assert held(name, 32, "dfa", 0) < bytes_held[-1] / 10


@pytest.mark.parametrize("rule", ["ssa", "dfa"])
def test_live_tensors_at_the_peak_do_not_grow_with_depth(rule: str) -> None:
    """Not only what autograd saves: nothing of a unit may outlive it."""

    def peak(depth: int) -> int:
        units = [
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            for _ in range(depth)
        ]
        model = nn.Sequential(*units, nn.Flatten(), nn.Linear(8 * 64, 4))
        x, y = torch.randn(16, 8, 8, 8), torch.arange(16) % 4
        learner = sva.Learner(
            model, rule, units="layer", optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x
        )
        learner.step(x, y)
        memory = step_memory(
            lambda: learner.step(x, y), [model, learner.feedback], learner.optimizer, [x, y]
        )
        return memory.activations

    one_map = 16 * 8 * 8 * 8 * 4
    assert peak(12) - peak(4) < one_map
