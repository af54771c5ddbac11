"""The memory and arithmetic of a step without running it, for models too large for the machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._operations import Operations


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """Inside, new tensors have shapes and sizes but no numbers, and take no memory.

    Whatever is made and run inside goes through the same operations as for real, so that
    :func:`step_memory` and the FLOP counter say what it would take. Where a value is read (a check
    of the data, the step count of an optimizer) it is 1.
    """
    # Not a function mode: these are off where a backward pass runs a forward one again.
    fused = mock.patch.object(F, "scaled_dot_product_attention", _attention)
    with torch.device("meta"), fused, _NoNumbers():
        yield


class _NoNumbers(Operations):  # type: ignore[no-untyped-call]
    """Meta tensors, where a program asks for more than their shape."""

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation on shapes alone."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        real = kwargs.get("device") == torch.device("cpu")  # asked for by name: probes of a loss
        if "generator" in kwargs and not real:
            kwargs["generator"] = None  # there is none for the meta device, and no need for one
        return func(*args, **kwargs)


def _attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention by the fused operation that real devices choose where there is no mask; for meta
    tensors torch would choose the one that holds the matrix of all pairs."""
    if args or kwargs:
        return _composite_attention(q, k, v, *args, **kwargs)
    fused: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return fused


_composite_attention = F.scaled_dot_product_attention
