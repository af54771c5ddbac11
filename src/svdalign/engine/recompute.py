"""Gradient checkpointing: blocks keep their inputs alone and run again for their gradients."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from .forward import preserved_buffers


@contextlib.contextmanager
def recomputing(model: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
    """While active, the modules at the paths ``blocks`` save only their inputs when they run. The
    second run changes no buffer, so that batch norms count each batch once."""
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
        runs = itertools.count()

        def counted_once(*args: Any, **kwargs: Any) -> Any:
            again = next(runs) > 0  # checkpoint gives it the random state of the first run
            with preserved_buffers(module) if again else contextlib.nullcontext():
                return forward(*args, **kwargs)

        return checkpoint(counted_once, *args, use_reentrant=False, **kwargs)

    return run
