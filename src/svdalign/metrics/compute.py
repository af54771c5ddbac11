"""Size and arithmetic of a network: parameters, multiply-accumulates (MACs) of one inference."""

from __future__ import annotations

from torch import Tensor, nn, no_grad
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["inference_macs", "macs_by_module", "parameter_count"]


def parameter_count(model: nn.Module) -> int:
    """Numbers held as parameters, each shared one counted once."""
    return sum(p.numel() for p in model.parameters())


def inference_macs(model: nn.Module, example: Tensor) -> int:
    """MACs of one image through ``model`` in eval mode; ``example`` is a batch, (N, C, H, W) say.

    Counted are matrix products and convolutions, as torch's FLOP counter does (two FLOPs a MAC);
    element-wise work (norms, activations, the factor ``s``) is not.
    """
    return macs_by_module(model, example)[""]


def macs_by_module(model: nn.Module, example: Tensor) -> dict[str, int]:
    """MACs of one image by module name, each with all it contains; ``""`` is the whole model."""
    modes = {module: module.training for module in model.modules()}
    counter = FlopCounterMode(display=False)
    try:
        model.eval()
        with no_grad(), counter:
            model(example[:1])
    finally:
        for module, training in modes.items():
            module.training = training
    counts = counter.get_flop_counts()
    root = type(model).__name__
    macs = {"": counter.get_total_flops() // 2}
    for name, flops in counts.items():
        if name.startswith(f"{root}."):
            macs[name.removeprefix(f"{root}.")] = sum(flops.values()) // 2
    return macs
