"""Times of several pieces of work, taken in turns, so that drift of the machine hits all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each run of one piece of work, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of a run."""
        return statistics.median(self.seconds)

    def ratio(self, reference: Timing) -> float:
        """Median over the rounds of this run's time over the reference's of the same round."""
        pairs = zip(self.seconds, reference.seconds, strict=True)
        return statistics.median(mine / other for mine, other in pairs)


def alternate(
    work: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 11,
    warmup: int = 2,
    seconds: float = math.inf,
) -> dict[str, Timing]:
    """Run every callable once a round, ``warmup + rounds`` times; time the rounds after warm-up.

    Ends early once ``seconds`` have passed and three rounds are timed.

    Each round starts with the next callable, so that none always follows the same one. On CUDA the
    device is waited for before and after each run.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds}, {warmup}")
    names = list(work)
    taken: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(warmup + rounds):
        if turn >= warmup + 3 and time.perf_counter() > end:
            break
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            _wait()
            start = time.perf_counter()
            work[name]()
            _wait()
            if turn >= warmup:
                taken[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def _wait() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
