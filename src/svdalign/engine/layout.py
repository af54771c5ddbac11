"""The axes of a unit's output: rules see them in one order, whatever the model's own order is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..factors.registry import kind_of
from ..task import class_axis


@dataclass(frozen=True)
class Layout:
    """How an output becomes (B, d), (B, T, d) or (B, C, h, w), with B as in the network's output.

    ``axes``: a permutation of its axes, None for none. ``fold``: merge the first two axes, samples
    and tokens, as the network's output (B T, classes) does. Of a volume (B, C, d, h, w), d and h
    become one axis.
    """

    axes: tuple[int, ...] | None = None
    fold: bool = False

    def __call__(self, h: Tensor) -> Tensor:
        """The output ``h`` as rules see it."""
        if self.axes is not None:
            h = h.permute(self.axes)
        if self.fold:
            h = h.flatten(0, 1)
        return h.flatten(2, -2) if h.ndim > 4 else h

    def space(self, h: Tensor) -> tuple[int, ...]:
        """Sizes of the axes of space of the output ``h``, none of them folded."""
        shape = h.shape if self.axes is None else [h.shape[axis] for axis in self.axes]
        return tuple(shape[2:])

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that an output of ``shape`` gets."""
        return tuple(self(torch.empty(shape, device="meta")).shape)


AS_IT_IS = Layout()

_CHANNELS_FIRST = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)


def _channels_last(module: nn.Module) -> bool | None:
    """Whether channels are the last axis of the output of ``module``, or the second; None if
    unknown."""
    if (kind := kind_of(module)) is not None:
        return kind.channels_last
    if isinstance(module, _CHANNELS_FIRST):
        return False
    return True if type(module) is nn.LayerNorm else None


def with_channels_at(axis: int, ndim: int) -> Layout:
    """The layout of a tensor of ``ndim`` axes, the batch first, whose channels are ``axis``."""
    axes = [i for i in range(ndim) if i != axis]
    axes.insert(2 if ndim == 3 else 1, axis)
    return Layout(None if axes == sorted(axes) else tuple(axes))


def channel_axis(
    path: str,
    shape: tuple[int, ...],
    calls: Iterable[tuple[str, nn.Module, tuple[int, ...]]],
) -> int:
    """The axis of channels in the output, of ``shape``, of module ``path`` (of the model, if there
    is no such path); see :func:`layout_of`."""
    channels_last: bool | None = None
    for other, module, other_shape in calls:
        if other_shape == shape and (known := _channels_last(module)) is not None:
            channels_last = known
        if other == path:
            break
    if channels_last is None or len(shape) < 3:
        return class_axis(shape)
    return len(shape) - 1 if channels_last else 1


def layout_of(
    path: str,
    shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    calls: Iterable[tuple[str, nn.Module, tuple[int, ...]]],
) -> Layout | None:
    """The layout of the output, of ``shape``, of module ``path``; None if the batch is not an axis.

    ``calls``: (path, module, shape of its output) for all module calls in order. The last module up
    to ``path`` with an output of this shape decides where channels are, if that is known of it.
    Otherwise they are the last of three axes, and the second of more.
    """
    layout = with_channels_at(channel_axis(path, shape, calls), len(shape))
    axes = list(layout.axes or range(len(shape)))
    B = output_shape[0] if output_shape else 1
    tokens = len(shape) == 3 and len(output_shape) == 2
    fold = False
    if len(shape) < 2:
        return None
    if shape[axes[0]] != B:
        if tokens and shape[axes[0]] * shape[axes[1]] == B:
            fold = True
        elif len(shape) == 3 and shape[axes[1]] == B:
            axes[:2] = axes[1::-1]
        else:
            return None
    return Layout(None if axes == sorted(axes) else tuple(axes), fold)
