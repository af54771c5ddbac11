"""Tables of the results: headings and rows as plain text, and the same for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.text import Text

from ..training.config import evaluated_on
from .page import count, number

MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations")
_AT_CHANCE = " †"  #: behind an accuracy that is no better than guessing

_PROFILE = (
    *("method", "peak (MiB)", "parameters", "gradients", "optimizer", "activations"),
    *("MACs of a step", "step × BP dense", "inference × BP dense"),
)
_NARROW_PROFILE = ("method", "MiB", "param", "grad", "optim", "activ", "MACs", "step", "infer")


@dataclass(frozen=True)
class Column:
    """A column of a comparison. ``cell``: its text, from a row of the summary and all results.
    ``short``: its heading on a terminal, if that differs."""

    heading: str
    cell: Callable[[Mapping[str, Any], Mapping[str, Any]], str]
    short: str = ""


def _accuracy(row: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    accuracy = number(row["accuracy"], "{:.2%}")
    if row["accuracy_std"] is not None:
        accuracy += f" ± {100 * row['accuracy_std']:.2f}"
    if at_chance(row["accuracy"], results):
        accuracy += _AT_CHANCE
    if not row["complete"] and row["accuracy"] is not None:
        accuracy += " so far"
    return accuracy


def _cell(key: str, form: str, scale: float = 1.0) -> Callable[..., str]:
    """The cell of a number: ``row[key]`` times ``scale``, in the format ``form``."""
    return lambda row, _: number(row[key] * scale if key in row else None, form)


COLUMNS = (
    Column("method", lambda row, _: row["label"]),
    Column("accuracy", _accuracy),
    Column("parameters", _cell("parameters", "{:,}", 1)),
    Column("inference MACs", lambda row, _: count(row["macs"]) if "macs" in row else "–", "MACs"),
    Column(
        "peak training memory",
        lambda row, _: f"{row['memory']['peak'] / 2**20:.1f} MiB" if "memory" in row else "–",
        "memory",
    ),
    Column("time per step", _cell("step_seconds", "{:.1f} ms", 1e3), "step"),
    Column("× BP dense", _cell("step_ratio", "{:.2f}"), "× BP"),
)  #: of a comparison, on the terminal and on its page


class _Parts(Group, JupyterMixin):
    """Text and tables one below the other, on a terminal as in a notebook."""


def comparison_table(results: Mapping[str, Any]) -> _Parts:
    """The summary of a comparison for the terminal."""
    caption = ["× BP: time of a step over that of BP with dense weights"]
    caption += [*chance_note(results), *own_settings(results)]
    return _Parts(
        Text(job(results), style="bold"),
        terminal_table(
            [column.short or column.heading for column in COLUMNS],
            comparison_rows(results),
            caption=caption,
        ),
        *map(Text, beside_backpropagation(results)),
    )


def beside_backpropagation(results: Mapping[str, Any]) -> list[str]:
    """A line that compares memory and accuracy of each other method with the backpropagation that
    takes the least memory, if there are both, and a line on differences that may be chance."""
    whole = [row for row in results["summary"] if row["complete"] and "memory" in row]
    back = [row for row in whole if row["method"].split("-")[0] == "bp"]
    others = [row for row in whole if row not in back and row["accuracy"] is not None]
    if not back or not others:
        return []
    lean = min(back, key=lambda row: row["memory"]["peak"])
    parts = [
        f"{row['label']} takes {row['memory']['peak'] / lean['memory']['peak']:.2f} times its "
        f"memory for {100 * (row['accuracy'] - lean['accuracy']):+.1f} points of accuracy"
        for row in others
    ]
    lines = [f"Beside {lean['label']}, the leanest backpropagation: {'; '.join(parts)}."]
    if all(row["runs"] == 1 for row in whole):
        p, n = lean["accuracy"], results["data"]["test"]
        noise = 200 * math.sqrt(2 * p * (1 - p) / n)
        lines.append(f"With one seed and {n:,} images, {noise:.1f} points or less may be chance.")
    return lines


def comparison_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """A row for each method: cells as in :data:`COLUMNS`."""
    return [[column.cell(row, results) for column in COLUMNS] for row in results["summary"]]


def profile_table(results: Mapping[str, Any]) -> Table:
    """A profile for the terminal."""
    headings = profile_headings(results, _NARROW_PROFILE)
    caption = ["step and infer: time × BP dense"] if headings is _NARROW_PROFILE else []
    return terminal_table(
        headings, list(profile_rows(results)), caption=[*caption, *own_settings(results)]
    )


def profile_headings(
    results: Mapping[str, Any], headings: Sequence[str] = _PROFILE
) -> Sequence[str]:
    """Those of ``headings`` for which the profile has numbers: without times, if it is an
    estimate."""
    return headings if "step_ratio" in results["methods"][0] else headings[:-2]


def profile_rows(results: Mapping[str, Any]) -> Iterator[list[str]]:
    """A row for each method of a profile."""
    for row in results["methods"]:
        parts = [row["memory"][part] for part in ("peak", *MEMORY_PARTS)]
        cells = [row["label"], *(f"{part / 2**20:.1f}" for part in parts), count(row["step_macs"])]
        if "step_ratio" in row:
            cells += [f"{row['step_ratio']:.2f}", f"{row['latency_ratio']:.2f}"]
        yield cells


def epoch_table(results: Mapping[str, Any]) -> Table:
    """Predicted times of an epoch for the terminal."""
    config = results["config"]
    flops = config["device_flops"]
    speed = (
        f"{flops:.3g} FLOP/s × {config['utilisation']:.0%}"
        if flops is not None
        else "steps as long as here"
    )
    return terminal_table(
        *_epoch_rows(results),
        title=f"an epoch of {config['epoch_images']:,} images, predicted: {speed}",
    )


def _epoch_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a profile's predicted epochs: peak of each device, and minutes."""
    methods = results["methods"]
    devices = [f"{n} device" + "s" * (n != "1") for n in methods[0]["epoch_seconds"]]
    return ["method", "peak of each", *devices], [
        [
            row["label"],
            f"{row['memory']['peak'] / 2**30:.1f} GiB",
            *(f"{seconds / 60:,.1f} min" for seconds in row["epoch_seconds"].values()),
        ]
        for row in methods
    ]


def break_even_table(results: Mapping[str, Any]) -> Table:
    """The break-even ranks of a profile for the terminal."""
    return terminal_table(*break_even_rows(results), title="break-even rank (share of full rank)")


def break_even_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a profile's break-even ranks."""
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


def search_table(results: Mapping[str, Any]) -> Table:
    """A search of rates for the terminal."""
    rows = []
    for name, found in results["accuracy"].items():
        best = max(found, key=found.__getitem__)
        tried = ", ".join(f"{rate}: {100 * reached:.2f}%" for rate, reached in found.items())
        edge = ", at the edge: give more --tries" if name in results["at_edge"] else ""
        rows.append([results["labels"][name], f"{best}{edge}", tried])
    return terminal_table(("method", "best rate", "held-out accuracy by rate"), rows)


def images(results: Mapping[str, Any]) -> str:
    """Which images accuracy is of: ``test`` or ``held-out``."""
    return evaluated_on(results["config"].get("validation"))


def evaluated(results: Mapping[str, Any]) -> str:
    """How many images accuracy was measured on, and how many the data set has."""
    return of_whole(results["data"], "test") + f" images of {results['data']['name']}"


def counts(data: Mapping[str, Any], images: str) -> str:
    """How many images a run trains and evaluates on, and how many the data set has."""
    return f"{of_whole(data, 'train')} training and {of_whole(data, 'test')} {images} images"


def job(results: Mapping[str, Any]) -> str:
    """A line that says what was trained on what and for how long."""
    config, data = results["config"], results["data"]
    seeds = config["seeds"] if isinstance(config["seeds"], int) else len(config["seeds"])
    return (
        f"{config['model']} on {data['name']}: {counts(data, images(results))}, "
        f"{config['epochs']} epochs, {seeds} seed{'s' * (seeds != 1)}"
    )


def of_whole(data: Mapping[str, Any], split: str) -> str:
    """``500 of 10,000``; results from before the whole was recorded do not know it."""
    whole = data.get(f"{split}_of")
    part = f"{data[split]:,}"
    return part if whole in (None, data[split]) else f"{part} of {whole:,}"


def chance(results: Mapping[str, Any]) -> float:
    """Accuracy of a guess, every class as likely as another."""
    return 1.0 / float(results["data"]["classes"])


def at_chance(accuracy: float | None, results: Mapping[str, Any]) -> bool:
    """Whether guessing on the evaluation images would do as well: accuracy is no more than two
    standard deviations of such a guess above chance."""
    guess = chance(results)
    deviation = math.sqrt(guess * (1.0 - guess) / results["data"]["test"])
    return accuracy is not None and accuracy <= guess + 2.0 * deviation


def chance_note(results: Mapping[str, Any]) -> list[str]:
    """What the mark of scores at chance means, if there are any."""
    if not any(at_chance(row["accuracy"], results) for row in results["summary"]):
        return []
    return [f"{_AT_CHANCE.strip()} at chance: a guess is right {chance(results):.1%} of the time"]


def own_settings(results: Mapping[str, Any]) -> list[str]:
    """A line for every method that has settings of its own."""
    rows = results["summary"] if "summary" in results else results["methods"]
    labels = {row["method"]: row["label"] for row in rows}
    settings = results["config"].get("settings", {})
    return [
        f"{labels.get(name, name)}: {named_settings(own)}" for name, own in settings.items() if own
    ]


def named_settings(settings: Mapping[str, Any]) -> str:
    """A method's own settings in words: ``units 5, recompute, widen 64``."""
    fields = dict(settings)
    options = fields.pop("options", {})
    return ", ".join(_in_words(*setting) for setting in {**fields, **options}.items())


def _in_words(name: str, value: Any) -> str:
    if value is True:
        return name
    shown = " and ".join(map(str, value)) if isinstance(value, list) else f"{value}"
    return f"{name} {shown}"


def terminal_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    caption: Sequence[str] = (),
) -> Table:
    """Numbers are never cut; the first column wraps where there is no room."""
    table = Table(
        box=None, pad_edge=False, title=title, title_justify="left",
        caption="\n".join(caption), caption_justify="left",
    )  # fmt: skip
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row)
    return table
