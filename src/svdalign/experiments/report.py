"""Results for people: a table on the console, and one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from . import figures

__all__ = ["comparison_page", "console_table", "run_page"]

HEADINGS = (
    "method",
    "test accuracy",
    "parameters",
    "inference MACs",
    "peak training memory",
    "time per step",
    "× BP dense",
)
NARROW = ("method", "accuracy", "parameters", "MACs", "memory", "step", "× BP")

CSS = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --page: #fbfbf9; --card: #fff;
  --rule: #d9dde3; --mark: #2f6fb3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --page: #14181e;
  --card: #1b2027; --rule: #39414d; --mark: #7db4ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
.scroll + p { font-size: .88rem; margin-top: .6rem; }
.note { border-left: 3px solid var(--mark); padding: .2rem .8rem; margin: 1rem 0; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule);
  border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .75rem; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: .82rem;
  border-bottom: 1px solid var(--rule); }
tr + tr td { border-top: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--card); }
td:first-child { font-weight: 600; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: .5rem; }
figure svg { display: block; width: 100%; max-width: 30rem; height: auto; margin: 0 auto; }
svg text { font-family: inherit !important; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: .4rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem;
  margin: 0; } dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 1rem; font-size: .9rem; } summary { cursor: pointer; color: var(--soft); }
"""


def console_table(results: Mapping[str, Any]) -> Group:
    """The summary of a comparison as a table for the terminal."""
    table = Table(box=None, pad_edge=False)
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
    figure = [
        (figures.accuracy_curves(_column(curves, "test_accuracy")), f"Test accuracy{shaded}."),
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
    return _page(
        "Learning rules side by side",
        _job(results),
        results,
        "<h2>Results</h2>",
        _table(HEADINGS, [_cells(row) for row in summary]),
        f'<p class="soft">Accuracy after the last epoch{spread}. '
        "MACs of one image. Times are medians of steps taken in turns.</p>",
        "<h2>Figures</h2>",
        _figures(figure),
    )


def run_page(results: Mapping[str, Any], title: str) -> str:
    """``report.html`` of one run, from what its ``results.json`` holds."""
    history = {title: [results["history"]]}
    rows = [
        [
            str(row["epoch"]),
            _number(row["loss"], "{:.3f}"),
            _number(row["train_accuracy"], "{:.1%}"),
            _number(row["test_loss"], "{:.3f}"),
            _number(row["test_accuracy"], "{:.1%}"),
            f"{row['images_per_second']:,.0f}",
        ]
        for row in results["history"]
    ]
    config = results["config"]
    return _page(
        title,
        f"{config['model']} on {config['data']}, {config['epochs']} epochs, seed {results['seed']}",
        results,
        f"<p>Test accuracy {_number(results['accuracy'], '{:.2%}')}, {results['parameters']:,} "
        f"parameters, {_count(results['macs'])} MACs an image, "
        f"{results['train_seconds']:.0f} s of training.</p>",
        "<h2>Epochs</h2>",
        _table(("epoch", "loss", "train accuracy", "test loss", "test accuracy", "images/s"), rows),
        "<h2>Figures</h2>",
        _figures(
            [
                (figures.accuracy_curves(_column(history, "test_accuracy")), "Test accuracy."),
                (figures.loss_curves(_column(history, "loss")), "Training loss."),
            ]
        ),
    )


_MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations")


def _job(results: Mapping[str, Any]) -> str:
    config, data = results["config"], results["data"]
    seeds = config["seeds"] if isinstance(config["seeds"], int) else len(config["seeds"])
    return (
        f"{config['model']} on {data['name']}: {data['train']:,} training and "
        f"{data['test']:,} test images, {config['epochs']} epochs, {seeds} seed{'s' * (seeds != 1)}"
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    accuracy = _number(row["accuracy"], "{:.2%}")
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
        _count(row["macs"]),
        f"{row['memory']['peak'] / 2**20:.1f} MiB",
        f"{1e3 * row['step_seconds']:.1f} ms",
        f"{row['step_ratio']:.2f}",
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _count(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f}"


def _column(curves: Mapping[str, Sequence[Any]], key: str) -> dict[str, list[list[float | None]]]:
    return {
        label: [[row[key] for row in history] for history in histories]
        for label, histories in curves.items()
    }


def _page(title: str, subtitle: str, results: Mapping[str, Any], *parts: str) -> str:
    machine = results["machine"]
    facts = {
        "Command": results["command"],
        "Versions": f"svdalign {results['svdalign']}, torch {results['torch']}, "
        f"Python {results['python']}",
        "Commit": results["git"] or "not run from a checkout",
        "Machine": f"{machine['cpu']}, cores: {machine['cores']}, threads: {machine['threads']}, "
        f"device: {machine['device']}, {machine['system']}",
    }
    facts_html = "".join(f"<dt>{k}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    settings = "".join(
        f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>"
        for k, v in results["config"].items()
    )
    note = {
        "interrupted": "Interrupted: this is what was measured until then.",
        "diverged": "Stopped: the training loss was no longer finite.",
    }.get(results["status"])
    body = "\n".join(
        [
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="soft">{html.escape(subtitle)}</p>',
            f'<p class="note">{note}</p>' if note else "",
            *parts,
            "<h2>Where these numbers come from</h2>",
            f"<dl>{facts_html}</dl>",
            f"<details><summary>All settings</summary><dl>{settings}</dl></details>",
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)} – svdalign</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _figures(figures_: Sequence[tuple[str, str]]) -> str:
    return (
        '<div class="figures">'
        + "".join(
            f"<figure>{svg}<figcaption>{text}</figcaption></figure>" for svg, text in figures_
        )
        + "</div>"
    )
