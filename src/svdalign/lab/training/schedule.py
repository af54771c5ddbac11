"""Learning rate over the steps: a pure function, so that it needs no state to resume."""

from __future__ import annotations

import math


def learning_rate_factor(kind: str, step: int, total: int, warmup: float) -> float:
    """Factor in [0, 1] on the peak learning rate for ``step`` (from 0) of ``total``.

    The rate rises linearly over the first ``warmup * total`` steps, then ``one-cycle`` falls
    linearly, ``cosine`` by half a cosine, and ``constant`` stays. The first step and the last are
    above 0, so none is lost.
    """
    rise = warmup * total
    if step + 1 <= rise:
        return (step + 1) / (rise + 1)
    if kind == "constant":
        return 1.0
    left = (total - step) / (total - math.floor(rise))
    return left if kind == "one-cycle" else 0.5 * (1 - math.cos(math.pi * left))
