"""A readout for maps of too few channels for a matrix to tell classes apart."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._autocast import autocasted
from .._map_statistics import grid_means
from .._parts import worth_holding
from .matrices import Feedback, StructuredFeedback


class WidenedFeedback(Feedback):
    """``B^T P(relu(K * p))``: a convolution, then a matrix.

    ``p`` (B, C h w) is a pooled map of ``shape`` (C, h, w). The 3 x 3 convolution ``K`` turns it
    into ``wide`` channels; ``P`` averages these onto at most ``grid`` x ``grid`` cells. With
    ``learn``, ``K`` and the matrix are trained by the unit's own loss. A large wide map is not
    saved but computed again in the backward pass, some samples at a time.

    Source: the auxiliary networks of Belilovsky et al., *Decoupled Greedy Learning of CNNs* (2020);
    this is the smallest.
    """

    fineness: ClassVar[int] = 2

    K: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        wide: int,
        grid: int,
        rank: int | None,
        learn: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.shape, self.read = shape, (min(grid, height), min(grid, width))
        K = torch.randn(wide, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
        if learn:
            self.K = nn.Parameter(K)
        else:
            self.register_buffer("K", K)
        d = wide * self.read[0] * self.read[1]
        self.matrix = StructuredFeedback(d, classes, rank=rank, learn=learn, generator=generator)

    def readout(self, p: Tensor) -> Tensor:
        p = autocasted(p)
        wide = len(p) * len(self.K) * math.prod(self.shape[1:])
        if worth_holding(wide * p.element_size()):
            return self._readout(p)
        # So many parts that the wide map of each is no larger than p.
        parts = p.chunk(math.ceil(len(self.K) / self.shape[0]))
        return torch.cat(
            [
                checkpoint(self._readout, part, use_reentrant=False, preserve_rng_state=False)
                for part in parts
            ]
        )

    def _readout(self, p: Tensor) -> Tensor:
        wide = F.conv2d(p.reshape(len(p), *self.shape), self.K, padding=1).relu_()
        return self.matrix.readout(grid_means(wide, self.read, wide.dtype).flatten(1))
