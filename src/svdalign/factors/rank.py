"""Lowering ranks during training: how far each layer is cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

from torch import nn
from torch.optim import Optimizer

from ._cut import cut_layer
from .layers import FactoredLayer, absolute_rank, check_rank, factored_layers
from .rediagonalize import energy_rank, rediagonalized, spectrum


class _Trainer(Protocol):
    """Anything with the optimizer of a model, such as a learner."""

    @property
    def optimizer(self) -> Optimizer: ...


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


def reduce_rank(
    model: nn.Module,
    optimizer: Optimizer | _Trainer | Iterable[Optimizer | _Trainer] | None = None,
    *,
    energy: float | None = None,
    rank: int | float | Mapping[str, int | float] | None = None,
    parameters: int | float | None = None,
    ratio: float = 0.0,
    min_rank: int | float = 1,
) -> tuple[RankCut, ...]:
    """Cut the factored layers of ``model`` to a smaller rank, in place, by truncating their SVD.

    Give one of ``energy``, ``rank`` and ``parameters``. ``||W - W'||_F^2`` is then the dropped
    energy, the sum of the dropped ``s^2``, the least for any matrix of that rank (Eckart-Young);
    what is kept is not rescaled. Parameters stay the same objects, ``step`` counts and pending
    gradients are kept, and a layer that is not cut is not changed at all.

    Args:
        model: what :func:`factorize` returned.
        optimizer: the one that trains the model's parameters, or the learner that has it, or
            several of these. Its state is rotated with the basis and cut
            (:mod:`svdalign.factors.rediagonalize`); that of an optimizer of an unknown kind is
            reset for the layers that are cut, with a warning. An optimizer that has already stepped
            and is left out refuses its next step.
        energy: share of ``sum s^2``, in (0, 1]: each layer keeps the smallest rank that has it.
        rank: of each layer: a fraction in (0, 1] of its full rank ``min(m, n)``, rounded up, or an
            absolute rank; or a mapping ``{layer name: either}``, which leaves other layers alone.
        parameters: of the whole model, what is not factored included: a fraction in (0, 1] of what
            it would have with dense weights, or a number. Of all layers' directions those are kept
            that have the largest share of their layer's energy for each parameter that they take.
        ratio: in [0, 1]: no layer falls below ``ceil(ratio * r)``, ``r`` its present rank.
        min_rank: no layer falls below it: an absolute rank, or a fraction of full rank. ``energy``,
            ``rank`` and ``parameters`` give way to both limits.

    Returns:
        A :class:`RankCut` for each factored layer, cut or not.

    Raises:
        TypeError, ValueError: for an argument that does not fit; the message names it.
        ValueError: for a layer whose factors are not finite, or computed from other parameters.
            In any of these cases nothing has been cut.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    optimizers = _optimizers(model, optimizer)
    layers = factored_layers(model)
    _check(layers, energy, rank, parameters, ratio, min_rank)
    for name, layer in layers.items():
        if computed := [X for X in ("U", "s", "V") if X not in layer._parameters]:
            raise ValueError(
                f"model computes {', '.join(computed)} of layer {name!r} from other parameters, as "
                "torch's parametrizations and prune do; remove these first"
            )
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
        turned = rediagonalized(layer)
        s = turned.s if turned is not None else layer.s.detach().double()
        if energy is not None:
            wanted = energy_rank(s, energy)
        else:
            of_layer = rank.get(name) if isinstance(rank, Mapping) else rank
            wanted = r if of_layer is None else absolute_rank(of_layer, layer.full_rank)
        after = min(r, max(wanted, floors[name]))
        # The largest ones, in their present order: columns that stay are not permuted.
        keep = s.abs().argsort(descending=True, stable=True)[:after].sort().values
        whole, kept = s.square().sum().item(), s[keep].square().sum().item()
        if after < r:
            cut_layer(layer, turned, keep, optimizers)
        share = kept / whole if whole else 1.0
        cuts.append(RankCut(name, r, after, layer.full_rank, share, max(whole - kept, 0.0)))
    return tuple(cuts)


def _affordable_ranks(
    model: nn.Module,
    layers: Mapping[str, FactoredLayer],
    floors: Mapping[str, int],
    parameters: int | float,
) -> dict[str, int]:
    """Ranks at which ``model`` has at most ``parameters``, if ``floors`` allow it: kept are, of all
    directions of all layers, those with the largest share of their layer's energy per parameter."""
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
    """``parameters`` as a number; a fraction is of what ``model`` would have if all its layers were
    dense. ValueError if more are needed even at rank 1."""
    layers = factored_layers(model).values()
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
    """The number of parameters of one direction."""
    return len(layer.U) + 1 + len(layer.V)


def _optimizers(
    model: nn.Module, given: Optimizer | _Trainer | Iterable[Optimizer | _Trainer] | None
) -> tuple[Optimizer, ...]:
    if given is None:
        return ()
    found = []
    for one in given if isinstance(given, Iterable) else (given,):
        optimizer = getattr(one, "optimizer", one)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "optimizer must be a torch.optim.Optimizer, as learner.optimizer is, a learner, or "
                f"several of them, got {type(one).__name__}"
            )
        if getattr(one, "model", model) is not model:
            raise ValueError("optimizer must be a learner of model, got a learner of another one")
        found.append(optimizer)
    return tuple(found)


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
    if energy is not None and not (isinstance(energy, Real) and 0 < energy <= 1):
        raise ValueError(f"energy must be a number in (0, 1], got {energy!r}")
    if isinstance(rank, Mapping) and (unknown := sorted(set(rank) - set(layers))):
        raise ValueError(
            f"rank names {unknown}, which are not factored layers; there are {list(layers)}"
        )
    for value in rank.values() if isinstance(rank, Mapping) else (rank,):
        if value is not None:
            check_rank("rank", value, ", or a mapping from layer names to these")
    if parameters is not None:
        check_rank("parameters", parameters)
    if not (isinstance(ratio, Real) and 0 <= ratio <= 1):
        raise ValueError(f"ratio must be a number in [0, 1], got {ratio!r}")
    check_rank("min_rank", min_rank)
