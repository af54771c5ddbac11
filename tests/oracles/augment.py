"""Augmentation by definition, one pixel at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    out = torch.zeros_like(images)
    n, _, height, width = images.shape
    for i in range(n):
        for y in range(height):
            for x in range(width):
                source_y = y + int(top[i]) - padding
                source_x = x + int(left[i]) - padding
                if 0 <= source_y < height and 0 <= source_x < width:
                    out[i, :, y, x] = images[i, :, source_y, source_x]
    return out


def flip(images: Tensor, mask: Tensor) -> Tensor:
    out = images.clone()
    width = images.shape[3]
    for i in range(len(images)):
        if mask[i]:
            for x in range(width):
                out[i, :, :, x] = images[i, :, :, width - 1 - x]
    return out


def cutout(images: Tensor, side: int, row: Tensor, column: Tensor) -> Tensor:
    out = images.clone()
    n, _, height, width = images.shape
    for i in range(n):
        first_y, first_x = int(row[i]) - side // 2, int(column[i]) - side // 2
        for y in range(first_y, first_y + side):
            for x in range(first_x, first_x + side):
                if 0 <= y < height and 0 <= x < width:
                    out[i, :, y, x] = 0
    return out
