"""The network with which CIFAR-10 is trained fast: Jordan, *94% on CIFAR-10 in 3.29 Seconds on a
Single GPU* (2024), after its description.

Images are whitened by patches; three blocks of two 3 x 3 convolutions follow, the first pooled, and
a linear classifier whose logits are scaled down. Ours: the whitened patches have no bias.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._layers import scaled


class Whitening(nn.Module):
    """A convolution over whitened patches, ``(N, C, H, W)`` to ``(N, 2 C k k, H-k+1, W-k+1)``.

    Its kernels are the eigenvectors of the patches' covariance, each over the root of its
    eigenvalue, and their negatives. They are set by :meth:`fit` and never trained, so they are no
    parameters; before that they are the pixels of a patch.
    """

    weight: Tensor

    def __init__(self, in_channels: int, kernel_size: int = 2) -> None:
        super().__init__()
        pixels = torch.eye(in_channels * kernel_size**2)
        self.register_buffer("weight", _kernels(pixels, in_channels, kernel_size))

    def fit(self, images: Tensor, *, eps: float = 5e-4) -> None:
        """Whiten patches of ``images`` (N, C, H, W); ``eps`` is added to the eigenvalues. Images
        without values, on the meta device, leave it as it is."""
        if images.is_meta:
            return
        _, channels, kernel_size, _ = self.weight.shape
        patches = F.unfold(images.double(), kernel_size)  # (N, C k k, places)
        patches = patches.transpose(0, 1).flatten(1)
        eigenvalues, vectors = torch.linalg.eigh(torch.cov(patches))
        directions = vectors.mT / (eigenvalues + eps).sqrt()[:, None]
        self.weight.copy_(_kernels(directions, channels, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


def _kernels(directions: Tensor, channels: int, size: int) -> Tensor:
    """Rows of patches, and their negatives, as kernels."""
    return torch.cat([directions, -directions]).reshape(-1, channels, size, size)


class Block(nn.Module):
    """Two 3 x 3 convolutions, ``(N, in, H, W)`` to ``(N, out, H // 2, W // 2)``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = _norm(out_channels)
        self.gelu1 = nn.GELU()
        self.conv2 = _conv(out_channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.gelu2 = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.gelu1(self.norm1(self.pool(self.conv1(x))))
        out: Tensor = self.gelu2(self.norm2(self.conv2(h)))
        return out


class Scale(nn.Module):
    """Multiplies by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def extra_repr(self) -> str:
        return f"{self.factor:.3g}"


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3 x 3 convolution whose first kernels copy their inputs; the others are random."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[: min(in_channels, out_channels)])
    return conv


def _norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm that learns shifts but no scales; its running statistics move fast."""
    norm = nn.BatchNorm2d(channels, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


def airbench(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    whitening = Whitening(in_channels)
    channels = [whitening.weight.shape[0], *(scaled(c, width) for c in (64, 256, 256))]
    layers: dict[str, nn.Module] = {"whitening": whitening, "gelu": nn.GELU()}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(channels), 1):
        layers[f"block{i}"] = Block(fan_in, fan_out)
    layers |= {
        "pool": nn.AdaptiveMaxPool2d(1),
        "flatten": nn.Flatten(),
        "classifier": nn.Linear(channels[-1], num_classes, bias=False),
        "scale": Scale(1 / 9),
    }
    return nn.Sequential(OrderedDict(layers))
