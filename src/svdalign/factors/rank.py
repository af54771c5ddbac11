"""Rank that shrinks while training: exact re-diagonalisation, truncation, optimizer state carried.

**Re-diagonalisation.** With QR decompositions ``U = Q_U R_U``, ``V = Q_V R_V`` and the SVD of the
small core ``R_U diag(s) R_V^T = A diag(s') B^T``, the factors ``U' = Q_U A``, ``s'``,
``V' = Q_V B`` are the SVD of the same matrix ``W``. Where ``U`` and ``V`` are orthonormal to
rounding, as a retraction leaves them, ``U diag(s) V^T`` is that SVD already, up to the order and
the signs of its columns: nothing is turned, and cutting means dropping columns.

**Gradients.** Let ``G = dL/dW``, ``P = R_U^T A`` and ``Q = R_V^T B`` (r, r). Then
``dL/dU' = G V' diag(s') = (G V diag(s)) P = dL/dU P`` and ``dL/dV' = dL/dV Q`` exactly, whatever
the factors, and ``s' = (P o Q)^T s`` with ``o`` the elementwise product. Sums of gradients
(momentum) are carried by the same maps; ``dL/ds' = (P o Q)^T dL/ds`` holds exactly where ``P`` and
``Q`` are signed permutations, and otherwise leaves out what only the off-diagonal of ``U^T G V``
knows.

**Next step.** From orthonormal ``U``, ``V`` the change is a permutation of columns with signs, so
every elementwise optimizer (SGD with any momentum, Adam and its kin) takes the step it would have
taken. From other factors the gradient step of (U, s, V) itself depends on the factorisation: that
of ``U`` moves ``W`` by ``-lr G V diag(s)^2 V^T`` before, by ``-lr G V' diag(s')^2 V'^T`` after, and
these differ by as much as ``U^T U`` differs from the identity. No treatment of the state can undo
that.

**Second moments** become ``v'_k = sum_i P_ik^2 v_i``: exact for signed permutations. In general the
true second moment of ``g P`` lies between 0 and ``r`` times this (Cauchy-Schwarz), and is this
where the columns of ``g`` are uncorrelated. For orthonormal ``P`` each row keeps its sum.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .layers import FactoredLayer, absolute_rank
from .stiefel import orthogonality_error

__all__ = [
    "RankCut",
    "Rediagonalized",
    "energy_rank",
    "match_ranks",
    "parameter_budget",
    "rediagonalize",
    "reduce_rank",
    "spectrum",
]

# State that is linear in past gradients, and state that sums their squares.
LINEAR = frozenset({"momentum_buffer", "exp_avg", "grad_avg"})
SQUARED = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
CARRIED: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,  # AdamW is one
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)


@dataclass(frozen=True)
class RankCut:
    """What :func:`reduce_rank` did to one layer.

    ``energy``: share of ``||W||_F^2`` that was kept, in [0, 1]. ``dropped``: ``||W - W'||_F^2``.
    """

    name: str
    before: int
    after: int
    full_rank: int
    energy: float
    dropped: float


class Rediagonalized(NamedTuple):
    """The SVD ``U diag(s) V^T`` of a product, in double precision, and the maps ``P``, ``Q`` (r, r)
    that carry gradients from the old factors to these."""

    U: Tensor
    s: Tensor
    V: Tensor
    P: Tensor
    Q: Tensor


def rediagonalize(U: Tensor, s: Tensor, V: Tensor) -> Rediagonalized:
    """Exact SVD of ``U diag(s) V^T``, ``U`` (m, r), ``s`` (r,), ``V`` (n, r), without forming it.

    Singular values come out non-negative and falling. The maps are those of the module's text.
    """
    Q_U, R_U = torch.linalg.qr(U.detach().double())
    Q_V, R_V = torch.linalg.qr(V.detach().double())
    A, sigma, Bt = torch.linalg.svd((R_U * s.detach().double()) @ R_V.mT)
    return Rediagonalized(Q_U @ A, sigma, Q_V @ Bt.mT, R_U.mT @ A, R_V.mT @ Bt.mT)


def energy_rank(s: Tensor, energy: float) -> int:
    """The smallest number of entries of ``s`` (r,) with ``energy`` of all their squares' sum."""
    squares = s.detach().double().square().sort(descending=True).values
    sums = squares.cumsum(0)
    # An ulp of the sum is no energy: it must not cost a direction, nor at energy=1 keep a null one.
    enough = sums >= sums[-1] * energy * (1 - 4 * torch.finfo(torch.float64).eps)
    return int(enough.int().argmax()) + 1


def spectrum(layer: FactoredLayer) -> Tensor:
    """Singular values of the layer's matrix, (r,), falling, in double precision."""
    return rediagonalize(layer.U, layer.s, layer.V).s


def reduce_rank(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    energy: float | None = None,
    rank: int | float | Mapping[str, int | float] | None = None,
    parameters: int | float | None = None,
    ratio: float = 0.0,
    min_rank: int | float = 1,
) -> tuple[RankCut, ...]:
    """Cut the factored layers of ``model`` to a smaller rank, in place, by truncating their SVD.

    ``energy`` in (0, 1]: keep the smallest rank whose share of ``sum s^2`` is at least this. Or
    ``rank``: an absolute rank, a fraction in (0, 1] of each layer's full rank, or a mapping
    ``{layer name: either}`` that leaves other layers alone. Or ``parameters``: of the whole model,
    a number or a fraction in (0, 1] of what it would have with dense weights; kept are the
    directions with the largest share of their layer's energy for each parameter that they cost.
    Never below ``ceil(ratio * r)``, ``r`` the present rank, nor below ``min_rank``, absolute or a
    fraction of full rank; ``parameters`` gives way to these limits.
    ``||W - W'||_F^2`` is the energy of what is dropped, the least for any matrix of that rank;
    what is kept is not rescaled.

    ``optimizer``: of the model's parameters, or several. Its state is carried with the basis and
    cut (see the module's text); of a kind not known here the state of the layers that are cut is
    reset, with a warning. Parameters stay the same objects, ``step`` counts and pending gradients
    go on, and a layer that is not cut is not touched at all.

    Returns a :class:`RankCut` for each factored layer, cut or not. Raises ValueError or TypeError
    that name the argument, ValueError that names the layer for factors that are not finite; nothing
    is cut then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    optimizers = _optimizers(optimizer)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FactoredLayer)}
    _check(layers, energy, rank, parameters, ratio, min_rank)
    for name, layer in layers.items():
        if not all(X.isfinite().all() for X in (layer.U, layer.s, layer.V)):
            raise ValueError(f"model has NaN or infinite factors in layer {name!r}")
    floors = {
        name: max(absolute_rank(min_rank, m.full_rank), math.ceil(ratio * m.rank - 1e-9))
        for name, m in layers.items()
    }
    if parameters is not None:
        rank = _affordable_ranks(model, layers, floors, parameters)
    cuts = []
    for name, layer in layers.items():
        r = layer.rank
        turned = _turned(layer)
        s = turned.s if turned is not None else layer.s.detach().double()
        if energy is not None:
            wanted = energy_rank(s, energy)
        else:
            of_layer = rank.get(name) if isinstance(rank, Mapping) else rank
            wanted = r if of_layer is None else absolute_rank(of_layer, layer.full_rank)
        after = min(r, max(wanted, floors[name]))
        # The largest, in the order they stand in: a column that stays keeps its place.
        keep = s.abs().argsort(descending=True, stable=True)[:after].sort().values
        whole, kept = s.square().sum().item(), s[keep].square().sum().item()
        if after < r:
            _replace(layer, turned, keep, optimizers)
        share = kept / whole if whole else 1.0
        cuts.append(RankCut(name, r, after, layer.full_rank, share, max(whole - kept, 0.0)))
    return tuple(cuts)


def _affordable_ranks(
    model: nn.Module,
    layers: Mapping[str, FactoredLayer],
    floors: Mapping[str, int],
    parameters: int | float,
) -> dict[str, int]:
    """Ranks at which ``model`` has at most ``parameters``, if the floors let it: of all directions
    of all layers the ones with the largest share of their layer's energy per parameter."""
    ranks = {name: min(floors[name], layer.rank) for name, layer in layers.items()}
    left = parameter_budget(model, parameters) - sum(p.numel() for p in model.parameters())
    left += sum(_cost(layer) * (layer.rank - ranks[name]) for name, layer in layers.items())
    worth = []
    for name, layer in layers.items():
        energy = spectrum(layer).square()
        shares = energy / energy.sum().clamp_min(1e-300)
        worth += [(x / _cost(layer), name) for x in shares[ranks[name] :].tolist()]
    for _, name in sorted(worth, key=lambda item: -item[0]):
        left -= _cost(layers[name])
        if left < 0:
            break
        ranks[name] += 1
    return ranks


def parameter_budget(model: nn.Module, parameters: int | float) -> int:
    """``parameters`` as a number, if a fraction then of those ``model`` would have with dense
    weights in its factored layers. ValueError if rank 1 in all of these takes more."""
    layers = [m for m in model.modules() if isinstance(m, FactoredLayer)]
    others = sum(p.numel() for p in model.parameters()) - sum(_cost(m) * m.rank for m in layers)
    budget = parameters
    if isinstance(parameters, float):
        budget = int(parameters * (others + sum(len(m.U) * len(m.V) for m in layers)))
    if (least := others + sum(map(_cost, layers))) > budget:
        raise ValueError(
            f"parameters={parameters!r} asks for {budget:,} parameters at most, but what is not "
            f"factored and rank 1 of each layer take {least:,}"
        )
    return int(budget)


def _cost(layer: FactoredLayer) -> int:
    """Parameters of a direction."""
    return len(layer.U) + 1 + len(layer.V)


def match_ranks(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the factored layers of ``model`` the ranks that their factors have in a state dict.

    After it ``model.load_state_dict(state)`` fits. Until then the values of a layer whose rank
    changed are undefined.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, FactoredLayer):
            s = state.get(f"{name}.s" if name else "s")
            if s is not None and s.ndim == 1 and s.numel() != layer.rank:
                r = s.numel()
                U, V = layer.U.new_empty(len(layer.U), r), layer.V.new_empty(len(layer.V), r)
                layer.set_factors(U, layer.s.new_empty(r), V)


def _turned(layer: FactoredLayer) -> Rediagonalized | None:
    """The layer's SVD, or None where its factors are that already, to rounding."""
    error = max(orthogonality_error(X.detach().double()).item() for X in (layer.U, layer.V))
    if error <= 32 * torch.finfo(layer.U.dtype).eps * math.sqrt(layer.rank):
        return None
    return rediagonalize(layer.U, layer.s, layer.V)


def _replace(
    layer: FactoredLayer,
    turned: Rediagonalized | None,
    keep: Tensor,
    optimizers: tuple[Optimizer, ...],
) -> None:
    """Give the layer the columns ``keep`` of its SVD, gradients and optimizer state with them."""
    before: dict[Tensor, torch.Size] = {p: p.shape for p in (layer.U, layer.s, layer.V)}
    factors: tuple[Tensor, ...] = (layer.U, layer.s, layer.V)
    maps: dict[Tensor, Tensor] | None = None
    if turned is not None:
        factors = (turned.U, turned.s, turned.V)
        maps = {layer.U: turned.P, layer.s: turned.P * turned.Q, layer.V: turned.Q}
    gradients = {p: p.grad for p in before}
    U, s, V = (_columns(X, keep).to(layer.U.dtype) for X in factors)
    layer.set_factors(U, s, V)

    def carried(value: Tensor, p: Tensor, squared: bool = False) -> Tensor:
        if maps is None:
            return _columns(value, keep)
        C = maps[p].square() if squared else maps[p]
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
            known = isinstance(optimizer, CARRIED) and tensors.keys() <= LINEAR | SQUARED
            if known and all(v.shape == shape for v in tensors.values()):
                for key, value in tensors.items():
                    state[key] = carried(value, p, squared=key in SQUARED)
            else:
                del optimizer.state[p]
                _say_reset(optimizer)


def _columns(X: Tensor, keep: Tensor) -> Tensor:
    return X.detach().index_select(-1, keep)


def _reset_lbfgs(optimizer: torch.optim.LBFGS, cut: Mapping[Tensor, torch.Size]) -> None:
    # Its history is one flat vector over all parameters, and it remembers that vector's length.
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


def _optimizers(given: Optimizer | Iterable[Optimizer] | None) -> tuple[Optimizer, ...]:
    if given is None or isinstance(given, Optimizer):
        return () if given is None else (given,)
    several = tuple(given) if isinstance(given, Iterable) else (given,)
    for optimizer in several:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "optimizer must be a torch.optim.Optimizer, as learner.optimizer is, or several, "
                f"got {type(optimizer).__name__}"
            )
    return several


def _check(
    layers: Mapping[str, FactoredLayer],
    energy: float | None,
    rank: int | float | Mapping[str, int | float] | None,
    parameters: int | float | None,
    ratio: float,
    min_rank: int | float,
) -> None:
    if not layers:
        raise ValueError("model has no factored layer; svdalign.factorize makes them")
    if [energy, rank, parameters].count(None) != 2:
        raise ValueError("give either energy or rank or parameters")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy!r}")
    if isinstance(rank, Mapping) and (unknown := sorted(set(rank) - set(layers))):
        raise ValueError(
            f"rank names {unknown}, which are not factored layers; there are {list(layers)}"
        )
    for value in rank.values() if isinstance(rank, Mapping) else (rank,):
        if not (value is None or _is_rank(value)):
            raise ValueError(
                "rank must be a whole number of at least 1, a fraction in (0, 1] or a mapping from "
                f"layer names to these, got {value!r}"
            )
    if not (parameters is None or _is_rank(parameters)):
        raise ValueError(
            "parameters must be a whole number of at least 1 or a fraction in (0, 1], "
            f"got {parameters!r}"
        )
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in [0, 1], got {ratio!r}")
    if not _is_rank(min_rank):
        raise ValueError(
            "min_rank must be a whole number of at least 1 or a fraction in (0, 1], "
            f"got {min_rank!r}"
        )


def _is_rank(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 1 if isinstance(value, int) else 0 < value <= 1
