"""Results for people: a table on the console, and one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..training.config import evaluated_on
from . import figures
from .methods import named_settings
from .page import count, figure_grid, number, page, table

__all__ = [
    "break_even_rows",
    "break_even_table",
    "comparison_page",
    "console_table",
    "profile_page",
    "profile_table",
    "run_page",
]

HEADINGS = (
    "method",
    "accuracy",
    "parameters",
    "inference MACs",
    "peak training memory",
    "time per step",
    "× BP dense",
)
PROFILE = (
    "method",
    "peak (MiB)",
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "MACs of a step",
    "step × BP dense",
    "inference × BP dense",
)
NARROW_PROFILE = ("method", "MiB", "param", "grad", "optim", "activ", "MACs", "step", "infer")
NARROW = ("method", "accuracy", "parameters", "MACs", "memory", "step", "× BP")


def console_table(results: Mapping[str, Any]) -> Group:
    """The summary of a comparison as a table for the terminal."""
    caption = ["× BP: time of a step over that of BP with dense weights", *_own_settings(results)]
    table = Table(box=None, pad_edge=False, caption="\n".join(caption), caption_justify="left")
    for i, heading in enumerate(NARROW):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in results["summary"]:
        table.add_row(*_cells(row))
    return Group(Text(_job(results), style="bold"), table)


def comparison_page(results: Mapping[str, Any]) -> str:
    """``report.html`` of a comparison, from what its ``results.json`` holds."""
    summary = results["summary"]
    curves = {
        row["label"]: [run["history"] for run in results["runs"] if run["method"] == row["method"]]
        for row in summary
    }
    seeds = results["config"]["seeds"]
    count = seeds if isinstance(seeds, int) else len(seeds)
    shaded = ", mean over the seeds, the range between them shaded" if count > 1 else ""
    spread = ", mean ± standard deviation over the seeds" if count > 1 else ""
    images = _images(results)
    figure = [
        (
            figures.accuracy_curves(_column(curves, "test_accuracy"), images),
            f"{images.capitalize()} accuracy{shaded}.",
        ),
        (figures.loss_curves(_column(curves, "loss")), f"Training loss{shaded}."),
    ]
    measured = {row["label"]: row for row in summary if "memory" in row}
    if measured:
        figure += [
            (
                figures.bars(
                    {
                        label: {part: row["memory"][part] / 2**20 for part in _MEMORY_PARTS}
                        for label, row in measured.items()
                    },
                    "peak training memory (MiB)",
                ),
                "What one training step holds at its peak. Activations include the batch and "
                "temporaries.",
            ),
            (
                figures.bars(
                    {label: {"step": 1e3 * row["step_seconds"]} for label, row in measured.items()},
                    "time per step (ms)",
                ),
                "Median time of one training step.",
            ),
        ]
    return page(
        "Learning rules side by side",
        _job(results),
        results,
        "<h2>Results</h2>",
        table(HEADINGS, [_cells(row) for row in summary]),
        f'<p class="soft">{images.capitalize()} accuracy after the last epoch{spread}. '
        "MACs of one image. Times are medians of steps taken in turns.</p>",
        *_own_settings_part(results),
        "<h2>Figures</h2>",
        figure_grid(figure),
    )


def run_page(results: Mapping[str, Any], title: str) -> str:
    """``report.html`` of one run, from what its ``results.json`` holds."""
    history, images = {title: [results["history"]]}, _images(results)
    rows = [
        [
            str(row["epoch"]),
            number(row["loss"], "{:.3f}"),
            number(row["train_accuracy"], "{:.1%}"),
            number(row["test_loss"], "{:.3f}"),
            number(row["test_accuracy"], "{:.1%}"),
            f"{row['images_per_second']:,.0f}",
        ]
        for row in results["history"]
    ]
    config = results["config"]
    return page(
        title,
        f"{config['model']} on {config['data']}, {config['epochs']} epochs, seed {results['seed']}",
        results,
        f"<p>{images.capitalize()} accuracy {number(results['accuracy'], '{:.2%}')}, "
        f"{results['parameters']:,} parameters, {count(results['macs'])} MACs an image, "
        f"{results['train_seconds']:.0f} s of training.</p>",
        "<h2>Epochs</h2>",
        table(
            (
                *("epoch", "loss", "train accuracy"),
                *(f"{images} loss", f"{images} accuracy", "images/s"),
            ),
            rows,
        ),
        "<h2>Figures</h2>",
        figure_grid(
            [
                (
                    figures.accuracy_curves(_column(history, "test_accuracy"), images),
                    f"{images.capitalize()} accuracy.",
                ),
                (figures.loss_curves(_column(history, "loss")), "Training loss."),
            ]
        ),
    )


def profile_table(results: Mapping[str, Any]) -> Table:
    """A profile as a table for the terminal."""
    headings = _profile_headings(results, NARROW_PROFILE)
    caption = ["step and infer: time × BP dense"] if headings is NARROW_PROFILE else []
    caption += _own_settings(results)
    rows = Table(box=None, pad_edge=False, caption="\n".join(caption), caption_justify="left")
    for i, heading in enumerate(headings):
        rows.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in _profile_rows(results):
        rows.add_row(*row)
    return rows


def break_even_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a profile's break-even ranks, as plain text."""
    rows = results["break_even"]
    kinds = [kind for kind in ("macs", "forward", "training") if rows and kind in rows[0]]

    def share(rank: int | None, full: int) -> str:
        return "–" if rank is None else f"{rank} ({rank / full:.2f})"

    headings = ["layer", "input", "full rank", *("MACs" if k == "macs" else k for k in kinds)]
    return headings, [
        [
            row["layer"],
            " × ".join(map(str, row["input"][1:])),
            str(row["full_rank"]),
            *(share(row[kind], row["full_rank"]) for kind in kinds),
        ]
        for row in rows
    ]


def break_even_table(results: Mapping[str, Any]) -> Table:
    """The break-even ranks of a profile as a table for the terminal."""
    headings, rows = break_even_rows(results)
    title = "break-even rank (share of full rank)"
    found = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for i, heading in enumerate(headings):
        found.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        found.add_row(*row)
    return found


def profile_page(results: Mapping[str, Any]) -> str:
    """``report.html`` of a profile, from what its ``results.json`` holds."""
    config, methods = results["config"], results["methods"]
    bars = {
        row["label"]: {part: row["memory"][part] / 2**20 for part in _MEMORY_PARTS}
        for row in methods
    }
    grid = [
        (
            figures.bars(bars, "peak training memory (MiB)"),
            "What one training step holds at its peak. Activations include the batch and "
            "temporaries.",
        )
    ]
    if "step_ratio" in methods[0]:
        times = {row["label"]: {"step": row["step_ratio"]} for row in methods}
        grid.append((figures.bars(times, "time per step (× BP dense)"), "Steps taken in turns."))
    how = "worked out, nothing was run" if config["estimate"] else "measured"
    return page(
        f"What training {config['model']} costs",
        f"Batches of {config['batch_size']} images, {config['channels']} × "
        f"{config['image_size']} × {config['image_size']}; {how}",
        results,
        "<h2>Results</h2>",
        table(_profile_headings(results, PROFILE), list(_profile_rows(results))),
        '<p class="soft">MACs of matrix products and convolutions in one training step, forward '
        "and backward. Inference: one image through the compact model.</p>",
        *_own_settings_part(results),
        *_break_even_part(results),
        "<h2>Figures</h2>",
        figure_grid(grid),
    )


def _break_even_part(results: Mapping[str, Any]) -> list[str]:
    if not results["break_even"]:
        return []
    return [
        "<h2>Break-even rank by layer</h2>",
        table(*break_even_rows(results)),
        '<p class="soft">The largest rank, and its share of full rank, at which a factored layer '
        "costs no more than the dense one: MACs of an inference; where it was timed, a forward "
        "pass, and one with its backward pass, on the whole batch. –: at no rank that was "
        "timed.</p>",
    ]


def _profile_headings(results: Mapping[str, Any], headings: Sequence[str]) -> Sequence[str]:
    return headings if "step_ratio" in results["methods"][0] else headings[:-2]


def _profile_rows(results: Mapping[str, Any]) -> Iterator[list[str]]:
    for row in results["methods"]:
        parts = [row["memory"][part] for part in ("peak", *_MEMORY_PARTS)]
        cells = [row["label"], *(f"{part / 2**20:.1f}" for part in parts), count(row["step_macs"])]
        if "step_ratio" in row:
            cells += [f"{row['step_ratio']:.2f}", f"{row['latency_ratio']:.2f}"]
        yield cells


_MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations")


def _images(results: Mapping[str, Any]) -> str:
    return evaluated_on(results["config"].get("validation"))


def _own_settings(results: Mapping[str, Any]) -> list[str]:
    """A line for every method that has settings of its own."""
    rows = results["summary"] if "summary" in results else results["methods"]
    labels = {row["method"]: row["label"] for row in rows}
    settings = results["config"].get("settings", {})
    return [f"{labels[name]}: {named_settings(own)}" for name, own in settings.items() if own]


def _own_settings_part(results: Mapping[str, Any]) -> list[str]:
    return [f'<p class="soft">{html.escape(own)}</p>' for own in _own_settings(results)]


def _job(results: Mapping[str, Any]) -> str:
    config, data = results["config"], results["data"]
    seeds = config["seeds"] if isinstance(config["seeds"], int) else len(config["seeds"])
    return (
        f"{config['model']} on {data['name']}: {data['train']:,} training and "
        f"{data['test']:,} {_images(results)} images, {config['epochs']} epochs, "
        f"{seeds} seed{'s' * (seeds != 1)}"
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    accuracy = number(row["accuracy"], "{:.2%}")
    if row["accuracy_std"] is not None:
        accuracy += f" ± {100 * row['accuracy_std']:.2f}"
    if not row["complete"] and row["accuracy"] is not None:
        accuracy += " so far"
    if "memory" not in row:
        return [row["label"], accuracy, *["–"] * 5]
    return [
        row["label"],
        accuracy,
        f"{row['parameters']:,}",
        count(row["macs"]),
        f"{row['memory']['peak'] / 2**20:.1f} MiB",
        f"{1e3 * row['step_seconds']:.1f} ms",
        f"{row['step_ratio']:.2f}",
    ]


def _column(curves: Mapping[str, Sequence[Any]], key: str) -> dict[str, list[list[float | None]]]:
    return {
        label: [[row[key] for row in history] for history in histories]
        for label, histories in curves.items()
    }
