"""Figures, tables and the page of the experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...reports import plots
from ...reports.page import Figure, Section, Table, count, number, page
from ...reports.pages import ANGLES, angle_map, memory_bars, rank_map
from .measured import (
    COLUMNS,
    Value,
    by_epoch,
    cost_table,
    drift,
    error,
    hidden_angle,
    mean,
    whole_angle,
)


def experiment_figures(results: Mapping[str, Any]) -> list[Figure]:
    """The figures of an experiment, from what its JSON holds."""
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
        return _angles(rows, drawing)
    if drawing == "angles":
        return [
            Figure(_angle_curves(rows, angle), caption)
            for angle, caption in (
                (whole_angle, "Angle of the whole gradient."),
                (hidden_angle, "Mean angle of the hidden layers."),
            )
        ]
    if drawing == "errors":
        curves = plots.curves(_points(rows, error), "epoch", "test error (%)", whole=True)
        return [Figure(curves, "Mean over the seeds.")]
    if drawing == "drift":
        curves = plots.curves(
            _points(rows, drift), "epoch", "largest ‖XᵀX − I‖", whole=True, log=True
        )
        return [Figure(curves, "By how factors are kept orthonormal.")]
    if drawing == "ranks":
        return [
            Figure(_accuracy_by_rank(rows), "Rank as a share of full rank. Mean over the seeds."),
            *_rank_maps(rows),
        ]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    if drawing == "maps":
        return [Figure(_map(results, setting), setting) for setting in settings]
    scored = [row for row in rows if row["accuracy"] is not None]
    return [
        Figure(
            plots.bars(
                {row["label"]: {"accuracy": 100 * row["accuracy"]}
                 for row in scored if row["setting"] == setting},
                "test accuracy (%)",
                spread={row["label"]: 100 * (row["accuracy_std"] or 0.0)
                        for row in scored if row["setting"] == setting},
            ),
            setting or "Mean over the seeds, and their standard deviation.",
        )
        for setting in settings
        if any(row["setting"] == setting for row in scored)
    ]  # fmt: skip


def experiment_table(results: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Headings and rows of an experiment's table, as plain text, for the runs that there are."""
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
    sections = [
        Section(
            f"{results['experiment']}: {results['title']}",
            [results["shows"], *["So far: not all runs are done."] * (not _finished(results))],
            table=Table(*experiment_table(results)),
            figures=experiment_figures(results),
        )
        for results in experiments
    ]
    last = experiments[-1]
    status = "finished" if all(map(_finished, experiments)) else "interrupted"
    return page(
        "The paper's figures and tables",
        f"arXiv 2510.25594, at scale {last['scale']}",
        {**last, "status": status},
        sections,
    )


def _finished(results: Mapping[str, Any]) -> bool:
    return bool(results["status"] == "finished")


# --- figures ------------------------------------------------------------------------------------


def _points(rows: Sequence[Mapping[str, Any]], value: Value) -> dict[str, plots.Seeds]:
    """Points ``(epoch, value)`` of each seed, by method."""
    return {
        label: [list(enumerate(history, 1)) for history in seeds]
        for label, seeds in by_epoch(rows, value).items()
    }


def _angle_curves(rows: Sequence[Mapping[str, Any]], angle: Value) -> plots.Plot:
    """Angles by epoch, with a line at 90 degrees; the scale covers at least 0 to 100 degrees."""
    points = _points(rows, angle)
    values = [y for seeds in points.values() for seed in seeds for _, y in seed if y is not None]
    return plots.curves(
        points, "epoch", "angle (degrees)", lines={"90°": 90.0}, whole=True,
        limits=(0.0, max([100.0, *(1.05 * value for value in values)])),
    )  # fmt: skip


def _angles(rows: Sequence[Mapping[str, Any]], kind: str) -> list[Figure]:
    """The mean over layers or units by epoch, of all methods; a map by layer or unit of each."""
    maps = [
        Figure(plot, row["label"])
        for row in rows
        if (plot := angle_map(row["histories"], kind)) is not None
    ]
    means = _angle_curves(rows, lambda epoch: mean(epoch["alignment"][kind].values()))
    return [Figure(means, f"Mean over the {kind}: {ANGLES[kind]}."), *maps] if maps else []


def _map(results: Mapping[str, Any], setting: str) -> plots.Plot:
    """Accuracy by two options; all maps of the experiment on one scale of colours."""
    scored = [row for row in results["rows"] if row["accuracy"] is not None]
    values = [100 * row["accuracy"] for row in scored]
    found = {(r["x"], r["y"]): 100 * r["accuracy"] for r in scored if r["setting"] == setting}
    columns = sorted({x for x, _ in found})
    lines = sorted({y for _, y in found}, reverse=True)
    x, y = results["axes"][setting]
    return plots.heat_map(
        {f"{line:g}": [found.get((at, line)) for at in columns] for line in lines},
        [f"{at:g}" for at in columns],
        x,
        y,
        "test accuracy (%)",
        limits=(min(values, default=0.0), max(values, default=100.0)),
        form="{:.1f}",
    )


def _map_table(results: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """A line for each value of y: its accuracies by rising x, for the runs that there are."""
    rows = []
    for setting, (x, y) in results["axes"].items():
        mine = [r for r in results["rows"] if r["setting"] == setting and r["runs"]]
        for value in sorted({row["y"] for row in mine}):
            points = sorted((r["x"], r["accuracy"]) for r in mine if r["y"] == value)
            cells = [f"{at:g}: {number(accuracy, '{:.1%}')}" for at, accuracy in points]
            rows.append([setting, f"{y} = {value:g}", f"{x} {', '.join(cells)}"])
    return ["map", "line", "accuracy"], rows


def _accuracy_by_rank(rows: Sequence[Mapping[str, Any]]) -> plots.Plot:
    names = dict.fromkeys(row["curve"] for row in rows if row["x"] is not None)
    points = {
        name: [
            sorted(
                (row["x"], 100 * row["accuracy"])
                for row in rows
                if row["curve"] == name and row["x"] is not None and row["accuracy"] is not None
            )
        ]
        for name in names
    }
    return plots.curves(points, "rank, share of full rank", "test accuracy (%)")


def _rank_maps(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    return [
        Figure(plot, f"Ranks by layer: {row['label']}.")
        for row in rows
        if row["x"] is None and (plot := rank_map(row["histories"])) is not None
    ]


def _costs(label: str, methods: Sequence[Mapping[str, Any]]) -> list[Figure]:
    found = [Figure(memory_bars(methods), f"{label}: memory of a step.")]
    for key, unit, title, caption in (
        ("step_macs", 1e9, "MACs of a step (billions)", "its arithmetic"),
        ("macs", 1e6, "MACs of an inference (millions)", "of one image, by what was trained"),
    ):
        macs = {row["label"]: {"MACs": row[key] / unit} for row in methods}
        found.append(Figure(plots.bars(macs, title), f"{label}: {caption}."))
    if "step_ratio" in methods[0]:
        times = {row["label"]: {"time": row["step_ratio"]} for row in methods}
        found.append(Figure(plots.bars(times, "time of a step (× BP)"), f"{label}: its time."))
    return found
