"""The pooling ``P``: linear, with the size it announces, and averages of what it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from svdalign.feedback import pool, pooled_size

EXACT = {"rtol": 0.0, "atol": 1e-10}

small = st.integers(1, 6)
grids = st.one_of(st.none(), st.integers(1, 4))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a unit's features and of the network's output."""
    batch, classes = draw(small), draw(small)
    kind = draw(st.sampled_from(["flat", "map", "pixels", "tokens", "pooled tokens"]))
    if kind == "flat":
        return (batch, draw(small)), (batch, classes)
    if kind == "map":
        return (batch, draw(small), draw(small), draw(small)), (batch, classes)
    if kind == "pixels":
        return (batch, draw(small), draw(small), draw(small)), (batch, classes, 8, 8)
    tokens = draw(small)
    output = (batch, tokens, classes) if kind == "tokens" else (batch, classes)
    return (batch, tokens, draw(small)), output


@given(layout=layouts(), grid=grids)
def test_the_announced_size_is_the_last_dimension(layout, grid) -> None:
    shape, output = layout
    assert pool(torch.zeros(shape), grid, output).shape[-1] == pooled_size(shape, grid, output)


@given(layout=layouts(), grid=grids)
def test_rows_line_up_with_the_networks_answers(layout, grid) -> None:
    shape, output = layout
    rows = pool(torch.zeros(shape), grid, output).shape[:-1]
    if len(output) == 2:
        assert rows == output[:1]
    elif len(output) == 3:
        assert rows == output[:2]
    else:
        assert rows == (shape[0], *shape[2:])


@given(layout=layouts(), grid=grids, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_is_linear(layout, grid, a, b) -> None:
    shape, output = layout
    x, y = torch.randn(shape).double(), torch.randn(shape).double()
    together = pool(a * x + b * y, grid, output)
    apart = a * pool(x, grid, output) + b * pool(y, grid, output)
    torch.testing.assert_close(together, apart, **EXACT)


@given(layout=layouts(), grid=grids)
def test_autograd_gives_its_transpose(layout, grid) -> None:
    shape, output = layout
    h = torch.randn(shape).double().requires_grad_()
    p = pool(h, grid, output)
    q, x = torch.randn_like(p), torch.randn(shape).double()
    (transposed,) = torch.autograd.grad(p, h, q)
    torch.testing.assert_close((pool(x, grid, output) * q).sum(), (x * transposed).sum())


def test_a_map_is_averaged_over_the_cells_of_a_raster() -> None:
    h = torch.randn(2, 3, 4, 6).double()
    expected = torch.empty(2, 3, 2, 2).double()
    for i in range(2):
        for j in range(2):
            cell = h[:, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
            expected[:, :, i, j] = cell.reshape(2, 3, -1).mean(-1)
    torch.testing.assert_close(pool(h, 2, (2, 10)), expected.reshape(2, 12), **EXACT)
    torch.testing.assert_close(pool(h, 1, (2, 10)), h.reshape(2, 3, -1).mean(-1), **EXACT)


def test_without_a_grid_every_position_has_its_own_row() -> None:
    h = torch.randn(2, 3, 4, 5)
    assert torch.equal(pool(h, None, (2, 10)), h.reshape(2, 60))


def test_a_grid_finer_than_the_map_keeps_the_map() -> None:
    h = torch.randn(2, 3, 2, 1).double()
    torch.testing.assert_close(pool(h, 4, (2, 10)), h.reshape(2, 6), **EXACT)


def test_a_map_of_another_size_is_laid_onto_the_same_raster() -> None:
    """Each cell averages the positions that it overlaps, those of a smaller map repeated."""
    like, output = (2, 3, 8, 8), (2, 10)
    h = torch.randn(2, 3, 2, 2).double().requires_grad_()
    p = pool(h, 4, output, like=like)
    repeated = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(p, repeated.flatten(1), **EXACT)
    q = torch.randn_like(p)
    wanted, found = (torch.autograd.grad(y, h, q)[0] for y in (repeated.flatten(1), p))
    torch.testing.assert_close(found, wanted, **EXACT)
    large = torch.randn(2, 3, 16, 12).double()
    for shape in (like, (2, 3, 1, 1), (2, 3, 2, 5)):
        pooled = pool(large, 4, output, like=shape)
        assert pooled.shape[-1] == pooled_size(shape, 4, output)
        torch.testing.assert_close(
            pooled, F.adaptive_avg_pool2d(large, [min(4, n) for n in shape[2:]]).flatten(1), **EXACT
        )


@pytest.mark.parametrize("tokens", [1, 5])
def test_tokens_are_averaged_unless_the_answer_is_per_token(tokens: int) -> None:
    h: Tensor = torch.randn(2, tokens, 3)
    torch.testing.assert_close(pool(h, None, (2, 10)), h.sum(1) / tokens)
    assert torch.equal(pool(h, None, (2, tokens, 10)), h)


def test_pixels_come_channels_last() -> None:
    h = torch.randn(2, 3, 4, 5)
    pooled = pool(h, 2, (2, 10, 8, 8))
    assert torch.equal(pooled[1, 2, 3], h[1, :, 2, 3])
