"""A readout through a convolution, against its definition written out."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import svdalign as sva
from svdalign import _parts
from svdalign.feedback import StructuredFeedback, WidenedFeedback
from svdalign.lab.costs import LiveTensors
from svdalign.rules import SSA

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def make(shape=(3, 6, 6), classes=4, *, wide=7, grid=3, learn=True) -> WidenedFeedback:
    return WidenedFeedback(
        shape, classes, wide=wide, grid=grid, rank=None, learn=learn,
        generator=torch.Generator().manual_seed(0),
    ).double()  # fmt: skip


def by_definition(feedback: WidenedFeedback, p: Tensor, grid: int) -> Tensor:
    """Position by position: each of the raster's cells averages rectified products of kernels and
    patches."""
    C, h, w = feedback.shape
    patches = F.unfold(p.reshape(-1, C, h, w), 3, padding=1)  # (B, 9 C, h w)
    wide = (feedback.K.flatten(1) @ patches).clamp_min(0).unflatten(-1, (h, w))
    rows, columns = (cells(n, grid) for n in (h, w))
    means = [wide[:, :, r, c].mean((2, 3)) for r in rows for c in columns]
    B = feedback.matrix.U @ torch.diag(feedback.matrix.s) @ feedback.matrix.V.T
    return torch.stack(means, -1).flatten(1) @ B


def cells(n: int, grid: int) -> list[slice]:
    """n positions in at most ``grid`` cells; they overlap where they do not divide."""
    k = min(n, grid)
    return [slice(i * n // k, -(-(i + 1) * n // k)) for i in range(k)]


@settings(max_examples=20)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    wide=st.integers(1, 8), grid=st.integers(1, 4), held=st.sampled_from([0, 1 << 20]),
)  # fmt: skip
def test_readout_and_its_gradients_are_the_definitions(shape, wide, grid, held: int) -> None:
    with mock.patch.object(_parts, "HELD", held):
        check_readout(shape, wide, grid)


def check_readout(shape: tuple[int, int, int], wide: int, grid: int) -> None:
    feedback = make(shape, wide=wide, grid=grid)
    p = torch.randn(2, shape[0] * shape[1] * shape[2]).double().requires_grad_()
    e = torch.randn(2, 4).double()
    wanted = by_definition(feedback, p, grid)
    z = feedback.readout(p)
    torch.testing.assert_close(z, wanted, **EXACT)
    inputs = [p, *feedback.parameters()]
    expected = torch.autograd.grad((wanted * e).sum(), inputs)
    for _ in range(2):  # within a horizon a unit goes backward more than once
        found = torch.autograd.grad((z * e).sum(), inputs, retain_graph=True)
        torch.testing.assert_close(found, expected, **EXACT)


def test_only_the_narrow_map_is_held(monkeypatch) -> None:
    monkeypatch.setattr(_parts, "HELD", 0)
    feedback = make((2, 16, 16), wide=64, grid=4).float()
    p = torch.randn(8, 2 * 16 * 16, requires_grad=True)
    with LiveTensors([p, *feedback.parameters()]) as live:
        before = live.live
        z = feedback.readout(p)
        held = live.live - before
    assert z.requires_grad
    assert held < p.numel() * 4  # the wide map is 32 times as large


def test_no_more_is_made_at_a_time_than_the_map_that_is_held(monkeypatch) -> None:
    monkeypatch.setattr(_parts, "HELD", 0)
    feedback = make((2, 16, 16), wide=64, grid=4).float()
    p = torch.randn(64, 2 * 16 * 16, requires_grad=True)
    z = feedback.readout(p)
    with LiveTensors([p, *feedback.parameters()]) as live:
        before = live.live
        torch.autograd.grad(z.sum(), [p, *feedback.parameters()])
    assert live.peak - before < 5 * p.numel() * 4  # all at once would make 32 times p, twice


def test_fixed_feedback_has_no_parameters() -> None:
    assert not list(make(learn=False).parameters())
    assert set(make(learn=False).state_dict()) == set(make(learn=True).state_dict())


def net() -> nn.Sequential:
    """Maps of 4, 4 and 16 channels, then a vector."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 12), nn.ReLU(),
        nn.Linear(12, 3),
    ).double()  # fmt: skip


def learner(model: nn.Module, rule: SSA) -> sva.Learner:
    return sva.Learner(
        model, rule, optimizer=lambda p: torch.optim.SGD(p, 0.05),
        example=torch.randn(5, 2, 6, 6).double(),
    )  # fmt: skip


def test_maps_with_fewer_channels_are_widened_and_nothing_else() -> None:
    L = learner(net(), SSA(widen=8))
    found = [L.feedback_of(unit) for unit in L.units[:-1]]
    kinds = [WidenedFeedback, WidenedFeedback, StructuredFeedback, StructuredFeedback]
    assert [type(feedback) for feedback in found] == kinds
    assert [feedback.K.shape for feedback in found[:2]] == [(8, 4, 3, 3)] * 2
    assert found[0].matrix.U.shape[0] == 8 * 4 * 4  # a raster of 4 x 4, however wide


def test_pixels_are_read_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
    L = learner(model, SSA(widen=8))
    assert type(L.feedback_of(L.units[0])) is StructuredFeedback


@pytest.mark.parametrize("horizon", [0, 1, 2])
def test_gradients_are_those_of_the_units_within_reach(horizon: int) -> None:
    """Of what follows, a unit hears the losses of ``horizon`` units more, through the network."""
    model = net()
    L = learner(model, SSA(widen=8, alpha=0.0, horizon=horizon))
    x, y = torch.randn(5, 2, 6, 6).double(), torch.randint(3, (5,))
    L.backward(x, y)
    h, losses, weights = x, [], []
    for i, layers in enumerate((model[:2], model[2:4], model[4:6], model[6:9], model[9:])):
        h = layers(h)
        weights.append(next(layers.parameters()))
        z = h
        if i < 4:
            feedback = L.feedback_of(L.units[i])
            p = h if h.ndim == 2 else F.adaptive_avg_pool2d(h, 6 if i < 2 else 4).flatten(1)
            wide = isinstance(feedback, WidenedFeedback)
            z = by_definition(feedback, p, 4) if wide else feedback.readout(p)
        losses.append(F.cross_entropy(z, y))
    for i, weight in enumerate(weights):
        reached = torch.stack(losses[i : i + horizon + 1]).sum()
        (expected,) = torch.autograd.grad(reached, weight, retain_graph=True)
        torch.testing.assert_close(weight.grad, expected, **EXACT)
    K = L.feedback_of(L.units[0]).K
    (expected,) = torch.autograd.grad(losses[0], K)
    torch.testing.assert_close(K.grad, expected, **EXACT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widen": 0}, "widen must be a whole number of at least 1 or None, got 0"),
        ({"widen": 1.5}, "widen must be .*got 1.5"),
        ({"widen": True}, "widen must be .*got True"),
        ({"widen": 8, "alignment": "share"}, "alignment 'share' .*widen must be None, got 8"),
        ({"widen": 8, "alignment": "cosine"}, "alignment 'cosine' .*widen must be None, got 8"),
        ({"widen": 8, "grid": None}, "widen needs a grid.*got None"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSA(**fields)
