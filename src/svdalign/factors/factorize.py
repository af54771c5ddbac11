"""Turn the layers of any ``nn.Module`` into factored ones, and say what was left dense and why."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from .._tracing import carry_hooks
from .layers import (
    SCHEMES,
    FactoredLayer,
    Scheme,
    SVDConv2d,
    SVDLinear,
    absolute_rank,
    break_even_rank,
    kernel_matrix,
)

__all__ = ["Factorization", "LayerReport", "Rank", "factorize"]

Rank = (
    float | int | None
)  #: a fraction of full rank in (0, 1], an absolute rank, or None: leave dense


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer with a weight.

    ``rank`` is None where it stayed dense; ``note`` then says why. ``parameters`` counts the weight
    as it is now, ``dense_parameters`` as it was.
    """

    name: str
    kind: str
    full_rank: int
    rank: int | None
    parameters: int
    dense_parameters: int
    note: str = ""


@dataclass(frozen=True)
class Factorization:
    """What :func:`factorize` did, a :class:`LayerReport` for each layer with a weight."""

    layers: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __str__(self) -> str:
        rows = [("layer", "kind", "rank", "of", "parameters", "dense", "note")]
        rows += [
            (row.name, row.kind, "dense" if row.rank is None else str(row.rank), str(row.full_rank),
             f"{row.parameters:,}", f"{row.dense_parameters:,}", row.note)
            for row in self.layers
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        )


def factorize(
    net: nn.Module,
    rank: Rank | Mapping[str, Rank] = 0.25,
    scheme: Scheme = "spatial",
    *,
    classifier: bool = False,
) -> nn.Module:
    """A copy of ``net`` whose linear and convolution layers are held as ``U diag(s) V^T``.

    ``rank``: a float in (0, 1] is a fraction of each layer's full rank (rounded up), an int is an
    absolute rank (cut to full rank), a mapping ``{layer name: rank or None}`` decides layer by
    layer and leaves the others dense. ``scheme``: how a kernel becomes a matrix, see
    :class:`SVDConv2d`. The factors come from the SVD of the layer's present weight, so that full
    rank keeps the function to rounding and pretrained weights are kept as well as the rank allows.
    Forward and backward hooks of a layer go over to its factored one.

    A layer whose factors would hold no fewer numbers than its weight, a grouped convolution, a
    shared weight and the classifier (the last layer, if it is linear or a 1 x 1 convolution) stay
    dense; ``classifier`` factors the last of these as well, and naming a layer in a mapping
    overrides the first and the last. Every other module with a weight matrix of its own stays
    dense too, such as ``nn.MultiheadAttention``, which packs its projections into one. The
    returned module's ``factorization`` attribute (:class:`Factorization`) tells what was left
    dense and why.

    Raises TypeError or ValueError for a rank or scheme that is not allowed, a mapping that names no
    layer, and a net without any layer that can be factored.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    if not isinstance(classifier, bool):
        raise TypeError(f"classifier must be true or false, got {classifier!r}")
    for value in rank.values() if isinstance(rank, Mapping) else (rank,):
        _check_rank(value)
    model = copy.deepcopy(net)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    if isinstance(rank, Mapping) and (unknown := sorted(set(rank) - set(layers))):
        raise ValueError(
            f"rank names {unknown}, which are not linear or convolution layers; "
            f"there are {list(layers)}"
        )
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    places: dict[int, list[str]] = {}  # one module may stand under several names
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    left_dense = None if classifier else _classifier(layers)
    reports = []
    for name, layer in layers.items():
        explicit = isinstance(rank, Mapping) and rank.get(name) is not None
        wanted = rank.get(name) if isinstance(rank, Mapping) else rank
        matrix_shape = _matrix_shape(layer, scheme)
        full = min(matrix_shape)
        r = None if wanted is None else absolute_rank(wanted, full)
        note = ""
        if r is None:
            note = "not asked for"
        elif type(layer) not in (nn.Linear, nn.Conv2d):
            note = f"a subclass ({type(layer).__name__}) may not be what its base computes"
        elif isinstance(layer, nn.Conv2d) and layer.groups != 1:
            note = f"grouped convolution (groups={layer.groups})"
        elif isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            note = f"padding_mode={layer.padding_mode!r}"
        elif "weight" not in layer._parameters:
            note = "its weight is computed from other parameters"
        elif uses[id(layer.weight)] > 1:
            note = "weight shared with another module"
        elif name == left_dense and not explicit:
            note = "classifier"
        elif r > break_even_rank(*matrix_shape) and not explicit:
            note = f"rank {r} is above break-even rank {break_even_rank(*matrix_shape)}"
        dense_parameters = layer.weight.numel()
        if note or r is None:
            r, parameters = None, dense_parameters
        else:
            factored: FactoredLayer = (
                SVDConv2d.from_dense(layer, r, scheme)
                if isinstance(layer, nn.Conv2d)
                else SVDLinear.from_dense(layer, r)
            )
            factored.train(layer.training)
            _carry_requires_grad(layer, factored)
            carry_hooks(layer, factored)
            if name:
                for place in places[id(layer)]:
                    model.set_submodule(place, factored)
            else:
                model = factored
            parameters = r * (sum(matrix_shape) + 1)
        reports.append(
            LayerReport(name, type(layer).__name__, full, r, parameters, dense_parameters, note)
        )
    others = list(_others(model, layers))
    if all(report.rank is None for report in reports):
        reasons = [f"{report.name or 'net'}: {report.note}" for report in (*reports, *others)]
        asking = "a mapping {layer name: rank} asks for a layer"
        why = "; ".join([*reasons, asking if layers else "no nn.Linear or nn.Conv2d"])
        raise ValueError(f"net has no layer that can be factored ({why})")
    reports += others
    model.factorization = Factorization(tuple(reports))  # type: ignore[assignment]
    return model


def _check_rank(rank: object) -> None:
    allowed = (
        "a fraction in (0, 1], a whole number of at least 1, "
        "or a mapping from layer names to these or None"
    )
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise TypeError(f"rank must be {allowed}, got {rank!r}")
    if (isinstance(rank, int) and rank < 1) or (isinstance(rank, float) and not 0.0 < rank <= 1.0):
        raise ValueError(f"rank must be {allowed}, got {rank!r}")


def _matrix_shape(layer: nn.Linear | nn.Conv2d, scheme: Scheme) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    m, n = kernel_matrix(layer.weight.detach().to("meta"), scheme).shape
    return m, n


def _classifier(layers: Mapping[str, nn.Linear | nn.Conv2d]) -> str | None:
    """The last layer in the order of definition, if it is linear or a 1 x 1 convolution and not the
    only layer there is."""
    name, layer = list(layers.items())[-1] if len(layers) > 1 else (None, None)
    if isinstance(layer, nn.Conv2d):
        return name if layer.kernel_size == (1, 1) else None
    return name


def _others(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[LayerReport]:
    """What is said of modules that hold a weight matrix and are no linear or convolution layers."""
    for name, module in model.named_modules():
        if name in layers or isinstance(module, FactoredLayer):
            continue
        matrices = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
        # Positions (1, T, d) and scales (C, 1, 1) are vectors and tables, not maps.
        matrices = [p for p in matrices if p.shape[0] > 1 and p.shape[1] > 1]
        if not matrices:
            continue
        if isinstance(module, nn.MultiheadAttention):
            note = "packs its projections into one weight and does not call them as layers"
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            note = "an embedding looks up, it does not multiply"
        else:
            note = "neither nn.Linear nor nn.Conv2d"
        count = sum(p.numel() for p in matrices)
        full = max(min(len(p), p.numel() // len(p)) for p in matrices)
        yield LayerReport(name, type(module).__name__, full, None, count, count, note)


def _carry_requires_grad(layer: nn.Linear | nn.Conv2d, factored: FactoredLayer) -> None:
    for factor in (factored.U, factored.s, factored.V):
        factor.requires_grad_(layer.weight.requires_grad)
    if factored.bias is not None and layer.bias is not None:
        factored.bias.requires_grad_(layer.bias.requires_grad)
