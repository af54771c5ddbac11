from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ._augment import Augment
from ._types import Split


def num_batches(split: Split, batch_size: int, *, drop_last: bool = False) -> int:
    """How many batches :func:`batches` gives in one epoch."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return len(split) // batch_size if drop_last else -(-len(split) // batch_size)


def batches(
    split: Split,
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
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch, made on the split's device without a host synchronisation.

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

    Yields:
        float32 images ``(N, C, H, W)``, of mean 0 and deviation 1 over the data set, and int64
        labels ``(N,)``.

    Raises:
        ValueError: for a size or number out of range; before the first batch.
    """
    count = num_batches(split, batch_size, drop_last=drop_last)
    channels = split.images.shape[1]
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
    device = split.images.device
    shift, scale = (
        (255 * torch.tensor(values)).to(device).view(1, channels, 1, 1) for values in (mean, std)
    )
    order = torch.arange(len(split))
    if shuffle:
        order = torch.randperm(len(split), generator=_generator(seed, epoch))
    order = order.to(device)
    turns = None
    if augment is not None and augment.alternate:
        first = torch.randint(2, (len(split),), generator=_generator(seed, 0, 0, 1)).to(device)
        turns = (first + epoch) % 2 == 1

    def generate() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in range(start, count):
            chosen = order[batch * batch_size : (batch + 1) * batch_size]
            images = split.images[chosen]
            if augment is not None:
                turn = None if turns is None else turns[chosen]
                images = augment(images, _generator(seed, epoch, batch), turn)
            images = images.contiguous(memory_format=memory_format)
            yield (images.float() - shift) / scale, split.labels[chosen]

    return generate()


def _generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream is a function of ``key``, independent between keys."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)  # manual_seed takes 63 bits
