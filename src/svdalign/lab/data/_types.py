from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images and their classes, both on one device.

    Attributes:
        images: uint8, ``(N, C, H, W)``, 0 to 255.
        labels: int64, ``(N,)``, 0 to the number of classes less one.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A data set for classification.

    Attributes:
        name: as given to :func:`load`.
        train, test: the two splits.
        classes: the classes' names; a label is an index into them.
        mean, std: per channel, of the training split's pixels scaled to 0 to 1.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        """Height and width of the (square) images in pixels."""
        return self.train.images.shape[2]


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
    def open(self, index: int) -> Image.Image:
        """An image, not decoded yet."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Where an image comes from, for error messages."""
