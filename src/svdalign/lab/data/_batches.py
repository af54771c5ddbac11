"""Batches of one epoch, ready for a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._augment import Augment
from ._types import Epoch, Images


def num_batches(split: Images, batch_size: int, *, drop_last: bool = False) -> int:
    """How many batches :func:`batches` gives in one epoch."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return len(split) // batch_size if drop_last else -(-len(split) // batch_size)


def batches(
    split: Images,
    batch_size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    augment: Augment | None = None,
    drop_last: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch on the split's device.

    The order is a function of ``(seed, epoch)``, the augmentation one of ``(seed, epoch, batch)``:
    going on at batch ``start`` gives bit for bit what an uninterrupted epoch would have. Which
    images ``augment.alternate`` mirrors in the first epoch is a function of ``seed``.

    Args:
        split: images and labels.
        batch_size: samples a batch; the last one may have fewer, unless ``drop_last``.
        mean, std: per channel, of pixels from 0 to 1 (``ImageData.mean`` and ``.std``).
        shuffle: whether to permute the samples.
        seed, epoch: what the randomness derives from; not negative.
        start: number of batches to leave out at the beginning.
        augment: random changes to the images.
        memory_format: of the images.
        part: ``(p, n)``: part p of n of every batch, for each of n processes one.

    Yields:
        float32 images ``(N, C, H, W)``, of mean 0 and deviation 1 over the data set, and int64
        labels ``(N,)``.

    Raises:
        ValueError: for a size or number out of range; before the first batch.
    """
    count = num_batches(split, batch_size, drop_last=drop_last)
    channels = split.shape[0]
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"mean and std must have {channels} values, one a channel, "
            f"got {len(mean)} and {len(std)}"
        )
    for name, value in (("seed", seed), ("epoch", epoch), ("start", start)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if start > count:
        raise ValueError(f"start must be at most {count}, the number of batches, got {start}")
    shift, scale = (
        (255 * torch.tensor(values)).to(split.device).view(1, channels, 1, 1)
        for values in (mean, std)
    )
    own, parts = part
    if not 0 <= own < parts or batch_size % parts:
        raise ValueError(
            f"a batch of {batch_size} cannot be shared out among {parts} processes: batch_size "
            f"must be a multiple of their number, and part from 0 to {parts - 1}, got {own}"
        )
    wanted = Epoch(batch_size, start, count, shuffle, seed, epoch, augment, own, parts)
    return (
        ((images.contiguous(memory_format=memory_format).float() - shift) / scale, labels)
        for images, labels in split.fetch(wanted)
    )
