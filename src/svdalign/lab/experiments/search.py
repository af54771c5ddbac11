"""Search of a positive number, such as a learning rate, with the same effort for every method.

The best of a grid counts only if it lies inside: at the edge, values beyond may be better still.
:func:`search` goes on until the best lies inside; :func:`best` refuses one at the edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence


def at_edge(found: Mapping[float, float]) -> bool:
    """Whether the best of ``found``, accuracies by rate, is its lowest or its highest rate."""
    return _argmax(found) in (min(found), max(found))


def best(found: Mapping[float, float]) -> float:
    """The rate of the highest accuracy; ValueError if it lies at the edge of what was tried."""
    rate = _argmax(found)
    if at_edge(found):
        raise ValueError(
            f"the best rate, {rate:g}, lies at the edge of its search ({', '.join(_named(found))}):"
            " the search must go on until the best lies inside"
        )
    return rate


def search(
    measure: Callable[[float], float], start: Sequence[float], tries: int
) -> dict[float, float]:
    """Accuracies by rate of ``tries`` calls of ``measure``, those of ``start`` first.

    While the best lies at the edge the grid goes on beyond it, by the ratio of its first two rates;
    once inside, the wider gap beside it is halved, on a logarithmic scale. Every method gets the
    same number of calls. Accuracies that are not finite count as 0.
    """
    if len(set(start)) < 2 or min(start) <= 0:
        raise ValueError(f"start must be at least two positive rates, got {tuple(start)}")
    if tries < len(set(start)) or tries < 3:
        raise ValueError(f"tries must be at least {max(3, len(set(start)))}, got {tries}")
    first, second = sorted(start)[:2]
    found: dict[float, float] = {}

    def attempt(rate: float) -> None:
        accuracy = measure(rate)
        found[rate] = accuracy if math.isfinite(accuracy) else 0.0

    for rate in dict.fromkeys(start):
        attempt(rate)
    while len(found) < tries:
        attempt(_next(found, second / first))
    return dict(sorted(found.items()))


def _next(found: Mapping[float, float], ratio: float) -> float:
    rates = sorted(found)
    i = rates.index(_argmax(found))
    if i == 0:
        return _rounded(rates[0] / ratio)
    if i == len(rates) - 1:
        return _rounded(rates[-1] * ratio)
    below, here, above = rates[i - 1 : i + 2]
    other = below if here / below > above / here else above
    return _rounded(math.sqrt(here * other))


def _argmax(found: Mapping[float, float]) -> float:
    return max(found, key=found.__getitem__)


def _rounded(rate: float) -> float:
    """``rate`` to two digits, as rates are written."""
    return float(f"{rate:.2g}")


def _named(found: Mapping[float, float]) -> list[str]:
    return [f"{rate:g}: {100 * found[rate]:.1f}" for rate in sorted(found)]
