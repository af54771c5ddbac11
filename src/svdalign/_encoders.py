"""The fast path of torch's transformer encoders, which does not call the linear layers inside."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

_WHEN_DENSE = "_nested_tensors_when_dense"  # an encoder's own setting, for when it is dense again


def settle_fast_path(model: nn.Module, replaced: Set[nn.Module]) -> None:
    """Turn off, in place, the fast path of the encoders in ``model`` that contain a module of
    ``replaced``, a replacement for a linear layer. Turn on that of the other encoders.

    In evaluation an ``nn.TransformerEncoderLayer`` reads ``linear1.weight`` and ``linear2.weight``
    in place of calling these layers, and an ``nn.TransformerEncoder`` may pack its input into a
    nested tensor, which the layers take on that path alone.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            nested = vars(module).setdefault(_WHEN_DENSE, module.use_nested_tensor)
            module.use_nested_tensor = nested and replaced.isdisjoint(module.modules())
        if isinstance(module, nn.TransformerEncoderLayer):
            linear = {module.linear1, module.linear2} & replaced
            if any(not hasattr(layer, "weight") for layer in linear):
                module.activation_relu_or_gelu = 0  # how a layer says that it has no fast path
