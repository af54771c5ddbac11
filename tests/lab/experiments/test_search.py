from __future__ import annotations

import math

import pytest

from svdalign.lab.experiments.search import at_edge, best, search


def peaked(at: float, calls: list[float] | None = None):  # type: ignore[no-untyped-def]
    def accuracy(rate: float) -> float:
        if calls is not None:
            calls.append(rate)
        return 1 / (1 + math.log(rate / at) ** 2)

    return accuracy


def test_the_best_at_the_edge_is_no_result() -> None:
    assert at_edge({0.1: 0.5, 0.2: 0.6, 0.4: 0.7})
    assert at_edge({0.1: 0.8, 0.2: 0.6, 0.4: 0.7})
    assert at_edge({0.1: 0.8})
    with pytest.raises(ValueError, match=r"best rate, 0.4, lies at the edge of its search \(0.1"):
        best({0.1: 0.5, 0.2: 0.6, 0.4: 0.7})


def test_the_best_inside_is_one() -> None:
    found = {0.4: 0.5, 0.1: 0.5, 0.2: 0.6}
    assert not at_edge(found)
    assert best(found) == 0.2


@pytest.mark.parametrize("at", [0.03, 0.11, 1.3])
def test_goes_on_beyond_the_edge_until_the_best_lies_inside(at: float) -> None:
    calls: list[float] = []
    found = search(peaked(at, calls), (0.1, 0.2), tries=8)
    assert calls[:2] == [0.1, 0.2]
    assert len(calls) == len(set(calls)) == len(found) == 8
    assert best(found) == pytest.approx(at, rel=0.4)


def test_every_search_takes_as_many_tries_and_may_fail() -> None:
    found = search(peaked(100.0), (0.1, 0.2), tries=4)
    assert sorted(found) == [0.1, 0.2, 0.4, 0.8]
    assert at_edge(found)


def test_what_diverges_counts_as_nothing() -> None:
    found = search(lambda rate: math.nan if rate > 0.3 else rate, (0.1, 0.2), tries=4)
    assert found[0.4] == 0.0
    assert best(found) == max(rate for rate in found if rate < 0.3)


@pytest.mark.parametrize(
    ("start", "tries", "message"),
    [
        ((0.1, 0.1), 4, "start must be at least two positive rates"),
        ((0.1, -1.0), 4, "start must be at least two positive rates"),
        ((0.1, 0.2, 0.4), 2, "tries must be at least 3, got 2"),
    ],
)
def test_what_cannot_be_searched_is_named(
    start: tuple[float, ...], tries: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        search(peaked(1.0), start, tries)
