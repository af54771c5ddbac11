"""Rasters and spreads of maps, against torch's own pooling and standard deviation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from svdalign._map_statistics import grid_means, grid_means_and_spread, spread
from svdalign._parts import CHUNK
from svdalign.lab.costs import LiveTensors


@pytest.mark.parametrize("channels_last", [False, True])
@settings(deadline=None, max_examples=20)
@given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 3),
    height=st.integers(2, 7),
    width=st.integers(2, 7),
    data=st.data(),
)
def test_values_and_gradients_are_torchs(
    channels_last: bool, batch: int, channels: int, height: int, width: int, data: st.DataObject
) -> None:
    size = (data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    h = torch.randn(batch, channels, height, width, dtype=torch.float64)
    if channels_last:
        h = h.to(memory_format=torch.channels_last)
    h.requires_grad_()
    found = grid_means_and_spread(h, size, h.dtype)
    wanted = (F.adaptive_avg_pool2d(h, size), h.std((2, 3), correction=0))
    weights = [torch.randn_like(t) for t in wanted]
    for ours, torchs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, torchs)
    grads = [
        torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, outputs, strict=True)), h)[0]
        for outputs in (found, wanted)
    ]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(grid_means(h, size, h.dtype), found[0])
    torch.testing.assert_close(spread(h), found[1])
    if channels_last:
        assert grads[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("which", [0, 1])
def test_either_reading_can_be_used_alone(which: int) -> None:
    h = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    alone = (grid_means(h, (2, 2), h.dtype), spread(h))[which]
    both = grid_means_and_spread(h, (2, 2), h.dtype)[which]
    grads = [torch.autograd.grad(t.square().sum(), h)[0] for t in (alone, both)]
    torch.testing.assert_close(*grads)


def test_parts_of_any_size_give_the_same(monkeypatch) -> None:
    h = torch.randn(7, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    found = []
    for chunk in (1, 70, 10**9):
        monkeypatch.setitem(CHUNK, "cpu", chunk)
        pooled, deviation = grid_means_and_spread(h, (2, 3), h.dtype)
        loss = pooled.square().sum() + deviation.square().sum()
        found.append((pooled, deviation, torch.autograd.grad(loss, h)[0]))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_a_constant_channel_has_no_gradient() -> None:
    h = torch.ones(2, 3, 4, 4, requires_grad=True)
    spread(h).sum().backward()
    assert h.grad is not None
    assert h.grad.eq(0).all()


def test_half_precision_is_read_in_single_and_taught_in_its_own() -> None:
    h = torch.randn(2, 3, 4, 4).to(torch.bfloat16).requires_grad_()
    pooled, deviation = grid_means_and_spread(h, (2, 2), torch.float32)
    assert (pooled.dtype, deviation.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(deviation, h.detach().float().std((2, 3), correction=0))
    (pooled.sum() + deviation.sum()).backward()
    assert h.grad is not None
    assert h.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean", [1, 20, 100])
def test_a_mean_far_from_zero_does_not_turn_the_gradient_in_half_precision(
    mean: int, dtype: torch.dtype, both: bool
) -> None:
    h = (mean + torch.randn(4, 3, 16, 16)).to(dtype).requires_grad_()
    weights = torch.rand(4, 3)
    exact = h.detach().double().requires_grad_()
    (exact.std((2, 3), correction=0) * weights).sum().backward()
    pooled, deviation = grid_means_and_spread(h, (2, 2), torch.float32)
    ours = (deviation * weights).sum()
    if both:  # means over a raster, weighted to add to the gradient no more than it is itself
        ours = ours + 1e-2 * pooled.sum()
        (1e-2 * F.adaptive_avg_pool2d(exact, (2, 2)).sum()).backward()
    ours.backward()
    assert h.grad is not None
    difference = (h.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert difference < 2 * torch.finfo(dtype).eps


def test_half_precision_takes_no_more_than_a_part_beside_the_map(monkeypatch) -> None:
    h = torch.randn(32, 8, 16, 16).to(torch.bfloat16).requires_grad_()
    monkeypatch.setitem(CHUNK, "cpu", 8 * 16 * 16)  # a sample at a time
    for read in (spread, lambda h: sum(t.sum() for t in grid_means_and_spread(h, (2, 2), h.dtype))):
        loss = read(h).sum()
        with LiveTensors([h]) as live:
            torch.autograd.grad(loss, h)
        # The map, its gradient, and of one sample of 32 a few values in single precision.
        assert live.peak < 2.5 * h.nbytes
