"""Watching torch at work: every operation that it runs, every tensor that autograd saves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, every operation of torch goes through :meth:`run`, in its place."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.run(func, args, dict(kwargs or {}))

    @abstractmethod
    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` is to return."""


def saving_as_usual(note: Callable[[Tensor], None] = lambda t: None) -> saved_tensors_hooks:
    """Inside, hooks on saved tensors from outside, such as those of gradient checkpointing, have no
    effect: autograd saves the tensors themselves. ``note`` is called with each of them."""

    def pack(t: Tensor) -> Tensor:
        note(t)
        return t

    return saved_tensors_hooks(pack, lambda t: t)
