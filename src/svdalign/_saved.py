"""What a backward pass holds of a tensor: the tensor itself, or smaller ones that it is made of.

A map of N channels that was expanded from one of r channels can be had again for one small
convolution, some samples at a time. Who made it says so (:func:`made_of`); who needs it backward
asks what to hold (:func:`hold`), and knows neither who made it nor how.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._autocast import outside_autocast

__all__ = ["Held", "by_parts", "empty", "hold", "made_of", "parts_of"]

_NAME = "_svdalign_made_of"


@dataclass(frozen=True)
class Held:
    """``tensors`` to hold for a tensor of ``shape``, (B, ...).

    ``samples(rows, *tensors)`` makes some of its samples again, best as ``parts`` has them; None
    where ``tensors`` is the tensor itself. ``alive`` gives the tensor as long as others hold it.
    """

    tensors: tuple[Tensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: torch.memory_format
    parts: list[slice]
    samples: Callable[..., Tensor] | None = None
    alive: Callable[[], Tensor | None] = lambda: None

    def of(self, rows: slice, tensors: Sequence[Tensor]) -> Tensor:
        """The samples ``rows``, of ``tensors`` as they come back from autograd."""
        if self.samples is None:
            return tensors[0][rows]
        if (t := self.alive()) is not None:
            return t.detach()[rows]
        with outside_autocast():
            return self.samples(rows, *tensors)

    def like(self, rows: slice, tensors: Sequence[Tensor]) -> Tensor:
        """A tensor like the samples ``rows``, of which the values are not to be read."""
        if self.samples is None:
            return tensors[0][rows]
        shape, device = (rows.stop - rows.start, *self.shape[1:]), tensors[0].device
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=self.format)

    def without_tensors(self) -> Held:
        """All but ``tensors``, for a context that has them saved by autograd."""
        return replace(self, tensors=())


def made_of(
    out: Tensor, samples: Callable[..., Tensor], tensors: Sequence[Tensor], parts: list[slice]
) -> None:
    """Note that ``out`` (B, ...) need not be held: ``samples(rows, *tensors)`` is ``out[rows]``.

    Kept with the storage, so that a detached alias is known as well; ``tensors`` live as long. Of
    an inference tensor nothing is noted: no backward pass holds one.
    """
    if out.is_inference():
        return
    there, identity = weakref.ref(out), _identity(out)

    def alive() -> Tensor | None:
        t = there()
        return t if t is not None and _identity(t) == identity else None

    held = replace(hold(out), tensors=tuple(t.detach() for t in tensors), parts=parts)
    held = replace(held, samples=samples, alive=alive)
    setattr(out.untyped_storage(), _NAME, (held, identity))


def hold(t: Tensor) -> Held:
    """What to hold of ``t`` (B, ...) for a backward pass."""
    held, identity = getattr(t.untyped_storage(), _NAME, (None, None))
    # A view of another shape is another tensor, and so is one that was changed in place since.
    if isinstance(held, Held) and identity == _identity(t):
        return held
    return Held((t,), tuple(t.shape), t.dtype, _memory_format(t), [slice(0, len(t))])


def _identity(t: Tensor) -> Any:
    return t.shape, t.stride(), t.storage_offset(), t.dtype, t._version


# --- some samples at a time ---------------------------------------------------------------------


#: Values at a time, by device: what a processor's cache holds (estimates, on the meta device, are
#: of one), and elsewhere what keeps it busy.
CHUNK = {"cpu": 1 << 19, "meta": 1 << 19}
ELSEWHERE = 1 << 24

PARTS = 32  #: at most so many parts: a thirty-second of a map is little, and steps in Python cost


def parts_of(h: Tensor, channels: int | None = None) -> list[slice]:
    """The samples of a map ``h`` (B, C, h, w), some at a time; ``channels``: how many the widest
    map has that is made of it, C by default."""
    each = (h.shape[1] if channels is None else channels) * math.prod(h.shape[2:])
    fitting = CHUNK.get(h.device.type, ELSEWHERE) // max(1, each)
    size = max(1, fitting, math.ceil(len(h) / PARTS))
    return [slice(i, min(i + size, len(h))) for i in range(0, max(1, len(h)), size)]


def by_parts(run: Callable[[slice], Tensor], parts: list[slice]) -> Tensor:
    """What ``run`` makes of each of ``parts``, in one tensor."""
    whole: Tensor | None = None
    for rows in parts:
        part = run(rows)
        if len(parts) == 1:
            return part
        if whole is None:
            whole = empty((parts[-1].stop, *part.shape[1:]), like=part)
        whole[rows] = part
    assert whole is not None
    return whole


def empty(shape: tuple[int, ...], *, like: Tensor) -> Tensor:
    """Of ``like``'s kind and memory format."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=_memory_format(like)
    )


def _memory_format(t: Tensor) -> torch.memory_format:
    """Channels last, or contiguous."""
    last = t.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
