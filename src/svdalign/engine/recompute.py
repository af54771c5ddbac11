"""Gradient checkpointing: blocks keep their inputs alone and run again for their gradients."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from .forward import BuffersBefore, preserved_buffers


@contextlib.contextmanager
def recomputing(model: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
    """While active, the modules at the paths ``blocks`` save only their inputs when they run. The
    second run starts with the buffers of the first and changes none, so that it is the same (a
    spectral norm goes on from its last) and batch norms count each batch once."""
    modules = [model.get_submodule(path) for path in blocks]
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = _recomputed(module, module.forward)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _recomputed(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        before, parameters = BuffersBefore(module), list(module.parameters())
        runs = itertools.count()

        def counted_once(*args: Any, **kwargs: Any) -> Any:
            if next(runs) == 0:
                out = forward(*args, **kwargs)
                before.forget_unchanged()
                return out
            if any(p is not q for p, q in zip(parameters, module.parameters(), strict=True)):
                raise ValueError(
                    f"recompute must be False, as {type(module).__name__} runs again with other "
                    "parameters than before (by torch.func.functional_call, say)"
                )
            with preserved_buffers(module):  # checkpoint gives it the random state of the first run
                before.put_back()
                return forward(*args, **kwargs)

        return checkpoint(counted_once, *args, use_reentrant=False, **kwargs)

    return run
