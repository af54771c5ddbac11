"""Copies of modules that hold tensors which ``copy.deepcopy`` refuses to copy."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

_M = TypeVar("_M", bound=nn.Module)


def copied(model: _M) -> _M:
    """``copy.deepcopy(model)``, also for modules that hold sparse tensors, or tensors computed from
    their parameters, as pruning and the older weight and spectral norms keep them. Parameters of
    modules that ``torch.jit`` compiled can be trained in the copy, too. TypeError for a ``model``
    that is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = (t for module in model.modules() for t in tree_leaves(vars(module)))
    refused = {
        id(t): t
        for t in found
        if isinstance(t, Tensor) and not (t.is_leaf and t.layout == torch.strided)
    }
    copy_ = copy.deepcopy(model, {key: t.detach().clone() for key, t in refused.items()})
    for parameter in copy_.parameters():
        if not parameter.is_leaf:  # as torch.jit copies them
            parameter.detach_().requires_grad_()
    return copy_


@torch.no_grad()
def with_own_weight(layer: _M) -> _M:
    """A copy of ``layer`` whose weight is a parameter, also where it is computed from others."""
    own = copied(layer)
    if parametrize.is_parametrized(own, "weight"):
        # Not by ``remove_parametrizations``: the class that it would change is that of ``layer``.
        own.__class__ = parametrize.type_before_parametrizations(own)
        for name, _ in own.get_submodule("parametrizations").named_children():
            own.register_parameter(name, nn.Parameter(getattr(layer, name).clone()))
        del own._modules["parametrizations"]
    elif isinstance(weight := vars(own).get("weight"), Tensor):
        own._forward_pre_hooks.clear()  # those that compute it
        del own.__dict__["weight"]
        own.weight = nn.Parameter(weight)
    return own
