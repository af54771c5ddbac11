"""What each page shows: of a run, a comparison, a profile."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from . import plots
from .page import Figure, Section, Table, count, number, page
from .plots import Seeds
from .tables import (
    COLUMNS,
    MEMORY_PARTS,
    at_chance,
    beside_backpropagation,
    break_even_rows,
    chance,
    chance_note,
    comparison_rows,
    images,
    job,
    own_settings,
    profile_headings,
    profile_rows,
)

#: What is measured for each layer, and for each unit.
ANGLES = {
    "layers": "angle of gradient to BP's (degrees)",
    "units": "angle of feedback to forward path (degrees)",
}

#: Columns of a run's page, a row an epoch: heading, key of the row of ``history``, format.
_EPOCHS = (
    ("epoch", "epoch", "{}"), ("loss", "loss", "{:.3f}"),
    ("training accuracy", "train_accuracy", "{:.1%}"), ("{test} loss", "test_loss", "{:.3f}"),
    ("{test} accuracy", "test_accuracy", "{:.1%}"), ("learning rate", "lr", "{:.2g}"),
    ("images/s", "images_per_second", "{:,.0f}"),
)  # fmt: skip

_HELD = "Memory of one training step at its peak. Activations include the batch and temporaries."

_Runs = Sequence[Mapping[str, Any]]


def comparison_page(results: Mapping[str, Any]) -> str:
    """``report.html`` of a comparison, from what its ``results.json`` holds."""
    rows = {row["label"]: row for row in results["summary"]}
    runs = {
        label: [run for run in results["runs"] if run["method"] == row["method"]]
        for label, row in rows.items()
    }
    several = any(len(mine) > 1 for mine in runs.values())
    spread = ", mean ± standard deviation over the seeds" if several else ""
    return page(
        "Learning rules side by side",
        job(results),
        results,
        [
            Section(
                "Results",
                text=beside_backpropagation(results),
                table=_comparison_table(results, list(runs.values())),
                notes=[
                    f"{images(results).capitalize()} accuracy after the last epoch{spread}; by "
                    "seed: of each run. Parameters and MACs of one image: of the network that "
                    "training leaves. Times are medians of steps taken in turns.",
                    *chance_note(results),
                    *own_settings(results),
                ],
                figures=_trade(results, rows),
            ),
            Section("Learning", figures=_learning(results, runs, several)),
            Section("What a step costs", figures=_costs(rows)),
            *_inside(runs),
        ],
        key=list(rows),
    )


def run_page(results: Mapping[str, Any], title: str) -> str:
    """``report.html`` of one run, from what its ``results.json`` holds."""
    config, history, kind = results["config"], results["history"], images(results)
    lines = {"chance": 100 * chance(results)}
    sides = {"training": "train", kind: "test"}
    accuracy = {side: [_points(history, f"{key}_accuracy", 100)] for side, key in sides.items()}
    losses = {"training": [_points(history, "loss")], kind: [_points(history, "test_loss")]}
    marked = " (at chance)" if at_chance(results["accuracy"], results) else ""
    headings = [heading.format(test=kind) for heading, _, _ in _EPOCHS]
    rows = [[number(row.get(key), form) for _, key, form in _EPOCHS] for row in history]
    return page(
        title,
        f"{job({**results, 'config': {**config, 'seeds': 1}})} ({results['seed']})",
        results,
        [
            Section(
                "Result",
                [
                    f"{kind.capitalize()} accuracy {number(results['accuracy'], '{:.2%}')}"
                    f"{marked}, {results['parameters']:,} parameters, {count(results['macs'])} "
                    f"MACs an image, {results['train_seconds']:.0f} s of training."
                ],
                figures=[
                    Figure(
                        plots.curves(
                            accuracy, "epoch", "accuracy (%)", lines=lines, whole=True,
                            limits=_limits(accuracy.values(), [100 * chance(results)]),
                        ),
                        f"Accuracy on training and on {kind} images.",
                    ),
                    Figure(plots.curves(losses, "epoch", "loss", whole=True), "Mean loss."),
                ],
            ),
            *_inside({title: [results]}),
            Section("Epochs", table=Table(headings, rows)),
        ],
    )  # fmt: skip


def profile_page(results: Mapping[str, Any]) -> str:
    """``report.html`` of a profile, from what its ``results.json`` holds."""
    config, methods = results["config"], results["methods"]
    grid = [Figure(memory_bars(methods), _HELD)]
    if "step_ratio" in methods[0]:
        times = {row["label"]: {"step": row["step_ratio"]} for row in methods}
        grid.append(
            Figure(
                plots.bars(times, "time per step (× BP dense)", keyed=True), "Steps taken in turns."
            )
        )
    how = "worked out, nothing was run" if config["estimate"] else "measured"
    return page(
        f"What training {config['model']} costs",
        f"Batches of {config['batch_size']} images, {config['channels']} × "
        f"{config['image_size']} × {config['image_size']}; {how}",
        results,
        [
            Section(
                "Results",
                table=Table(profile_headings(results), list(profile_rows(results)), keyed=True),
                notes=[
                    "MACs of matrix products and convolutions in one training step, forward and "
                    "backward. Inference: one image through the compact model.",
                    *own_settings(results),
                ],
                figures=grid,
            ),
            *_break_even(results),
        ],
        key=[row["label"] for row in methods],
    )


def memory_bars(methods: _Runs) -> plots.Plot:
    """Peak memory of a training step by method, and what it is made of."""
    parts = {
        row["label"]: {part: row["memory"][part] / 2**20 for part in MEMORY_PARTS}
        if "memory" in row
        else None
        for row in methods
    }
    return plots.bars(parts, "peak training memory (MiB)", keyed=True)


def angle_map(histories: Sequence[_Runs], kind: str = "layers") -> plots.Plot | None:
    """Means over seeds of the quantities in ``ANGLES``, by layer or unit and epoch; None if they
    were not measured."""
    measured = [[row for row in history if "alignment" in row] for history in histories]
    rows = _by_layer([[row["alignment"][kind] for row in history] for history in measured])
    if not rows:
        return None
    epochs = [str(row["epoch"]) for row in max(measured, key=len)]
    return plots.heat_map(
        rows, epochs, "epoch", kind.removesuffix("s"), ANGLES[kind], centre=90.0,
        limits=(0.0, 120.0),
    )  # fmt: skip


def rank_map(histories: Sequence[_Runs]) -> plots.Plot | None:
    """Mean rank over seeds, by layer and epoch; None if no rank ever changed."""
    rows = _by_layer([[row["ranks"] for row in history] for history in histories])
    if all(len(set(ranks)) == 1 for ranks in rows.values()):
        return None
    epochs = [str(row["epoch"]) for row in max(histories, key=len)]
    return plots.heat_map(rows, epochs, "epoch", "layer", "rank")


def _comparison_table(results: Mapping[str, Any], runs: Sequence[_Runs]) -> Table:
    """The table of a comparison, with single runs and learning rates, for wide screens."""
    headings = [column.heading for column in COLUMNS]
    headings[2:2] = ["by seed", "learning rate"]
    rows = []
    for cells, mine in zip(comparison_rows(results), runs, strict=True):
        single = ", ".join(number(run["accuracy"], "{:.1%}") for run in mine) or "–"
        rates = ", ".join(dict.fromkeys(f"{run['config']['lr']:g}" for run in mine)) or "–"
        rows.append([*cells[:2], single, rates, *cells[2:]])
    return Table(headings, rows, keyed=True)


def _learning(results: Mapping[str, Any], runs: Mapping[str, _Runs], several: bool) -> list[Figure]:
    """Accuracy over epochs, time and arithmetic, on one scale, and the loss."""
    kind, guess = images(results), 100 * chance(results)
    shaded = " Mean over the seeds, the range between them shaded." if several else ""
    scales: dict[str, tuple[dict[str, Seeds], str]] = {
        "epoch": (_accuracies(runs), f"{kind.capitalize()} accuracy by epoch.{shaded}"),
        "training time (s)": (
            _accuracies(runs, _seconds),
            "The same against seconds of training; the machine may have been busy with more.",
        ),
    }
    macs = {row["method"]: row.get("step_macs") for row in results["summary"]}
    if all(macs.values()):

        def arithmetic(run: Mapping[str, Any]) -> list[float]:
            size, count = run["config"]["batch_size"], results["data"]["train"]
            each = macs[run["method"]] * max(count // size, 1) / 1e12
            return [each * (i + 1) for i in range(len(run["history"]))]

        scales["arithmetic (10¹² MACs)"] = (
            _accuracies(runs, arithmetic),
            "The same against multiply-accumulates of training steps, at the ranks they start "
            "with.",
        )
    limits = _limits([seeds for data, _ in scales.values() for seeds in data.values()], [guess])
    found = [
        Figure(
            plots.curves(
                data, x, f"{kind} accuracy (%)", limits=limits, lines={"chance": guess},
                whole=x == "epoch", keyed=True,
            ),
            caption,
        )
        for x, (data, caption) in scales.items()
    ]  # fmt: skip
    losses = {label: [_points(run["history"], "loss") for run in mine]
              for label, mine in runs.items()}  # fmt: skip
    loss = plots.curves(losses, "epoch", "training loss", whole=True, keyed=True)
    return [*found, Figure(loss, f"Training loss by epoch.{shaded}")]


def _trade(results: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """Accuracy against memory and against size, on one scale."""
    scored = [row for row in rows.values() if "memory" in row and row["accuracy"] is not None]
    if not scored:
        return []
    kind, guess = images(results), 100 * chance(results)
    limits = _limits(
        [],
        [
            100 * (row["accuracy"] + sign * (row["accuracy_std"] or 0.0))
            for row in scored
            for sign in (-1, 1)
        ],
    )
    sizes: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "peak training memory (MiB)": lambda row: row["memory"]["peak"] / 2**20,
        "parameters (thousands)": lambda row: row["parameters"] / 1e3,
    }
    captions = ("Accuracy against memory: up and to the left is better.",
                "Accuracy against the size of the trained network.")  # fmt: skip
    return [
        Figure(
            plots.scatter(
                {
                    label: (size(row), 100 * row["accuracy"], 100 * (row["accuracy_std"] or 0))
                    if row in scored
                    else None
                    for label, row in rows.items()
                },
                x, f"{kind} accuracy (%)", limits=limits, lines={"chance": guess}, keyed=True,
            ),
            caption,
        )
        for (x, size), caption in zip(sizes.items(), captions, strict=True)
    ]  # fmt: skip


def _costs(rows: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """Memory and time of a step."""
    if not any("memory" in row for row in rows.values()):
        return []
    times = {
        label: {"step": 1e3 * row["step_seconds"]} if "memory" in row else None
        for label, row in rows.items()
    }
    return [
        Figure(memory_bars(list(rows.values())), _HELD),
        Figure(plots.bars(times, "time per step (ms)", keyed=True),
               "Median time of one training step."),
    ]  # fmt: skip


def _inside(runs: Mapping[str, _Runs]) -> list[Section]:
    """Ranks, spectra and angles by layer, where there are any."""
    ranks, spectra, angles = [], [], []
    for i, (label, mine) in enumerate(runs.items()):
        histories = [run["history"] for run in mine if run["history"]]
        if not histories:
            continue
        if plot := rank_map(histories):
            ranks.append(Figure(plot, f"{label}: rank by layer and epoch.", i))
        if layers := _spectra(histories[0]):
            plot = plots.spectra(layers, "index (% of the rank)", "singular value / largest")
            spectra.append(Figure(plot, f"{label}: singular values, a line an epoch, the last "
                                  "darkest.", i))  # fmt: skip
        if plot := angle_map(histories):
            angles.append(Figure(plot, f"{label}: angle of each layer's gradient to BP's; 90° "
                                 "is no better than chance.", i))  # fmt: skip
    parts = {"Ranks": ranks, "Spectra": spectra, "Angles to backpropagation": angles}
    return [Section(name, figures=figures) for name, figures in parts.items() if figures]


def _break_even(results: Mapping[str, Any]) -> list[Section]:
    if not results["break_even"]:
        return []
    note = (
        "The largest rank, and its share of full rank, at which a factored layer costs no more "
        "than the dense one: MACs of an inference; where it was timed, a forward pass, and one "
        "with its backward pass, on the whole batch. –: at no rank that was timed."
    )
    table = Table(*break_even_rows(results))
    return [Section("Break-even rank by layer", table=table, notes=[note])]


def _accuracies(
    runs: Mapping[str, _Runs], at: Callable[[Mapping[str, Any]], Sequence[float]] | None = None
) -> dict[str, Seeds]:
    """Accuracy of each run in percent, by label; ``at``: the x values of a run's epochs."""
    return {
        label: [
            _points(run["history"], "test_accuracy", 100, None if at is None else at(run))
            for run in mine
        ]
        for label, mine in runs.items()
    }


def _points(
    history: _Runs, key: str, scale: float = 1.0, at: Sequence[float] | None = None
) -> list[tuple[float, float | None]]:
    xs = [row["epoch"] for row in history] if at is None else at
    values = [row[key] for row in history]
    return [(x, None if v is None else scale * v) for x, v in zip(xs, values, strict=True)]


def _seconds(run: Mapping[str, Any]) -> list[float]:
    """Seconds of training until the end of each epoch."""
    total, found = 0.0, []
    for row in run["history"]:
        total += row["seconds"]
        found.append(total)
    return found


def _limits(curves: Iterable[Seeds], others: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis on which all of these fit."""
    values = [y for seeds in curves for seed in seeds for _, y in seed if y is not None]
    values += others
    room = max(0.06 * (max(values) - min(values)), 0.5)
    return min(values) - room, max(values) + room


def _by_layer(histories: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[float | None]]:
    """Mean over seeds by name and epoch; ``histories``: a mapping for each epoch, for each seed."""
    names = dict.fromkeys(name for history in histories for epoch in history for name in epoch)
    epochs = max(map(len, histories), default=0)
    found: dict[str, list[float | None]] = {}
    for name in names:
        columns = [[h[i].get(name) for h in histories if i < len(h)] for i in range(epochs)]
        there = [[value for value in column if value is not None] for column in columns]
        found[name] = [statistics.mean(values) if values else None for values in there]
    return found


def _spectra(history: _Runs) -> dict[str, list[list[float]]]:
    """Singular values after each epoch, by layer; at most six layers, evenly spread."""
    epochs = [row["spectra"] for row in history if row.get("spectra")]
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch))
    if len(names) > 6:
        names = [names[round(i * (len(names) - 1) / 5)] for i in range(6)]
    return {name: [epoch[name] for epoch in epochs if name in epoch] for name in names}
