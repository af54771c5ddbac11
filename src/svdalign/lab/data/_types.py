"""Data sets: two splits that give batches, and the sources that they are read from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ._augment import Augment


@dataclass(frozen=True)
class Epoch:
    """Which batches of one pass over a split are wanted.

    Attributes:
        batch_size: samples a batch; the last one of all may have fewer.
        start, end: the first batch, and the one before which to stop.
        shuffle: whether to permute the samples.
        seed, epoch: what the randomness derives from.
        augment: random changes to the images.
        part, parts: which part of every batch, of how many: processes that train on the same epoch
            have one each.
    """

    batch_size: int
    start: int
    end: int
    shuffle: bool = False
    seed: int = 0
    epoch: int = 0
    augment: Augment | None = None
    part: int = 0
    parts: int = 1

    def turns(self, count: int) -> Tensor | None:
        """bool ``(count,)``: which samples ``augment.alternate`` mirrors in this epoch."""
        if self.augment is None or not self.augment.alternate:
            return None
        first = torch.randint(2, (count,), generator=generator(self.seed, 0, 0, 1))
        return (first + self.epoch) % 2 == 1


class Images(ABC):
    """One split of a data set: labelled images of one size, in memory or elsewhere.

    Attributes:
        labels: int64, ``(N,)``, 0 to the number of classes less one.
    """

    labels: Tensor

    def __len__(self) -> int:
        """How many images one epoch has."""
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where the batches are."""
        return self.labels.device

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of an image."""

    @property
    def unreadable(self) -> Sequence[str]:
        """Images left out so far because they could not be decoded, each with the reason."""
        return ()

    @abstractmethod
    def fetch(self, epoch: Epoch) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of uint8 images ``(n, C, H, W)``, augmented, and labels ``(n,)``.

        They depend on ``epoch`` alone: from batch ``start`` on they are those of an uninterrupted
        epoch.
        """

    @abstractmethod
    def take(self, chosen: npt.NDArray[np.int64]) -> Images:
        """The split of these samples alone."""


@dataclass(frozen=True)
class Split(Images):
    """Images and their classes in memory, both on one device.

    Attributes:
        images: uint8, ``(N, C, H, W)``, 0 to 255.
        labels: int64, ``(N,)``, 0 to the number of classes less one.
    """

    images: Tensor
    labels: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def fetch(self, epoch: Epoch) -> Iterator[tuple[Tensor, Tensor]]:
        """As in :class:`Images`; no host synchronisation."""
        order = torch.arange(len(self))
        if epoch.shuffle:
            order = torch.randperm(len(self), generator=generator(epoch.seed, epoch.epoch))
        order = order.to(self.device)
        turns = epoch.turns(len(self))
        turns = None if turns is None else turns.to(self.device)
        for batch in range(epoch.start, epoch.end):
            chosen = order[batch * epoch.batch_size : (batch + 1) * epoch.batch_size]
            images = self.images[chosen]
            if epoch.augment is not None:
                turn = None if turns is None else turns[chosen]
                images = epoch.augment(images, generator(epoch.seed, epoch.epoch, batch), turn)
            yield images[epoch.part :: epoch.parts], self.labels[chosen][epoch.part :: epoch.parts]

    def take(self, chosen: npt.NDArray[np.int64]) -> Split:
        index = torch.from_numpy(chosen).to(self.device)
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class ImageData:
    """A data set for classification.

    Attributes:
        name: as given to :func:`load`.
        train, test: the two splits.
        classes: the classes' names; a label is an index into them.
        mean, std: per channel, of the training split's pixels scaled to 0 to 1.
        whole: how many images the data set has to train on, and how many the split has that
            ``test`` is from, before any limit; None where they are all here.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whole: tuple[int, int] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        return self.train.shape[0]

    @property
    def image_size(self) -> int:
        """Height and width of the (square) images in pixels."""
        return self.train.shape[1]

    @property
    def unreadable(self) -> list[str]:
        """What could not be decoded so far, of both splits, and why not."""
        return [*self.train.unreadable, *self.test.unreadable]


@dataclass(frozen=True)
class Source(ABC):
    """A split that is not decoded yet.

    Attributes:
        labels: ``(N,)``.
        mode: Pillow's name of the pixel format to convert to.
    """

    labels: npt.NDArray[np.int64]
    mode: str

    @abstractmethod
    def where(self, index: int) -> str:
        """Where an image comes from, for error messages."""


class Indexed(Source):
    """A split whose images can be read in any order."""

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """An image, not decoded yet."""


def generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream is a function of ``key``, independent between keys."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)  # manual_seed takes 63 bits
