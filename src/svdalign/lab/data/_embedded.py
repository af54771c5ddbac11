"""The part of Fashion-MNIST that ships with the package (made by ``scripts/make_embedded.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import numpy as np
import numpy.typing as npt
from PIL import Image

from ._types import Indexed

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_SIDE = 28


@dataclass(frozen=True)
class _Sheet(Indexed):
    name: str
    tiles: npt.NDArray[np.uint8]

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.tiles[index])

    def where(self, index: int) -> str:
        return f"{self.name}, image {index}"


def read(split: str) -> Indexed:
    """``split`` is ``train`` (10,000 images) or ``test`` (2,000): one sheet, sorted by class."""
    file = resources.files(__package__) / "embedded" / f"{split}.png"
    with file.open("rb") as stream, Image.open(stream) as png:
        sheet = np.asarray(png)
    rows, columns = (length // _SIDE for length in sheet.shape)
    tiles = sheet.reshape(rows, _SIDE, columns, _SIDE).swapaxes(1, 2).reshape(-1, _SIDE, _SIDE)
    labels = np.repeat(np.arange(len(CLASSES)), len(tiles) // len(CLASSES))
    return _Sheet(labels, "L", f"{split}.png", tiles)
