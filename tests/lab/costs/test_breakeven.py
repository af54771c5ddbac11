"""Break-even ranks against counts made product by product, torch's FLOP counter, closed forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from svdalign import factorize
from svdalign.factors import FactoredLayer, SVDConv2d, SVDLinear
from svdalign.lab.costs import (
    Timing,
    factored_calls,
    inference_macs,
    macs_break_even,
    step_macs,
    time_break_even,
    time_ratios,
)

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw: Any) -> tuple[nn.Conv2d, tuple[int, int]]:
    """A convolution and the height and width of a map that it can take."""
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(pairs)
    padding = draw(st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.just("valid")))
    conv = nn.Conv2d(
        draw(st.integers(1, 5)), draw(st.integers(1, 6)), kernel, stride, padding, dilation
    )
    size = tuple(d * (k - 1) + 1 + draw(st.integers(0, 6))
                 for k, d in zip(kernel, dilation, strict=True))  # fmt: skip
    return conv, size


def placements(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Where a window fits on a line, by trying every place."""
    reach = dilation * (kernel - 1)
    return sum(start + reach < size + 2 * padding for start in range(0, size + 2 * padding, stride))


def products(conv: nn.Conv2d, size: tuple[int, int], scheme: str, rank: int | None) -> int:
    """Multiplications of one image: dense, or of the two convolutions of a rank."""
    (H, W), C, N = conv.kernel_size, conv.in_channels, conv.out_channels
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    h, w = (
        placements(*values)
        for values in zip(size, (H, W), conv.stride, padding, conv.dilation, strict=True)
    )
    if rank is None:
        return h * w * N * C * H * W
    if scheme == "channel":
        return h * w * (rank * C * H * W + N * rank)
    return h * size[1] * rank * C * H + h * w * N * rank * W


@given(convolutions(), st.sampled_from(["channel", "spatial"]))
# Padding makes the output wider than the map between: cheap up to full rank and beyond it.
@example((nn.Conv2d(5, 1, 1, padding=3), (2, 1)), "spatial")
@settings(max_examples=60, deadline=None)
def test_break_even_of_a_convolution(case: tuple[nn.Conv2d, tuple[int, int]], scheme: Any) -> None:
    conv, size = case
    x = torch.randn(2, conv.in_channels, *size)
    layer = SVDConv2d.from_dense(conv, 1, scheme)
    found = macs_break_even(layer, x.shape, conv(x).shape)
    ranks = range(1, layer.full_rank + 1)
    dense = products(conv, size, scheme, None)
    assert found == max((r for r in ranks if products(conv, size, scheme, r) <= dense), default=0)
    assert inference_macs(conv, x) == dense
    for rank in {found, found + 1} & set(ranks):
        counted = inference_macs(SVDConv2d.from_dense(conv, rank, scheme), x)
        assert (counted <= dense) == (rank == found)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3))
@settings(deadline=None)
def test_break_even_of_a_linear_layer(m: int, n: int, tokens: int) -> None:
    linear, x = nn.Linear(n, m), torch.randn(2, tokens, n)
    layer = SVDLinear.from_dense(linear, 1)
    found = macs_break_even(layer, x.shape, linear(x).shape)
    assert found == max((r for r in range(1, min(m, n) + 1) if r * (m + n) <= m * n), default=0)
    for rank in {found, found + 1} & set(range(1, min(m, n) + 1)):
        counted = inference_macs(SVDLinear.from_dense(linear, rank), x)
        assert (counted <= inference_macs(linear, x)) == (rank == found)


def test_calls_are_those_of_the_network() -> None:
    shared = nn.Conv2d(6, 6, 3, padding=1)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), shared, nn.MaxPool2d(2), shared)
    model = factorize(net, {"0": 2, "2": 3})
    calls = factored_calls(model, torch.randn(4, 3, 10, 10))
    assert {name: call[1:] for name, call in calls.items()} == {
        "0": ((4, 3, 10, 10), (4, 6, 8, 8), False),  # nothing learns before the first layer
        "2": ((4, 6, 8, 8), (4, 6, 8, 8), True),  # the first of its two calls
    }
    assert all(call.layer is model.get_submodule(name) for name, call in calls.items())
    assert not any(module._forward_hooks for module in model.modules())


# --- by time ------------------------------------------------------------------------------------


@given(
    st.fractions(0, 2),
    st.fractions(Fraction(1, 100), 1),
    st.sets(st.integers(1, 200), min_size=1, max_size=8),
)
def test_a_ratio_that_rises_in_a_straight_line(
    overhead: Fraction, slope: Fraction, ranks: set[int]
) -> None:
    found = time_break_even({rank: overhead + slope * rank for rank in ranks})
    exact = (1 - overhead) // slope
    assert found == (None if exact < min(ranks) else min(exact, max(ranks)))


def test_of_several_break_even_ranks_the_largest_counts() -> None:
    assert time_break_even({8: 0.5, 16: 1.5, 32: 0.75, 64: 1.25}) == 48


LAYERS: list[tuple[FactoredLayer, tuple[int, ...]]] = [
    (SVDLinear.from_dense(nn.Linear(40, 30), 1), (8, 40)),
    (SVDConv2d.from_dense(nn.Conv2d(6, 16, 3, padding=1), 1, "channel"), (2, 6, 7, 7)),
    (SVDConv2d.from_dense(nn.Conv2d(8, 10, 3, (1, 2)), 1, "spatial"), (2, 8, 9, 9)),
]


@pytest.fixture
def macs_for_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks once a multiply-accumulate."""

    def alternate(work: Mapping[str, Callable[[], object]], **options: Any) -> dict[str, Timing]:
        return {name: Timing((float(step_macs(run)),)) for name, run in work.items()}

    monkeypatch.setattr("svdalign.lab.costs.breakeven.alternate", alternate)


@pytest.mark.usefixtures("macs_for_time")
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_were_time_arithmetic_both_break_even_ranks_would_agree(
    layer: FactoredLayer, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    by_macs = macs_break_even(layer, x.shape, layer(x).shape)
    ratios = time_ratios(layer, x, training=False)
    assert max(ratios) == layer.full_rank
    assert min(ratios) < by_macs
    assert time_break_even(ratios) == by_macs
    # Backward takes two products for each of forward, dense or factored.
    again = time_ratios(layer, x.requires_grad_(), training=True)
    assert again == pytest.approx(ratios)


@pytest.mark.usefixtures("macs_for_time")
def test_a_first_layer_has_no_use_for_the_gradient_of_its_input() -> None:
    """Dense: m n forward, m n for the weight. Factored: r (m + n) forward, r m for each of ``U``
    and what lies between, r n for ``V``."""
    m, n = 30, 40
    layer = SVDLinear.from_dense(nn.Linear(n, m), 5)
    ratios = time_ratios(layer.to("meta"), torch.randn(8, n), training=True)
    assert ratios == pytest.approx({r: r * (3 * m + 2 * n) / (2 * m * n) for r in ratios})


def test_ratios_are_of_ranks_up_to_full() -> None:
    layer, x = SVDLinear.from_dense(nn.Linear(96, 96), 1), torch.randn(4, 96)
    for training in (False, True):
        ratios = time_ratios(layer, x, training=training, seconds=0.0)
        assert list(ratios) == [6, 12, 24, 36, 48, 60, 72, 84, 96]
        assert min(ratios.values()) > 0
