"""Turning autocast off around the library's own arithmetic, and on again in backward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

_DEVICES = ("cpu", "cuda")


@contextlib.contextmanager
def outside_autocast() -> Iterator[None]:
    """Turn autocast off inside. Backward passes take their dtypes from the forward pass, and
    arithmetic on weights must not be rounded because the caller's loop runs under autocast."""
    with contextlib.ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def present_autocast() -> Callable[[], AbstractContextManager[object]]:
    """The present settings of autocast, as a function that makes a context with these settings. A
    backward pass that runs part of the forward pass again needs it."""
    dtypes = {d: torch.get_autocast_dtype(d) for d in _DEVICES if torch.is_autocast_enabled(d)}

    def again() -> AbstractContextManager[object]:
        stack = contextlib.ExitStack()
        for device, dtype in dtypes.items():
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        return stack

    return again


def autocasted(t: Tensor) -> Tensor:
    """``t`` in the dtype that autocast would cast it to for a convolution or a matrix product."""
    device = t.device.type
    if device in _DEVICES and torch.is_autocast_enabled(device) and t.dtype == torch.float32:
        return t.to(torch.get_autocast_dtype(device))
    return t
