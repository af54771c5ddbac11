"""Size and arithmetic of a network: parameters, multiply-accumulates (MACs) of an inference, of a
training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, no_grad
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..._operations import Operations
from ...engine.forward import evaluating


def parameter_count(model: nn.Module) -> int:
    """Number of parameters; shared ones are counted once."""
    return sum(p.numel() for p in model.parameters())


def inference_macs(model: nn.Module, example: Tensor) -> int:
    """MACs of one image through ``model`` in eval mode; ``example`` is a batch, (N, C, H, W) say.

    Counted are matrix products and convolutions, as torch's FLOP counter does (two FLOPs a MAC);
    element-wise work (norms, activations, the factor ``s``) is not.
    """
    return macs_by_module(model, example)[""]


def macs_by_module(model: nn.Module, example: Tensor) -> dict[str, int]:
    """MACs of one image by module name, submodules included; ``""`` is the whole model."""
    counter = FlopCounterMode(display=False)
    with evaluating(model), no_grad(), counter:
        model(example[:1])
    counts = counter.get_flop_counts()
    root = type(model).__name__
    macs = {"": counter.get_total_flops() // 2}
    for name, flops in counts.items():
        if name.startswith(f"{root}."):
            macs[name.removeprefix(f"{root}.")] = sum(flops.values()) // 2
    return macs


def step_macs(step: Callable[[], object]) -> int:
    """MACs of everything that ``step`` runs, backward passes included; counted as above."""
    flops = _Flops()
    with flops:
        step()
    return flops.total // 2


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *settings: Any, out_val: object
) -> int:
    """FLOPs of a convolution's backward pass: those of its forward pass for each gradient asked
    for. Torch's own count treats a grouped convolution like a dense one."""
    *_, transposed, _, _, wanted = settings
    outputs = x if transposed else grad
    gradients: int = sum(wanted[:2])
    return 2 * outputs.numel() * math.prod(weight.shape[1:]) * gradients


_ATEN = torch.ops.aten
_COUNTS = {
    **flop_registry,
    _ATEN.convolution_backward: _convolution_backward,
    # Torch counts fused attention on CUDA alone.
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _ATEN._scaled_dot_product_flash_attention
    ],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}


class _Flops(Operations):  # type: ignore[no-untyped-call]
    """Torch's FLOP counter without its hooks on modules, which do not allow ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.total: int = 0

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation and count its FLOPs."""
        result = func(*args, **kwargs)
        count = _COUNTS.get(func._overloadpacket)  # type: ignore[attr-defined]
        if count is not None:
            self.total += count(*args, **kwargs, out_val=result)
        return result
