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
    """Inside, new tensors have shapes but no values, and take no memory.

    Code inside runs the same operations as for real, so that :func:`step_memory` and the FLOP
    counter give what a real run would take. Code that reads a value (a check of the data, the step
    count of an optimizer) gets 1.
    """
    # A function mode would be off where a backward pass runs a forward pass again (checkpointing).
    fused = mock.patch.object(F, "scaled_dot_product_attention", _attention)
    with torch.device("meta"), fused, _NoNumbers():
        yield


class _NoNumbers(Operations):  # type: ignore[no-untyped-call]
    """What meta tensors answer to code that asks for more than their shape."""

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation on shapes alone."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        real = kwargs.get("device") == torch.device("cpu")  # explicitly on the CPU: tests of a loss
        if "generator" in kwargs and not real:
            kwargs["generator"] = None  # the meta device has and needs none
        return func(*args, **kwargs)


def _attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention by the fused operation, which real devices choose if there is no mask. For meta
    tensors torch would choose the one that stores the matrix of all pairs of tokens."""
    if args or kwargs:
        return _composite_attention(q, k, v, *args, **kwargs)
    fused: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return fused


_composite_attention = F.scaled_dot_product_attention
