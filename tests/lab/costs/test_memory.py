"""Bytes that can be counted by hand: a float32 tensor of n numbers is 4n."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from svdalign.lab.costs import LiveTensors, step_memory, storage_bytes


def test_bytes_appear_and_go() -> None:
    with LiveTensors() as memory:
        a = torch.ones(1000)
        b = a + 1
        assert memory.live == 8000
        del a
        assert memory.live == 4000
        c = b * 2
        del b, c
    assert memory.live == 0
    assert memory.peak == 8000


def test_views_share_their_storage() -> None:
    with LiveTensors() as memory:
        a = torch.ones(10, 100)
        b = a.t()[:50]
        assert memory.live == 4000
        del a
        assert memory.live == 4000  # the view keeps all of it
        del b
        assert memory.live == 0


def test_what_exists_counts_once() -> None:
    a = torch.ones(100)
    with LiveTensors([a, a.view(10, 10)]) as memory:
        a.add_(1)
        assert memory.live == 400
    assert memory.peak == 400


def test_tensors_saved_for_backward_count_until_it_has_run() -> None:
    x = torch.randn(100, requires_grad=True)
    with LiveTensors() as memory:
        y = x.exp().exp().exp()  # exp saves its result
        assert memory.live == 3 * 400
        loss = y.sum()
        del y
        assert memory.live == 3 * 400 + 4
        loss.backward()
        assert memory.live == 400 + 4  # x.grad and the loss
    assert x.grad is not None


def test_peak_is_reported_as_it_grows() -> None:
    peaks: list[int] = []
    with LiveTensors(on_peak=peaks.append):
        a = torch.ones(10)
        del a
        b = torch.ones(5)
        c = torch.ones(20)
        del b, c
    assert peaks == [0, 40, 100]


def test_storage_bytes_counts_a_storage_once() -> None:
    a, b = torch.ones(6), torch.ones(4)
    assert storage_bytes([a, a[:2], b]) == 40


def test_split_of_a_linear_step() -> None:
    net = nn.Linear(50, 20, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    x, y = torch.randn(8, 50), torch.randn(8, 20)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        F.mse_loss(net(x), y).backward()
        optimizer.step()

    step()
    memory = step_memory(step, [net], optimizer, [x, y])
    weight = 4 * 50 * 20
    assert memory.parameters == weight
    assert memory.gradients == weight
    assert memory.optimizer == weight
    # At the least the batch and the output; at most a few temporaries of their sizes besides.
    batch, output = 4 * 8 * 70, 4 * 8 * 20
    assert batch + output <= memory.activations <= batch + 4 * output + 2 * weight
    total = memory.parameters + memory.gradients + memory.optimizer + memory.activations
    assert memory.peak == total


def test_depth_adds_its_activations() -> None:
    """Backpropagation holds every layer's activation: doubling the depth adds as many."""

    def activations(depth: int) -> int:
        layers = [m for _ in range(depth) for m in (nn.Linear(16, 16), nn.Sigmoid())]
        net = nn.Sequential(*layers)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        x = torch.randn(512, 16)

        def step() -> None:
            optimizer.zero_grad()
            net(x).sum().backward()
            optimizer.step()

        return step_memory(step, [net], optimizer, [x]).activations

    one = 4 * 512 * 16
    # Sigmoid saves its output, which is the next layer's input: one map a layer.
    assert abs(activations(16) - activations(8) - 8 * one) < 0.1 * one


def test_gradients_that_autograd_adds_in_place_count_once() -> None:
    # Two branches each bring a gradient of x's size: autograd adds the second into the first.
    x = torch.randn(1000, requires_grad=True)
    y = (x * 2).sum() + (x * 3).sum()
    with LiveTensors([x]) as tracker:
        start = tracker.live
        torch.autograd.grad(y, x)
    # Alive at the peak: the two gradients, not their sum besides, and some scalars.
    assert tracker.peak - start < 2.5 * 4000
