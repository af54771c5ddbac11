"""Vision transformers on patches of 16x16 pixels: -B and -L of Dosovitskiy et al. 2021, table 1,
and -S of Touvron et al. 2021, table 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._layers import scaled

_PATCH, HEAD = 16, 64


class Attention(nn.Module):
    """Multi-head self-attention, ``(N, T, d)`` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        N, T, d = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(h.transpose(1, 2).reshape(N, T, d))
        return out


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and with its skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """Patches, a class token, learned positions, ``depth`` blocks, a linear classifier."""

    def __init__(
        self, depth: int, heads: int, num_classes: int, in_channels: int, image_size: int
    ) -> None:
        super().__init__()
        width = HEAD * heads
        self.patches = nn.Conv2d(in_channels, width, _PATCH, _PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // _PATCH) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], 1) + self.positions
        logits: Tensor = self.classifier(self.norm(self.blocks(h))[:, 0])
        return logits


def vit_s16(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """12 blocks of 6 heads."""
    return ViT(12, scaled(6, width), num_classes, in_channels, image_size)


def vit_b16(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """12 blocks of 12 heads."""
    return ViT(12, scaled(12, width), num_classes, in_channels, image_size)


def vit_l16(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """24 blocks of 16 heads."""
    return ViT(24, scaled(16, width), num_classes, in_channels, image_size)
