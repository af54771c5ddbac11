"""Experiments for people: figures, tables, one page with all of them."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..figures import COLOURS, DASHES, Plot, bars, heat_map, lines
from ..page import count, figure_grid, number, page, table
from .measured import (
    COLUMNS,
    by_epoch,
    cost_table,
    drift,
    error,
    hidden_angle,
    whole_angle,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["experiment_figures", "experiment_table", "index_page"]

_PARTS = ("parameters", "gradients", "optimizer", "activations")


def experiment_figures(results: Mapping[str, Any]) -> list[tuple[Plot, str]]:
    """The figures of an experiment with their captions, from what its JSON holds."""
    drawing = results["drawing"]
    if drawing == "costs":
        return [
            plot
            for label, methods in results["profiles"].items()
            for plot in _costs(label, methods)
        ]
    rows = [row for row in results["rows"] if row["runs"]]
    if not rows:
        return []
    if drawing in ("layers", "units"):
        return [_angles(row, drawing) for row in rows if _angle_curves(row, drawing)]
    if drawing == "angles":
        return [
            (lines(by_epoch(rows, angle), "angle (degrees)"), caption)
            for angle, caption in (
                (whole_angle, "Of the gradient as a whole."),
                (hidden_angle, "Of the hidden layers, their mean."),
            )
        ]
    if drawing == "errors":
        return [(lines(by_epoch(rows, error), "test error (%)"), "Mean over the seeds.")]
    if drawing == "drift":
        curves = {
            label: [[value and math.log10(value) for value in seed] for seed in seeds]
            for label, seeds in by_epoch(rows, drift).items()
        }
        return [(lines(curves, "log10 of the largest ‖XᵀX − I‖"), "By what holds the factors.")]
    if drawing == "ranks":
        return [
            (_accuracy_by_rank(rows), "Rank as a share of full rank. Mean over the seeds."),
            *_rank_curves(rows),
        ]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    if drawing == "maps":
        return [(_map(results, setting), html.escape(setting)) for setting in settings]
    return [
        (
            bars(
                {row["label"]: {"accuracy": 100 * row["accuracy"]}
                 for row in rows if row["setting"] == setting and row["accuracy"] is not None},
                "test accuracy (%)",
            ),
            html.escape(setting) or "Mean over the seeds.",
        )
        for setting in settings
    ]  # fmt: skip


def experiment_table(results: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Headings and rows of an experiment's table, as plain text: of what has been run."""
    if results["drawing"] == "costs":
        return cost_table(results["profiles"])
    if results["drawing"] == "maps":
        return _map_table(results)
    settings = any(row["setting"] for row in results["rows"])
    ranks = any(row["x"] is not None for row in results["rows"])
    more = COLUMNS.get(results["drawing"], {})
    headings = [*["setting"] * settings, "method", *["rank"] * ranks]
    headings += ["test accuracy", "seeds", "parameters", "MACs"]
    headings += more
    rows = []
    for row in results["rows"]:
        if not row["runs"]:
            continue
        accuracy = number(row["accuracy"], "{:.2%}")
        if row["accuracy_std"] is not None:
            accuracy += f" ± {100 * row['accuracy_std']:.2f}"
        rank = "cut" if row["x"] is None else f"{row['x']:g}"
        cells = [*[row["setting"]] * settings, row["label"], *[rank] * ranks, accuracy]
        cells.append(str(row["runs"]))
        cells.append("–" if row["parameters"] is None else f"{row['parameters']:,}")
        cells.append("–" if row["macs"] is None else count(row["macs"]))
        cells += [measure(results["rows"], row) for measure in more.values()]
        rows.append(cells)
    return headings, rows


def index_page(experiments: Sequence[Mapping[str, Any]]) -> str:
    """One page with all ``experiments``."""
    parts = []
    for results in experiments:
        headings, rows = experiment_table(results)
        note = "" if results["status"] == "finished" else " So far: not all runs are done."
        parts += [
            f"<h2>{results['experiment']}: {html.escape(results['title'])}</h2>",
            f"<p>{html.escape(results['shows'])}{note}</p>",
            figure_grid(experiment_figures(results)),
            table(headings, rows),
        ]
    last = experiments[-1]
    status = "finished" if all(e["status"] == "finished" for e in experiments) else "interrupted"
    return page(
        "The paper's figures and tables",
        f"arXiv 2510.25594, at scale {last['scale']}",
        {**last, "status": status},
        *parts,
    )


# --- figures ------------------------------------------------------------------------------------


def _angle_curves(row: Mapping[str, Any], kind: str) -> dict[str, list[list[float | None]]]:
    """By layer or unit, for each seed, an angle an epoch."""
    names = dict.fromkeys(
        name
        for history in row["histories"]
        for epoch in history
        for name in epoch["alignment"][kind]
    )
    return {
        name: [[epoch["alignment"][kind].get(name) for epoch in h] for h in row["histories"]]
        for name in names
    }


def _angles(row: Mapping[str, Any], kind: str) -> tuple[Plot, str]:
    return lines(_angle_curves(row, kind), "angle (degrees)"), html.escape(row["label"])


def _map(results: Mapping[str, Any], setting: str) -> Plot:
    points = {
        (row["x"], row["y"]): 100 * row["accuracy"]
        for row in results["rows"]
        if row["setting"] == setting and row["accuracy"] is not None
    }
    x, y = results["axes"][setting]
    return heat_map(points, x, y, "test accuracy (%)")


def _map_table(results: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """A line for each value of y, its accuracies by rising x."""
    rows = []
    for setting, (x, y) in results["axes"].items():
        mine = [row for row in results["rows"] if row["setting"] == setting]
        for value in sorted({row["y"] for row in mine}):
            points = sorted((r["x"], r["accuracy"]) for r in mine if r["y"] == value)
            cells = [f"{at:g}: {number(accuracy, '{:.1%}')}" for at, accuracy in points]
            rows.append([setting, f"{y} = {value:g}", f"{x} {', '.join(cells)}"])
    return ["map", "line", "test accuracy"], rows


def _accuracy_by_rank(rows: Sequence[Mapping[str, Any]]) -> Plot:
    def draw(axes: Axes) -> None:
        curves = dict.fromkeys(row["curve"] for row in rows if row["x"] is not None)
        for i, curve in enumerate(curves):
            points = sorted(
                (row["x"], 100 * row["accuracy"])
                for row in rows
                if row["curve"] == curve and row["accuracy"] is not None
            )
            axes.plot(
                *zip(*points, strict=True), label=curve, marker="o", markersize=3,
                color=COLOURS[i % len(COLOURS)], dashes=DASHES[i % len(DASHES)],
            )  # fmt: skip
        axes.set_xlabel("rank, share of full rank")
        axes.set_ylabel("test accuracy (%)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)

    return Plot("Test accuracy by rank", draw)


def _rank_curves(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Plot, str]]:
    found = []
    for row in rows:
        if row["x"] is None:
            layers = dict.fromkeys(name for h in row["histories"] for e in h for name in e["ranks"])
            curves = {
                name: [[epoch["ranks"].get(name) for epoch in h] for h in row["histories"]]
                for name in layers
            }
            found.append((lines(curves, "rank"), f"Ranks by layer: {html.escape(row['label'])}."))
    return found


def _costs(label: str, methods: Sequence[Mapping[str, Any]]) -> list[tuple[Plot, str]]:
    memory = {
        row["label"]: {part: row["memory"][part] / 2**20 for part in _PARTS} for row in methods
    }
    name = html.escape(label)
    found = [(bars(memory, "peak training memory (MiB)"), f"{name}: what a step holds.")]
    for key, unit, title, caption in (
        ("step_macs", 1e9, "MACs of a step (billions)", "its arithmetic"),
        ("macs", 1e6, "MACs of an inference (millions)", "of one image, by what was trained"),
    ):
        macs = {row["label"]: {"MACs": row[key] / unit} for row in methods}
        found.append((bars(macs, title), f"{name}: {caption}."))
    if "step_ratio" in methods[0]:
        times = {row["label"]: {"time": row["step_ratio"]} for row in methods}
        found.append((bars(times, "time of a step (× BP)"), f"{name}: its time."))
    return found
