"""The state of a run's factored layers: ranks over time, spectra, orthogonality, size.

Read off the run folder alone: no model is built and no data is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ... import storage
from ...factors.rediagonalize import energy_rank, rediagonalize
from ...factors.stiefel import orthogonality_error
from ..reports.plots import curves
from ..reports.tables import terminal_table
from ..training.record import Record, write_json

_ENERGY = 0.99  #: share that ``rank_for_energy`` is about


@dataclass(frozen=True)
class LayerState:
    """A factored layer at the last checkpoint.

    ``ranks``: after each epoch. ``spectrum``: singular values, falling. ``kept_energy``: product of
    the shares of energy that the cuts kept. ``rank_for_energy``: smallest rank with 99 % of the
    present energy. ``orthogonality``: ``||X^T X - I||_F`` of U and of V. ``parameters``: of the
    factors; ``dense_parameters``: of the matrix.
    """

    name: str
    ranks: list[int]
    rank: int
    full_rank: int
    spectrum: list[float]
    kept_energy: float
    rank_for_energy: int
    orthogonality: tuple[float, float]
    parameters: int
    dense_parameters: int


def inspect_run(folder: str | Path) -> list[LayerState]:
    """The state of each factored layer of the run in ``folder``.

    Raises ValueError or FileNotFoundError for a folder without a run or a readable checkpoint, or
    a run whose weights are dense.
    """
    record = Record(folder)
    record.config()
    if not record.checkpoint_path.exists():
        raise ValueError(f"the run in {folder} has no checkpoint yet")
    state = storage.load(record.checkpoint_path)
    history = state["extra"]["trainer"]["history"]
    weights = state["model"]
    layers = []
    for key in weights:
        prefix, _, last = key.rpartition("U")
        if last or not {f"{prefix}{factor}" for factor in "UsV"} <= weights.keys():
            continue
        name = prefix.removesuffix(".")
        U, s, V = (weights[f"{prefix}{factor}"].double() for factor in "UsV")
        sigma = rediagonalize(U, s, V).s
        layers.append(
            LayerState(
                name=name,
                ranks=[row["ranks"][name] for row in history],
                rank=s.numel(),
                full_rank=min(len(U), len(V)),
                spectrum=sigma.tolist(),
                kept_energy=math.prod(row["kept_energy"].get(name, 1.0) for row in history),
                rank_for_energy=energy_rank(sigma, _ENERGY),
                orthogonality=(orthogonality_error(U).item(), orthogonality_error(V).item()),
                parameters=U.numel() + s.numel() + V.numel(),
                dense_parameters=len(U) * len(V),
            )
        )
    if not layers:
        raise ValueError(f"the run in {folder} has no factored layer")
    return layers


def table(layers: list[LayerState]) -> Table:
    """One row a layer: rank after the first epoch and now, full rank, rank for 99 % of the energy,
    energy that the cuts kept, spectrum, orthogonality error, size against dense."""
    headings = (
        "layer",
        "rank",
        "of",
        f"{_ENERGY:.0%}",
        "kept",
        "σ max",
        "σ min",
        "‖XᵀX−I‖",
        "size",
    )
    rows = []
    for layer in layers:
        ranks = list(dict.fromkeys(layer.ranks)) or [layer.rank]
        path = [ranks[0], layer.rank] if ranks[0] != layer.rank else [layer.rank]
        rows.append(
            [
                layer.name,
                " → ".join(map(str, path)),
                str(layer.full_rank),
                str(layer.rank_for_energy),
                f"{layer.kept_energy:.1%}",
                f"{layer.spectrum[0]:.3g}",
                f"{layer.spectrum[-1]:.3g}",
                f"{max(layer.orthogonality):.1e}",
                f"{layer.parameters / layer.dense_parameters:.0%}",
            ]
        )
    return terminal_table(headings, rows)


def write(folder: str | Path, layers: list[LayerState]) -> list[Path]:
    """Write ``inspect.json`` and the plots into ``folder``; the files' paths."""
    path = Path(folder, "inspect.json")
    write_json(path, {"layers": [vars(layer) for layer in layers]})
    return [path, *plots(folder, layers)]


def plots(folder: str | Path, layers: list[LayerState]) -> list[Path]:
    """``ranks`` and ``spectra``, as PNG and as SVG."""
    drawn = {
        "ranks": curves(
            {
                layer.name: [
                    [(i + 1, 100 * rank / layer.full_rank) for i, rank in enumerate(layer.ranks)]
                ]
                for layer in layers
            },
            "epoch",
            "rank (% of full rank)",
            whole=True,
        ),
        "spectra": curves(
            {
                layer.name: [
                    [
                        (100 * (i + 1) / layer.full_rank, value / (layer.spectrum[0] or 1.0))
                        for i, value in enumerate(layer.spectrum)
                    ]
                ]
                for layer in layers
            },
            "index (% of full rank)",
            "singular value / largest",
            log=True,
        ),
    }
    for name, plot in drawn.items():
        plot.save(Path(folder, name))
    return [Path(folder, f"{name}.{kind}") for name in drawn for kind in ("png", "svg")]
