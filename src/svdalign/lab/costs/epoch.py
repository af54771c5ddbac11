"""Seconds of an epoch, computed from those of a step."""

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
    """Seconds of one pass over ``images`` on ``devices`` that each train on ``batch_size`` images a
    step and average their gradients.

    ``step``: seconds of a step on one device. ``gradients``: their bytes. Each of n devices sends
    ``2 (n - 1) / n`` times as many a step (ring all-reduce) over a ``link`` of so many bytes a
    second. It sends while it computes, so the longer of the two counts. Reading images and
    evaluation are left out.
    """
    sent = 2 * (devices - 1) / devices * gradients
    return math.ceil(images / (devices * batch_size)) * max(step, sent / link)
