"""What was measured, as numbers and as cells of tables, from the JSON of an experiment."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ...reports.page import count, number

_Row = Mapping[str, Any]
Value = Callable[[_Row], float | None]
"""Takes a number from the measurements at the end of an epoch; None if it was not finite."""
_Cell = Callable[[Sequence[_Row], _Row], str]
"""Makes the text of a table's cell from all rows of an experiment and the cell's own row."""


def whole_angle(epoch: _Row) -> float | None:
    """Angle of the whole gradient to BP's, in degrees."""
    cosine = epoch["alignment"]["cosine"]
    return None if cosine is None else math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def hidden_angle(epoch: _Row) -> float | None:
    """Mean angle over the hidden layers. The output layer comes last: every rule teaches it
    exactly."""
    return mean(list(epoch["alignment"]["layers"].values())[:-1])


def error(epoch: _Row) -> float | None:
    """Top-1 error in percent."""
    accuracy = epoch["test_accuracy"]
    return None if accuracy is None else 100 * (1 - accuracy)


def drift(epoch: _Row) -> float | None:
    """The largest orthogonality error of any factor."""
    found = [value for value in epoch["orthogonality"].values() if value is not None]
    return max(found) if found else None


def by_epoch(rows: Sequence[_Row], value: Value) -> dict[str, list[list[float | None]]]:
    """``value`` of each epoch of each seed, by method."""
    return {
        row["label"]: [[value(epoch) for epoch in history] for history in row["histories"]]
        for row in rows
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None if all are."""
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else None


def _last(row: _Row, value: Value) -> float | None:
    """Mean over the seeds after the last epoch."""
    return mean(value(history[-1]) for history in row["histories"])


def _largest(row: _Row, value: Value) -> float | None:
    found = [value(epoch) for history in row["histories"] for epoch in history]
    return max((v for v in found if v is not None), default=None)


def _angle_of(kind: str) -> _Cell:
    """Mean over layers or units, after the last epoch."""

    def angle(epoch: _Row) -> float | None:
        return mean(epoch["alignment"][kind].values())

    return lambda rows, row: number(_last(row, angle), "{:.1f}°")


def _layers_downhill(row: _Row) -> float | None:
    """Share of hidden layers whose gradient pointed downhill on the global loss, over all batches
    measured; in older results, over the angles in the tangent space at the ends of epochs."""
    epochs = [epoch["alignment"] for history in row["histories"] for epoch in history]
    shares = [epoch["layer_descent_share"] for epoch in epochs if "layer_descent_share" in epoch]
    if not shares:
        angles = [angle for epoch in epochs for angle in list(epoch["layers"].values())[:-1]]
        shares = [angle < 90 for angle in angles]
    return statistics.mean(shares) if shares and None not in shares else None


def _steps_downhill(row: _Row) -> float | None:
    """Share of the measured steps, over epochs and seeds, whose whole gradient pointed downhill."""
    return mean(epoch["alignment"]["descent_share"] for h in row["histories"] for epoch in h)


def _reaches(rows: Sequence[_Row], row: _Row, rival: str = "dfa-dense") -> str:
    """The first epoch at which the mean error over seeds is no more than the rival's last."""
    final = next((_last(other, error) for other in rows if other["variant"] == rival), None)
    if final is None:
        return "–"
    for epoch, seeds in enumerate(zip(*by_epoch([row], error)[row["label"]], strict=False), 1):
        reached = mean(seeds)
        if reached is not None and reached <= final:
            return str(epoch)
    return "never"


_DOWNHILL: dict[str, _Cell] = {
    "layers downhill": lambda rows, row: number(_layers_downhill(row), "{:.0%}"),
    "steps downhill": lambda rows, row: number(_steps_downhill(row), "{:.0%}"),
}
#: By drawing, columns of its table beyond those of every table.
COLUMNS: dict[str, dict[str, _Cell]] = {
    "angles": {
        "angle": lambda rows, row: number(_last(row, whole_angle), "{:.1f}°"),
        "hidden layers": lambda rows, row: number(_last(row, hidden_angle), "{:.1f}°"),
        **_DOWNHILL,
    },
    "layers": {"mean angle": _angle_of("layers"), **_DOWNHILL},
    "units": {"mean angle": _angle_of("units"), **_DOWNHILL},
    "errors": {"at DFA's last error after epoch": _reaches},
    "drift": {
        "last drift": lambda rows, row: number(_last(row, drift), "{:.1e}"),
        "largest drift": lambda rows, row: number(_largest(row, drift), "{:.1e}"),
        **_DOWNHILL,
    },
}


def cost_table(profiles: Mapping[str, Sequence[_Row]]) -> tuple[Sequence[str], list[list[str]]]:
    """Headings and rows: costs of training and of inference, each also as a ratio to the first
    method of the same network."""
    headings = ["network", "method", "parameters"]
    for of in ("a step", "an inference"):
        headings += [f"peak of {of} (MiB)", "× BP", f"MACs of {of}", "× BP"]
    rows = []
    for label, methods in profiles.items():
        first = _costs_of(methods[0])
        for row in methods:
            cells = [label, row["label"], f"{row['parameters']:,}"]
            for (cost, form), (whole, _) in zip(_costs_of(row), first, strict=True):
                there = cost is not None and whole
                cells += [form(cost), f"{cost / whole:.2f}"] if there else ["–", "–"]
            rows.append(cells)
    return headings, rows


def _costs_of(row: _Row) -> list[tuple[Any, Callable[[float], str]]]:
    """Costs in the order of the table, each with how it is written."""
    return [
        (row["memory"]["peak"], _mebibytes),
        (row["step_macs"], count),
        (row.get("inference_memory"), _mebibytes),
        (row["macs"], count),
    ]


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f}" if size >= 100 * 2**20 else f"{size / 2**20:.3g}"
