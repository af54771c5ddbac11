"""Cutting one factored layer to a lower rank, with its gradients and its optimizer's state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from .layers import FactoredLayer
from .muon import Muon
from .rediagonalize import Rediagonalized

# An optimizer's state, by what it holds: sums of past gradients; sizes of gradients, such as sums
# of squares; copies of the weight.
_GRADIENTS = frozenset({"momentum_buffer", "exp_avg", "grad_avg"})
_SIZES = frozenset({
    "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf",
})  # fmt: skip
_COPIES = frozenset({"x", "y", "z"})
_CARRIED: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,  # AdamW is one
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    Muon,
)


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` is of the package schedulefree, which need not be installed."""
    return "ScheduleFree" in type(optimizer).__name__


def cut_layer(
    layer: FactoredLayer,
    turned: Rediagonalized | None,
    keep: Tensor,
    optimizers: tuple[Optimizer, ...],
) -> None:
    """Keep the columns ``keep`` of the layer's SVD, with their gradients and optimizer state.

    ``turned``: the layer's SVD, or None where its factors are that already.
    """
    before: dict[Tensor, torch.Size] = {p: p.shape for p in (layer.U, layer.s, layer.V)}
    factors: tuple[Tensor, ...] = (layer.U, layer.s, layer.V)
    maps: dict[Tensor, Tensor] | None = None
    if turned is not None:
        factors = (turned.U, turned.s, turned.V)
        maps = {layer.U: turned.P, layer.s: turned.P * turned.Q, layer.V: turned.Q}
    gradients = {p: p.grad for p in before}
    U, s, V = (_columns(X, keep).to(layer.U.dtype) for X in factors)
    layer.set_factors(U, s, V)

    def carried(value: Tensor, p: Tensor, key: str = "") -> Tensor:
        if maps is None:
            return _columns(value, keep)
        C = maps[p]
        if key in _SIZES:
            C = C.square()
        elif key in _COPIES and p is not layer.s:
            C = torch.linalg.pinv(C).mT
        return _columns(value.double() @ C, keep).to(value.dtype)

    for p, gradient in gradients.items():
        if gradient is not None:
            p.grad = carried(gradient, p)
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            _reset_lbfgs(optimizer, before)
            continue
        for p, shape in before.items():
            state = optimizer.state.get(p)
            if not state:
                continue
            tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim}
            known = isinstance(optimizer, _CARRIED) or is_schedule_free(optimizer)
            known = known and tensors.keys() <= _GRADIENTS | _SIZES | _COPIES
            if known and all(v.shape == shape for v in tensors.values()):
                for key, value in tensors.items():
                    state[key] = carried(value, p, key)
            else:
                del optimizer.state[p]
                _say_reset(optimizer)


def _columns(X: Tensor, keep: Tensor) -> Tensor:
    return X.detach().index_select(-1, keep)


def _reset_lbfgs(optimizer: torch.optim.LBFGS, cut: Mapping[Tensor, torch.Size]) -> None:
    # Its state is flat vectors over all parameters, whose length it remembers.
    if any(p is q for group in optimizer.param_groups for p in group["params"] for q in cut):
        optimizer.state.clear()
        optimizer._numel_cache = None
        _say_reset(optimizer)


def _say_reset(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if name not in _said:
        _said.add(name)
        warnings.warn(
            f"state of {name} cannot be carried through a change of rank: it was reset for the "
            "layers that were cut",
            stacklevel=4,
        )


_said: set[str] = set()
