"""Seconds of an epoch, worked out from those of a step."""

from __future__ import annotations

import math


def epoch_seconds(
    step: float,
    *,
    images: int,
    batch_size: int,
    devices: int = 1,
    gradients: int = 0,
    link: float = math.inf,
) -> float:
    """Seconds of one pass over ``images`` by ``devices`` that each take ``batch_size`` of them a
    step and average their gradients.

    ``step``: seconds of a device's step. ``gradients``: bytes, of which each device sends
    ``2 (n - 1) / n`` times as many a step (a ring) over a ``link`` of so many bytes a second, while
    it works: the longer of the two counts. Reading images is not in it, nor evaluation.
    """
    sent = 2 * (devices - 1) / devices * gradients
    return math.ceil(images / (devices * batch_size)) * max(step, sent / link)
