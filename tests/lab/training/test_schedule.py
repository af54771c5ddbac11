from __future__ import annotations

import math

import pytest

from svdalign.lab.training.schedule import learning_rate_factor

KINDS = ["one-cycle", "cosine", "constant"]


def curve(kind: str, total: int, warmup: float) -> list[float]:
    return [learning_rate_factor(kind, step, total, warmup) for step in range(total)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.25, 1.0])
def test_every_step_counts_and_none_is_above_the_peak(kind: str, total: int, warmup: float) -> None:
    assert all(0 < factor <= 1 for factor in curve(kind, total, warmup))


@pytest.mark.parametrize("kind", KINDS)
def test_rises_linearly_to_the_peak(kind: str) -> None:
    rates = curve(kind, 100, 0.1)
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0


def test_shapes_after_the_peak() -> None:
    assert curve("constant", 100, 0.1)[10:] == [1.0] * 90
    assert curve("one-cycle", 100, 0.0) == pytest.approx([1 - i / 100 for i in range(100)])
    halfway = [0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(100)]
    assert curve("cosine", 100, 0.0) == pytest.approx(halfway)
