"""Augmentation of whole batches. The random numbers are drawn on the CPU, so that every device
sees the same images; no loop runs over samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def crop(
    images: Tensor, padding: int, top: Tensor, left: Tensor, *, mode: str = "constant"
) -> Tensor:
    """Windows of the images' own size out of the padded images.

    Args:
        images: ``(N, C, H, W)``.
        padding: pixels added on each side.
        top, left: the windows' corners in the padded images, ``(N,)``, 0 to ``2 * padding``.
        mode: of the padding: ``"constant"``, zeros, or ``"reflect"``, the images mirrored.
    """
    height, width = images.shape[2:]
    # Torch mirrors no whole numbers.
    source = images if mode == "constant" else images.float()
    padded = F.pad(source, (padding,) * 4, mode=mode).to(images.dtype)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, top, left, H, W)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """The images, ``(N, C, H, W)``, mirrored left to right where ``mask``, bool ``(N,)``, is
    true."""
    return torch.where(mask[:, None, None, None], images.flip(3), images)


def cutout(images: Tensor, side: int, row: Tensor, column: Tensor) -> Tensor:
    """A square of zeros in every image, clipped at the border (DeVries & Taylor 2017).

    Args:
        images: ``(N, C, H, W)``.
        side: of the square, in pixels.
        row, column: the squares' centres, ``(N,)``; an even square reaches one pixel further up
            and left of it than down and right.
    """
    height, width = images.shape[2:]
    rows = _covered(row, side, height)[:, None, :, None]
    columns = _covered(column, side, width)[:, None, None, :]
    return images.masked_fill(rows & columns, 0)


def _covered(centre: Tensor, side: int, length: int) -> Tensor:
    """bool ``(N, length)``: which pixels of a line lie within ``side`` pixels about the centres."""
    start = centre[:, None] - side // 2
    line = torch.arange(length, device=centre.device)
    return (line >= start) & (line < start + side)


@dataclass(frozen=True)
class Augment:
    """Random changes to training images, in this order.

    Attributes:
        crop: pixels of black padding from which a window of the images' size is taken; 0 for none.
        translate: pixels of mirrored padding, likewise.
        flip: mirror every other image left to right, at random.
        alternate: mirror each image in every other epoch; :func:`batches` says which in this one.
        cutout: side in pixels of a black square at a random place; 0 for none.
    """

    crop: int = 0
    translate: int = 0
    flip: bool = False
    alternate: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("crop", "translate", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def __call__(
        self, images: Tensor, generator: torch.Generator, turn: Tensor | None = None
    ) -> Tensor:
        """Changed images, same shape, dtype and device. ``generator`` lives on the CPU. ``turn``,
        bool ``(N,)``: which images ``alternate`` mirrors."""
        n, _, height, width = images.shape

        def draw(end: int) -> Tensor:
            return torch.randint(end, (n,), generator=generator).to(images.device)

        if self.crop:
            images = crop(images, self.crop, draw(2 * self.crop + 1), draw(2 * self.crop + 1))
        if self.translate:
            corner = [draw(2 * self.translate + 1) for _ in "yx"]
            images = crop(images, self.translate, *corner, mode="reflect")
        if self.alternate:
            if turn is None:
                raise ValueError("alternate needs turn: which images are to be mirrored")
            images = flip(images, turn)
        if self.flip:
            images = flip(images, draw(2).bool())
        if self.cutout:
            images = cutout(images, self.cutout, draw(height), draw(width))
        return images
