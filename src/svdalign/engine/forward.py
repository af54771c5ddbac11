"""Running a user's model on inputs of any usual form, with its state left as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._structures import leaves


def forward(model: nn.Module, x: Any) -> Tensor:
    """The model's output tensor for ``x``: one tensor, a tuple of positional or a dict of keyword
    arguments. Of a structured output its ``logits``, else its first floating tensor, is taken."""
    if isinstance(x, Mapping):
        out = model(**x)
    elif isinstance(x, tuple | list):
        out = model(*x)
    else:
        out = model(x)
    if isinstance(out, Tensor):
        return out
    logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    return logits if isinstance(logits, Tensor) else first_tensor(out)


def first_tensor(out: Any) -> Tensor:
    """The first floating-point tensor in a nested structure."""
    for leaf in leaves(out):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise TypeError(
        "the model must return a floating-point tensor or a structure with one, "
        f"got {type(out).__name__}"
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into eval mode inside. Afterwards each module has its former mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Undo what a run of ``model`` inside changes: buffers such as batch-norm statistics, and the
    random state of torch, numpy and Python. A second run then repeats the first."""
    devices = {b.device for b in (*model.parameters(), *model.buffers()) if b.device.type == "cuda"}
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002 (the global one)
    try:
        with torch.random.fork_rng(devices=[d.index for d in devices]), preserved_buffers(model):
            yield
    finally:
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)


@contextlib.contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """:func:`preserved` for buffers alone. Autograd graphs that saved a buffer stay usable if the
    run does not change it."""
    buffers = BuffersBefore(model)
    try:
        yield
    finally:
        buffers.put_back()
        # Autocast caches low-precision copies of weights. Copies made under no_grad have no graph.
        torch.clear_autocast_cache()


class BuffersBefore:
    """The buffers of ``model`` as they are when this is made."""

    def __init__(self, model: nn.Module) -> None:
        self._saved = [
            (module, name, buffer, None if buffer is None else buffer._version, _copy(buffer))
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]

    def forget_unchanged(self) -> None:
        """Keep copies only of buffers that have changed since."""
        self._saved = [
            (module, name, buffer, version, copy)
            for module, name, buffer, version, copy in self._saved
            if module._buffers.get(name) is not buffer
            or (buffer is not None and buffer._version != version)
        ]

    def put_back(self) -> None:
        """Give the model these buffers, with the values that they had."""
        for module, name, buffer, _, saved in self._saved:
            module._buffers[name] = buffer  # the model may have put another one there
            if buffer is not None and saved is not None:
                # Through `data`, which leaves the version counter as it is: autograd refuses to use
                # a saved tensor whose counter has changed.
                buffer.data.copy_(saved)


def _copy(buffer: Tensor | None) -> Tensor | None:
    """A copy to write back later; None for an expanded tensor, which cannot be written to."""
    if buffer is None:
        return None
    if buffer.layout == torch.strided:
        steps = zip(buffer.shape, buffer.stride(), strict=True)
        if any(n > 1 and step == 0 for n, step in steps):
            return None
    return buffer.detach().clone()


def values_of(t: Tensor) -> Tensor:
    """The stored numbers of ``t``, which may be sparse."""
    if t.layout == torch.strided:
        return t
    return t._values() if t.layout == torch.sparse_coo else t.values()
