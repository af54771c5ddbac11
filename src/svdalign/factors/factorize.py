"""Turn the layers of any ``nn.Module`` into factored ones, and report what stayed dense and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.parameter import is_lazy

from .._copying import copied
from .._encoders import settle_fast_path
from .._table import as_html, as_text
from .._tracing import carry_hooks
from .layers import (
    SCHEMES,
    FactoredLayer,
    Scheme,
    absolute_rank,
    break_even_rank,
    check_rank,
    factored_layers,
)
from .registry import dense_names, factored_type, own_matrices

Rank = (
    float | int | None
)  #: a fraction of full rank in (0, 1], an absolute rank, or None: leave dense


@dataclass(frozen=True)
class LayerReport:
    """What :func:`factorize` did to one layer with a weight.

    ``rank`` is None if it stayed dense; ``note`` says why, and also where a rank was capped.
    ``parameters`` is the size of the weight as it is now, ``dense_parameters`` as it was.
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
    """What :func:`factorize` did, a :class:`LayerReport` for each layer with a weight.

    Ranks and parameters are read from the model each time, so they are right also after a rank cut
    or a load.
    """

    model: nn.Module = field(repr=False)
    first: tuple[LayerReport, ...] = field(repr=False)

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """The layers as they are now."""
        layers = factored_layers(self.model, every_name=True)
        return tuple(_updated(report, layers.get(report.name)) for report in self.first)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __str__(self) -> str:
        return as_text(self._rows())

    def _repr_html_(self) -> str:
        return as_html(self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            ("layer", "kind", "rank", "of", "parameters", "dense", "note"),
            *(
                (row.name, row.kind, "dense" if row.rank is None else str(row.rank),
                 str(row.full_rank), f"{row.parameters:,}", f"{row.dense_parameters:,}", row.note)
                for row in self.layers
            ),
        ]  # fmt: skip


def _updated(report: LayerReport, layer: FactoredLayer | None) -> LayerReport:
    if layer is None:
        return report
    return replace(report, rank=layer.rank, parameters=_numbers(layer))


def factorize(
    net: nn.Module,
    rank: Rank | Mapping[str, Rank] = 0.5,
    scheme: Scheme = "channel",
    *,
    classifier: bool = False,
) -> nn.Module:
    """A copy of ``net`` whose linear and convolution layers are held as ``U diag(s) V^T``.

    The factors come from the SVD of the layer's present weight, so that full rank keeps the
    function to rounding and pretrained weights are kept as well as the rank allows. Forward and
    backward hooks of a layer go over to its factored one.

    Factored are ``nn.Linear``, convolutions and transposed convolutions of one to three axes, and
    the ``Conv1D`` of Hugging Face's transformers. These stay dense: a layer whose factors would
    hold no fewer numbers than its weight; a grouped convolution; a shared weight; one computed from
    other parameters, as by ``weight_norm``; the classifier; and every other module with a weight
    matrix, such as ``nn.MultiheadAttention``, which packs its projections into one. The copy's
    attribute ``factorization`` (:class:`Factorization`) lists what stayed dense and why.

    Args:
        net: any ``nn.Module``. It is left as it is.
        rank: a float in (0, 1] is a fraction of each layer's full rank ``min(m, n)``, rounded up;
            it is capped at the break-even rank, the largest at which ``U`` (m, r), ``s`` (r,) and
            ``V`` (n, r) hold fewer numbers than the weight (m, n). An int is an absolute rank, at
            most the full one. A mapping ``{layer name: rank or None}`` decides layer by layer,
            without that cap, for the classifier as well; layers that it does not name stay dense.
        scheme: how the kernel (N, C, H, W) of a convolution becomes a matrix: "channel",
            (N, C H W), or "spatial", (N W, C H), which is the paper's. No matter for linear layers.
        classifier: whether to factor the classifier too: the last layer, if it maps every position
            by itself.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for a rank or scheme that is not allowed; a mapping that names no layer; a net
            without any layer that can be factored; a layer to be factored whose weight has no
            values yet (lazy, or on the meta device) or some that are NaN or infinite.

    Source: arXiv 2510.25594; :mod:`svdalign.factors.layers.convolution` has the two schemes.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    if not isinstance(classifier, bool):
        raise TypeError(f"classifier must be true or false, got {classifier!r}")
    for value in rank.values() if isinstance(rank, Mapping) else (rank,):
        if value is not None:
            check_rank("rank", value, ", or a mapping from layer names to these or None")
    _check_not_lazy(net)
    model = copied(net)
    layers = {name: m for name, m in model.named_modules() if factored_type(m)}
    if isinstance(rank, Mapping) and (unknown := sorted(set(rank) - set(layers))):
        raise ValueError(
            f"rank names {unknown}, which are not linear or convolution layers; "
            f"there are {list(layers)}"
        )
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    places: dict[int, list[str]] = {}  # one module may stand under several names
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    left_dense = None if classifier else classifier_name(layers)
    reports = []
    for name, layer in layers.items():
        kind = factored_type(layer)
        assert kind is not None
        explicit = isinstance(rank, Mapping)
        wanted = rank.get(name) if isinstance(rank, Mapping) else rank
        m, n = kind.to_matrix(layer.weight.detach().to("meta"), scheme).shape
        most = break_even_rank(m, n)
        r = None if wanted is None else absolute_rank(wanted, min(m, n))
        note, dense_parameters = "", layer.weight.numel()
        if r is None:
            note = "not asked for"
        elif reason := kind.refusal(layer):
            note, r = reason, None
        elif uses[id(layer.weight)] > 1:
            note, r = "weight shared with another module", None
        elif name == left_dense and not explicit:
            note, r = "classifier", None
        elif r > most and not explicit:
            if isinstance(wanted, float) and most:
                note, r = f"capped at break-even rank {most}", most
            else:
                note, r = f"rank {r} is above break-even rank {most}", None
        if r is not None:
            try:
                factored = kind.from_dense(layer, r, scheme)
            except ValueError as error:
                raise ValueError(f"net's layer {name!r} cannot be factored: {error}") from error
            factored.train(layer.training)
            _carry_requires_grad(layer, factored)
            carry_hooks(layer, factored)
            if name:
                for place in places[id(layer)]:
                    model.set_submodule(place, factored)
            else:
                model = factored
        parameters = dense_parameters if r is None else _numbers(factored)
        reports.append(
            LayerReport(
                name, type(layer).__name__, min(m, n), r, parameters, dense_parameters, note
            )
        )
    others = list(_others(model, layers))
    if all(report.rank is None for report in reports):
        reasons = [f"{report.name or 'net'}: {report.note}" for report in (*reports, *others)]
        asking = "a mapping {layer name: rank} asks for a layer"
        why = "; ".join([*reasons, asking if layers else f"it has none of {dense_names()}"])
        raise ValueError(f"net has no layer that can be factored ({why})")
    settle_fast_path(model, set(factored_layers(model).values()))
    model.factorization = Factorization(model, (*reports, *others))  # type: ignore[assignment]
    return model


def _check_not_lazy(net: nn.Module) -> None:
    lazy = [
        f"{name!r} ({type(module).__name__})"
        for name, module in net.named_modules()
        if any(is_lazy(p) for p in (*module._parameters.values(), *module._buffers.values()))
    ]
    if lazy:
        raise ValueError(
            f"net has lazy modules without a shape yet, {', '.join(lazy)}: run it on a batch first"
        )


def classifier_name(layers: Mapping[str, nn.Module]) -> str | None:
    """The last layer in the order of definition, if it maps every position by itself and is not the
    only layer there is."""
    if len(layers) < 2:
        return None
    name, layer = list(layers.items())[-1]
    kind = factored_type(layer)
    return name if kind is not None and kind.is_pointwise(layer) else None


def _others(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[LayerReport]:
    """Reports on modules that have a weight matrix and are of no type that can be factored."""
    factored = factored_layers(model)
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{layer}.parametrizations.") for layer in layers)
        matrices = own_matrices(module)
        if name in layers or name in factored or inside or not matrices:
            continue
        if isinstance(module, nn.MultiheadAttention):
            note = "packs its projections into one weight and does not call them as layers"
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            note = "an embedding looks up, it does not multiply"
        else:
            note = f"none of {dense_names()}"
        count = sum(p.numel() for p in matrices)
        full = max(min(len(p), p.numel() // len(p)) for p in matrices)
        yield LayerReport(name, type(module).__name__, full, None, count, count, note)


def _numbers(layer: FactoredLayer) -> int:
    return sum(factor.numel() for factor in (layer.U, layer.s, layer.V))


def _carry_requires_grad(layer: nn.Module, factored: FactoredLayer) -> None:
    for factor in (factored.U, factored.s, factored.V):
        factor.requires_grad_(layer.get_parameter("weight").requires_grad)
    if factored.bias is not None:
        factored.bias.requires_grad_(layer.get_parameter("bias").requires_grad)
