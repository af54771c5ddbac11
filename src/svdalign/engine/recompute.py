"""Blocks that are computed again for their gradients, in place of holding what they made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from .forward import preserved

__all__ = ["recomputing"]


@contextlib.contextmanager
def recomputing(model: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
    """While active, the modules at these paths hold their inputs alone when they run (gradient
    checkpointing). Running again leaves no trace: batch norms take notice of a batch once."""
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
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return contextlib.nullcontext(), _Preserved(module)

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run


class _Preserved(AbstractContextManager[None]):
    """:func:`preserved`, entered once for each time that the module runs again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.inner = preserved(self.module)
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.inner.__exit__(*error)
