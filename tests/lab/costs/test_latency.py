from __future__ import annotations

import time

import pytest

from svdalign.lab.costs import Timing, alternate


def test_every_callable_runs_once_a_round_in_turns() -> None:
    calls: list[str] = []
    work = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = alternate(work, rounds=4, warmup=1)
    assert {name: len(t.seconds) for name, t in times.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca"]


def test_median_and_ratio_ignore_a_stray_round() -> None:
    slow = Timing((2.0, 2.2, 90.0))
    fast = Timing((1.0, 1.0, 1.0))
    assert slow.median == 2.2
    assert slow.ratio(fast) == pytest.approx(2.2)
    assert fast.ratio(fast) == 1.0


def test_stops_early_after_three_rounds() -> None:
    times = alternate({"nap": lambda: time.sleep(0.002)}, rounds=1000, warmup=0, seconds=0.0)
    assert len(times["nap"].seconds) == 3


def test_refuses_no_rounds() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        alternate({"a": lambda: None}, rounds=0)
