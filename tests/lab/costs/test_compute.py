"""Counts against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from svdalign import factorize
from svdalign.lab.costs import inference_macs, macs_by_module, parameter_count, step_macs


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_macs_of_a_convolution(stride: int, padding: int) -> None:
    conv = nn.Conv2d(3, 8, (3, 5), stride=stride, padding=padding)
    x = torch.randn(4, 3, 12, 10)
    positions = conv(x).shape[2] * conv(x).shape[3]
    assert inference_macs(conv, x) == positions * 8 * 3 * 3 * 5


def test_macs_of_a_linear_layer() -> None:
    assert inference_macs(nn.Linear(30, 7), torch.randn(5, 30)) == 30 * 7


def test_macs_by_module_add_up() -> None:
    inner = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    net = nn.Sequential(inner, nn.Linear(4, 3))
    macs = macs_by_module(net, torch.randn(2, 6))
    assert macs["0.0"] == 30
    assert macs["0.2"] == 20
    assert macs["0"] == 50
    assert macs["1"] == 12
    assert macs[""] == 62


def test_factored_macs_and_parameters_are_those_of_the_two_factors() -> None:
    net = nn.Sequential(nn.Linear(40, 30, bias=False), nn.ReLU(), nn.Linear(30, 10, bias=False))
    factored = factorize(net, {"0": 4})
    assert parameter_count(factored) == 4 * (40 + 30 + 1) + 300
    assert inference_macs(factored, torch.randn(2, 40)) == 4 * (40 + 30) + 300


def test_a_shared_parameter_counts_once() -> None:
    layer = nn.Linear(5, 5)
    assert parameter_count(nn.Sequential(layer, nn.ReLU(), layer)) == 30


def test_counting_leaves_the_model_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    net[2].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    inference_macs(net, torch.randn(2, 1, 5, 5))
    assert [m.training for m in net.modules()] == [True, True, True, False]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_macs_of_a_training_step_are_three_inferences_less_the_gradient_of_the_input() -> None:
    """Forward, gradient of the weight, gradient of the input: the first layer has no use for the
    last. Source: the closed form of each is m n a sample."""
    net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))
    x = torch.randn(8, 40)
    assert step_macs(lambda: net(x).sum().backward()) == 8 * (2 * 40 * 30 + 3 * 30 * 10)


def test_macs_of_a_convolutions_training_step() -> None:
    conv = nn.Conv2d(3, 8, 3, padding=1)
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    forward = 4 * 36 * 8 * 3 * 9
    assert step_macs(lambda: conv(x).sum().backward()) == 3 * forward
    assert step_macs(lambda: torch.autograd.grad(conv(x).sum(), conv.weight)) == 2 * forward


@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_macs_of_a_grouped_convolutions_training_step(
    kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], groups: int
) -> None:
    """An input channel meets the output channels of its own group alone."""
    conv = kind(6, 12, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(4, 6, 8, 8, requires_grad=True)
    y = conv(x)
    positions = y[0, 0].numel() if kind is nn.Conv2d else x[0, 0].numel()
    forward = 4 * positions * (6 * 12 // groups) * 9
    assert step_macs(lambda: conv(x)) == forward
    assert step_macs(lambda: conv(x).sum().backward()) == 3 * forward
