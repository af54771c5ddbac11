"""Write the tables of README.md and docs/ from benchmarks/results.

    python benchmarks/results_table.py           # rewrite them
    python benchmarks/results_table.py --check   # fail if they are out of date

A table stands between ``<!-- table:NAME begin -->`` and ``<!-- table:NAME end -->``: one of
``TABLES``, or that of the file NAME.json: a profile, an experiment of ``svdalign reproduce``, or a
comparison of changes.
What is not measured yet is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from svdalign.lab.experiments.paper.draw import experiment_table
from svdalign.lab.experiments.search import best
from svdalign.lab.experiments.variants import folder_name
from svdalign.lab.reports.page import count, number
from svdalign.lab.reports.tables import break_even_rows, named_settings

ROOT = Path(__file__).resolve().parent.parent
MARKS = re.compile(r"(<!-- table:(\S+) begin -->\n).*?(<!-- table:\2 end -->)", re.DOTALL)


_LINKED = 4  #: files that are linked one by one
WRAP: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


class Results:
    """The JSON files of a folder by name; KeyError for one that is not there.

    Each comes with its ``source``: where it lies, seen from a page in the folder ``page``.
    """

    def __init__(self, folder: Path, page: Path) -> None:
        self.folder, self.page = folder, page

    def __getitem__(self, name: str) -> dict[str, Any]:
        if not self.has(name):
            raise KeyError(name)
        path = self.folder / f"{name}.json"
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {**content, "source": Path(os.path.relpath(path, self.page)).as_posix()}

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.folder / f"{name}.json").exists()

    def family(self, start: str) -> list[dict[str, Any]]:
        """Those whose name is ``start`` and a number, in the numbers' order."""
        numbers = (p.stem[len(Path(start).name) :] for p in self.folder.glob(f"{start}*.json"))
        return [self[f"{start}{n}"] for n in sorted((n for n in numbers if n.isdigit()), key=int)]


def render(text: str, results: Results) -> str:
    """``text`` with every table in it written again."""

    def replace(found: re.Match[str]) -> str:
        name = found[2]
        try:
            body = wrapped(TABLES[name](results) if name in TABLES else of_file(results[name]))
        except KeyError as missing:
            print(f"no {missing} yet for table {name}", file=sys.stderr)
            return found[1] + found[3]
        return f"{found[1]}{body}\n{found[3]}"

    return MARKS.sub(replace, text)


def wrapped(table: str) -> str:
    """The sentences under a table on lines of their own length, as prose is written."""
    lines = table.split("\n")
    return "\n".join(
        line if line.startswith(("|", "-", "#")) else textwrap.fill(line, 110, **WRAP)
        for line in lines
    )


def source(*contents: Mapping[str, Any]) -> str:
    """The files a table is made from: command, config, seeds, commit and machine stand there. Of
    many the folder is linked."""
    paths = [Path(content["source"]) for content in contents]
    if len(paths) <= _LINKED:
        return f"Source: {', '.join(f'[{path.name}]({path.as_posix()})' for path in paths)}."
    (folder,) = {path.parent for path in paths}
    return f"Source: [{folder.name}]({folder.as_posix()}): {', '.join(p.stem for p in paths)}."


def accuracy(row: Mapping[str, Any] | None) -> str:
    """In percent, with its deviation over seeds where there is one."""
    if row is None or row["accuracy"] is None:
        return "–"
    spread = f" ± {100 * row['accuracy_std']:.1f}" if row["accuracy_std"] is not None else ""
    return f"{100 * row['accuracy']:.1f}{spread}"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in which every cell starts with a digit are set to the right."""
    right = [
        all(row[i] == "–" or row[i][:1].isdigit() for row in rows) for i in range(len(headings))
    ]
    lines = [headings, ["---:" if numbers else "---" for numbers in right], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def peak_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Peak memory by method, × BP dense."""
    peaks = {row["label"]: row["memory"]["peak"] for row in rows}
    return {label: f"{peak / peaks['BP']:.2f}" for label, peak in peaks.items()}


def searched(results: Results, search: str, method: str) -> float:
    """The rate that ``search`` chose for ``method``, by its name or by what a folder is called
    after it; ValueError where it lies at the edge of what was tried, KeyError where there is no
    search: then there is no result to put into a table."""
    found = results[search]["accuracy"]
    accuracies = {key: rates for name, rates in found.items() for key in (name, folder_name(name))}
    if method not in accuracies:
        raise KeyError(f"{search} of {method}")
    try:
        return best({float(rate): reached for rate, reached in accuracies[method].items()})
    except ValueError as error:
        raise ValueError(f"{search} of {method}: {error}") from None


# --- tables by name -----------------------------------------------------------------------------


def on_smallconv(results: Results, name: str) -> str:
    """An experiment on SmallConv, whose rows ran at the best rates of one search."""
    content = results[f"reproduce/{name}"]
    for row in content["rows"]:
        check_rate(results, "tune_smallconv", row["variant"], row["config"]["lr"])
    return of_file(content)


def check_rate(results: Results, search: str, method: str, rate: float) -> None:
    """ValueError where ``method`` did not run at the best rate of ``search``."""
    found = searched(results, search, method)
    if rate != found:
        raise ValueError(f"{method} ran at {rate:g}, but the best rate of {search} is {found:g}")


EQUAL_TIME = "equal time"  #: a change: as many epochs as the time of horizon 2 allows


def label_of(row: Mapping[str, Any]) -> str:
    """Method and change; backpropagation has no units that could be blocks."""
    label: str = row["label"]
    return label.removesuffix(", blocks") if "BP" in row["of"] else label


def priced(results: Results, network: str, name: str, search: str) -> str:
    """A comparison of what methods reach and what a step of each costs against SVD-BP's, each at
    the best rate of ``search``."""
    content, tuned = results[name], results[search]
    config, data, summary = content["config"], content["data"], content["summary"]
    factored = next(row for row in summary if row["of"] == "SVD-BP")
    rates = {run["method"]: run["config"]["lr"] for run in content["runs"]}
    for run in content["runs"]:
        # What is checkpointed learns as it does without; more epochs have no search of their own.
        method, longer, _ = run["method"].replace("-checkpointed", "").partition(f", {EQUAL_TIME}")
        if longer and method not in tuned["accuracy"]:
            method += ", blocks"
        check_rate(results, search, method, run["config"]["lr"])
    rows = []
    for row in summary:
        peak = row["memory"]["peak"]
        rows.append(
            [
                label_of(row) + own_settings(config, row["method"]),
                accuracy(row),
                f"{peak / 2**20:.1f} MiB",
                f"{peak / factored['memory']['peak']:.2f} ×",
                f"{row['step_ratio'] / factored['step_ratio']:.2f} ×",
                f"{row['parameters']:,}",
                f"{rates[row['method']]:g}",
            ]
        )
    headings = ["method", "test accuracy, %", "peak memory", "of SVD-BP", "time, of SVD-BP"]
    images = {"embedded": "Fashion-MNIST", "cifar10": "CIFAR-10"}[config["data"]]
    return (
        f"{markdown([*headings, 'parameters', 'rate'], rows)}\n\n"
        f"{network} at rank {config['rank']:g}, {data['train']:,} images of {images}, "
        f"{config['epochs']} epochs: mean ± standard deviation over {config['seeds']} seeds on "
        f"{data['test']:,} test images. Peak memory and time of a training step, on CPU. Every "
        "method runs at the learning rate that one search chose for it on held-out images. "
        f"{source(content, tuned)}"
    )


LABELS = {
    "bp-dense": "BP",
    "bp": "SVD-BP",
    "bp-checkpointed": "SVD-BP, checkpointed",
    "ssa-0": "SSA, horizon 0",
    "ssa-unaligned-0": "SSA, horizon 0, no similarity",
    "ssa-balanced-unaligned-0": "SSA, two units, no similarity",
    "ssa-2": "SSA, horizon 2",
}  #: of methods in step.json


def memory(results: Results) -> str:
    """Peak memory and time of a training step of VGG-13."""
    content = results["step"]
    (found,) = (
        r["costs"]
        for r in content["results"]
        if (r["net"], r["precision"], r["threads"]) == ("vgg13", "fp32", 1)
    )
    cells = [
        [
            label,
            f"{found[method]['peak_bytes'] / 2**20:.0f} MiB",
            f"{found[method]['peak_bytes'] / found['bp-dense']['peak_bytes']:.2f} ×",
            f"{found[method]['peak_bytes'] / found['bp']['peak_bytes']:.2f} ×",
            f"{found[method]['cpu_seconds_to_bp-dense']:.2f} ×",
        ]
        for method, label in LABELS.items()
    ]
    headings = ["method", "peak", "of BP", "of SVD-BP", "time, of BP"]
    return (
        f"{markdown(headings, cells)}\n\n"
        f"VGG-13 at 3×32×32, batch {content['batch']}, rank 1/4, fp32, AdamW: parameters, "
        "gradients, optimizer state and activations alive at the peak of a training step; CPU time "
        f"of a step on one thread, in turns. {source(content)}"
    )


def break_even(results: Results) -> str:
    """Largest rank at which a factored layer costs no more than a dense one, in VGG-13."""
    content = results["break_even"]
    config = content["config"]
    return (
        f"{markdown(*break_even_rows(content))}\n\n"
        f"{config['model']} at {config['channels']}×{config['image_size']}×{config['image_size']}, "
        f"batch {config['batch_size']}, {config['scheme']} scheme: the largest rank, and its share "
        "of full rank, at which a factored layer costs no more than the dense one, by "
        "multiply-accumulates of an inference, by time of a forward pass, and of one with its "
        f"backward pass; –: at none of the ranks timed. {source(content)}"
    )


WHOLE = {"VGG-13": "whole_vgg13", "ResNet-32": "whole_resnet32"}  #: networks: files


def whole(results: Results) -> str:
    """Deeper networks on all of CIFAR-10, epoch by epoch."""
    rows, made = [], []
    for network, name in WHOLE.items():
        content, search = results[name], results[f"tune_{name}"]
        made += [content, search]
        labels = {row["method"]: row["label"] for row in content["summary"]}
        for run in content["runs"]:
            method, history = run["method"], run["history"]
            check_rate(results, f"tune_{name}", method, run["config"]["lr"])
            rows.append(
                [
                    network,
                    labels[method] + own_settings(content["config"], method),
                    " / ".join(f"{100 * epoch['test_accuracy']:.1f}" for epoch in history),
                    f"{100 * history[-1]['train_accuracy']:.1f}",
                    f"{run['parameters']:,}",
                    f"{run['config']['lr']:g}",
                ]
            )
    headings = ["network", "method", "test accuracy by epoch, %", "training, %", "parameters"]
    return (
        f"{markdown([*headings, 'rate'], rows)}\n\n"
        "All 50,000 images of CIFAR-10 at 32×32 in bf16, one seed. Every method runs at the "
        "learning rate that one search chose for it on held-out images. "
        f"{source(*made)}"
    )


def peers(results: Results) -> str:
    """BioTorch's methods beside ours on the same job."""
    content = results["peers"]
    headings = ["method", "CIFAR-10 part, %", "peak rate", "degrees to BP", "time per step"]
    rows = []
    for row in content["summary"]:
        first = next(run for run in content["runs"] if run["method"] == row["method"])
        last = first["history"][-1]
        rows.append(
            [
                row["of"] if row["change"] == "as it is" else row["change"],
                accuracy(row),
                f"{first['config']['lr']:g}",
                ", ".join(f"{angle:.0f}" for angle in last["angles"]),
                f"{row['step_ratio']:.2f} ×",
            ]
        )
    return (
        f"{markdown(headings, rows)}\n\n"
        f"biotorch {last['biotorch']} in an environment of its own; job, search of the learning "
        "rate and seeds are those of the README's comparison on CIFAR-10; initial weights, images "
        "and their order are the same for all five. Degrees to BP: the angle from each "
        "convolution's gradient, and the classifier's, to BP's at the end of training. Time: × BP "
        f"dense, in turns. {source(content)}"
    )


def bp_floor(results: Results) -> str:
    """What the engine adds to backpropagation."""
    content = results["bp_floor"]
    rows = [
        [
            f"{row['model']}, width {row['width']:g}, {row['image_size']}×{row['image_size']}",
            f"{1e3 * row['hand_written_seconds']:.1f} ms",
            f"{row['ratio']:.2f} ×",
        ]
        for row in content["rows"]
    ]
    return (
        f"{markdown(['network', 'hand-written step', 'the learner'], rows)}\n\n"
        'A step of `Learner(model, "bp")` on dense weights over one of a hand-written PyTorch loop '
        f"on the same batch, in turns, medians. {source(content)}"
    )


def own_settings(content: Mapping[str, Any], method: str) -> str:
    """The settings of one method in a comparison or a search, as text to follow its name."""
    settings = content.get("settings", {}).get(method)
    return f" ({named_settings(settings)})" if settings else ""


BENCH = {
    "bp-dense": ("BP", "bp-dense-sgd"),
    "bp-dense-muon": ("BP", "bp-dense-muon"),
    "bp": ("SVD-BP", "bp-adamw"),
    "bp-muon": ("SVD-BP", "bp-muon"),
    "ssa-first-muon": ("SSA, first layer and rest", "ssa-first-muon"),
    "ssa-two": ("SSA, first block and rest", "ssa-two-adamw"),
    "dfa": ("DFA", "dfa-adamw"),
}  #: files airbench/NAME-SEED.json: label, and the search of the rate, airbench/search-...


def airbench(results: Results) -> str:
    """All of CIFAR-10, to where backpropagation is nearly done."""
    rows, made = [], []
    dense = None
    for name, (label, searched_as) in BENCH.items():
        runs = results.family(f"airbench/{name}-")
        if not runs:
            continue
        search = f"airbench/search-{searched_as}"
        rate = searched(results, search, *results[search]["accuracy"])
        config = runs[0]["config"]
        reached, views = (
            [100 * value for value in column]
            for column in zip(
                *((run["accuracy"], run["history"][-1]["tta_accuracy"]) for run in runs),
                strict=True,
            )
        )
        dense = dense or runs[0]["parameters"]
        rows.append(
            [
                label,
                spread(reached),
                spread(views),
                str(len(runs)),
                f"{runs[0]['parameters'] / dense:.2f}",
                f"{config['optimizer']}, {config['lr']:g}",
                f"{rate:g}",
            ]
        )
        made += [*runs, results[search]]
    headings = ["method", "test accuracy, %", "six views, %", "seeds", "parameters"]
    return (
        f"{markdown([*headings, 'optimizer, rate', 'best of its search'], rows)}\n\n"
        "`benchmarks/configs/airbench.yaml`, for other optimizers than Muon `airbench_sgd.yaml`: "
        "all 50,000 training images, ten epochs in bf16 on one thread. Six views: the mean answer "
        "to each image as it is, shifted and mirrored. "
        f"Parameters: at the end, × BP dense. {source(*made)}"
    )


LEVERS = {
    "bp": "SVD-BP",
    "blocks": "blocks, the classifier a unit of its own",
    "alpha0": "the same without similarity",
    "horizon1": "the same at horizon 1",
    "widen256": "the same, read through convolutions of 256 channels",
    "joined": "blocks, the classifier in the last",
    "joined-alpha0": "the same without similarity",
    "first": "two units: the first block, all that follows",
    "first-alpha0": "the same without similarity",
    "units2": "two units: two blocks, all that follows",
    "units2-alpha0": "the same without similarity",
}  #: files airbench/lever-NAME-SEED.json

MUON_LEVERS = {
    "muon-bp": "SVD-BP",
    "muon-spatial": "SVD-BP, spatial scheme",
    "muon-first": "two units: the first convolution, all that follows",
    "muon-frozen": "the same, the first convolution as it began",
    "muon-grid8": "the same, the map read on 8 × 8 cells in place of 4 × 4",
    "muon-widen64": "the same, the map read through a convolution of twice its channels",
    "muon-widen128": "the same, of four times its channels",
    "muon-quarter": "the same, the first unit by backpropagation on a quarter of the batch",
    "muon-both": "the same, the first unit by both",
    "muon-two": "three: the first convolution, the rest of its block, all that follows",
    "muon-horizon1": "the same at horizon 1",
    "muon-late": "three: the first convolution, up to the third, all that follows",
    "muon-late1": "the same at horizon 1",
    "muon-horizon2": "four: a convolution each, and all that follows, at horizon 2",
}


def airbench_levers(results: Results, levers: Mapping[str, str] = LEVERS) -> str:
    """Accuracy that local learning loses by its units, on the small job of the search."""
    rows, made = [], []
    for name, label in levers.items():
        runs = results.family(f"airbench/lever-{name}-")
        lasts = [run["history"][-1] for run in runs]
        columns = (
            [100 * last[key] for last in lasts] for key in ("test_accuracy", "train_accuracy")
        )
        rows.append(
            [label, *(" / ".join(f"{value:.1f}" for value in values) for values in columns)]
        )
        made += runs
    config = made[0]["config"]
    headings = ["units", "held-out, %", "training, %"]
    return (
        f"{markdown(headings, rows)}\n\n{config['optimizer']} at {config['lr']:g} for all, "
        f"horizon 0 unless it says otherwise; a number for each seed. {source(*made)}"
    )


def airbench_search(results: Results) -> str:
    """Every rate that was tried for the bench."""
    rows, made = [], []
    for path in sorted((results.folder / "airbench").glob("search-*.json")):
        search = f"airbench/{path.stem}"
        content = results[search]
        for method, accuracies in content["accuracy"].items():
            best_rate = searched(results, search, method)
            tried = [
                f"**{100 * reached:.1f}**" if float(rate) == best_rate else f"{100 * reached:.1f}"
                for rate, reached in accuracies.items()
            ]
            settings = content["settings"].get(method, {})
            optimizer = {**content["job"], **settings}["optimizer"]
            own = {key: settings[key] for key in ("units", "options") if key in settings}
            rows.append(
                [
                    content["labels"][method] + (f" ({named_settings(own)})" if own else ""),
                    optimizer,
                    f"{best_rate:g}",
                    " / ".join(tried),
                    " / ".join(accuracies),
                ]
            )
        made.append(content)
    headings = ["method", "optimizer", "best rate", "held-out accuracy, %", "at rates"]
    return f"{markdown(headings, rows)}\n\nOne seed. {source(*made)}"


def spread(values: Sequence[float]) -> str:
    """Mean, with the deviation over seeds where there are several."""
    several = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{several}"


def changes(content: Mapping[str, Any]) -> str:
    """A comparison of changes made one at a time: a row a change, a column a method."""
    config = content["config"]
    found = {(row["of"], row["change"]): row for row in content["summary"]}
    methods = sorted({of for of, _ in found}, key=lambda label: ("BP" in label, label))

    def cell(method: str, change: str) -> str:
        if (method, change) not in found:
            return "–"
        reached = 100 * found[method, change]["accuracy"]
        if change == "as it is" or (method, "as it is") not in found:
            return f"{reached:.1f}"
        return f"{reached - 100 * found[method, 'as it is']['accuracy']:+.1f}"

    names = dict.fromkeys(change for _, change in found)
    rows = [[name, *(cell(method, name) for method in methods)] for name in names]
    changed = "as it is" in names
    against = ", and points more or less than that" if changed else ""
    headings = methods if changed else ["accuracy"]  # horizons are among the changes
    seeds = sorted({row["runs"] for row in found.values()})
    name = config["data"].replace("cifar", "CIFAR-")
    each = " or ".join(map(str, seeds))
    rate = f"learning rate {config['lr']:g}" if config["lr"] else "each at its own learning rate"
    return (
        f"{markdown(['change', *headings], rows)}\n\n"
        f"Accuracy in % on {config['validation']:,} held-out training images{against}: "
        f"{config['model']} at rank {config['rank']:g} on "
        f"{config['train_limit'] - config['validation']:,} images of {name} at "
        f"{config['image_size']}×{config['image_size']}, {config['epochs']} epochs, {rate}, {each} "
        f"seed(s). {source(content)}"
    )


def step(results: Results) -> str:
    """Peak memory and time of a training step, against backpropagation on dense and on factored
    weights."""
    content = results["step"]
    rows = []
    for result in content["results"]:
        for method, cost in result["costs"].items():
            kind = "cpu_seconds" if result["threads"] == 1 else "seconds"
            ratios = (cost.get(f"{kind}_to_{reference}") for reference in ("bp-dense", "bp"))
            rows.append(
                [
                    f"{result['net']}, {result['precision']}",
                    f"`{method}`",
                    f"{cost['peak_bytes'] / 2**20:.1f}",
                    *(number(ratio, "{:.2f}") for ratio in ratios),
                ]
            )
    headings = ["network", "method", "peak, MiB", "time × BP", "time × SVD-BP"]
    return (
        f"{markdown(headings, rows)}\n\n"
        "Batches of 128, medians of steps taken in turns, CPU time of one thread; peak of live "
        "tensors. `-measured`: each layer computes with its fastest kernel. "
        f"{source(content)}"
    )


def step_two_threads(results: Results) -> str:
    """Times of a step on two threads, against backpropagation on the same factors."""
    content = results["step_two_threads"]
    rows = [
        [
            f"{result['net']}, {result['precision']}",
            *(f"{cost['seconds_to_bp']:.2f}" for cost in result["costs"].values()),
        ]
        for result in content["results"]
    ]
    methods = (f"`{method}`" for method in content["results"][0]["costs"])
    return f"{markdown(['network', *methods], rows)}\n\n{source(content)}"


def large_step(results: Results) -> str:
    """Real steps of networks whose plain backpropagation does not fit."""
    names = {"ViT-L/16": "large_step_vit_l16", "ResNet-101": "large_step_resnet101"}
    names = {net: name for net, name in names.items() if results.has(name)}
    contents = [results[name] for name in names.values()]
    rows = [
        [f"{label}, fp32, worked out", *(gib(c["estimates"][label]) for c in contents)]
        for label in contents[0]["estimates"]
    ]
    rows.append(
        [
            "SSA, horizon 0, run",
            *(f"{gib(c['resident_peak'])} ({c['config']['precision']})" for c in contents),
        ]
    )
    took = " and ".join(f"{content['seconds']:.0f}" for content in contents)
    return (
        f"{markdown(['peak of a step', *names], rows)}\n\n"
        "224×224 pixels, batch 256, rank 1/4, AdamW. Run: resident memory of the whole process on "
        f"a machine with 24 GiB, which took {took} s. {source(*contents)}"
    )


ROOF = "SSA, by itself on each process, added up"


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def parallel(results: Results) -> str:
    """Processes of one thread each, by network: speed, idle time, memory, bytes sent."""
    content = results["parallel"]
    parts = []
    for name, jobs in content["rows"].items():
        rows = [
            [
                job,
                f"{row['images_per_second']:,.0f}",
                f"{row['ratio']:.2f} ×",
                f"{row['images_per_second'] / jobs[ROOF]['images_per_second']:.0%}",
                " ".join(f"{share:.0%}" for share in row["idle"]),
                " ".join(f"{peak / 2**20:.0f}" for peak in row.get("peak_bytes", ())) or "–",
                f"{row['sent'] / 2**20:.1f}" if row["sent"] else "–",
            ]
            for job, row in jobs.items()
            if "images_per_second" in row
        ]
        if not rows:
            continue
        speeds = ["images/s", "× the first", "of the roof", "idle"]
        parts.append(markdown([name, *speeds, "MiB a process", "MiB sent a step"], rows))
    each = [row for jobs in content["rows"].values() for row in jobs.values()]
    others = [row["others"] for row in each if "others" in row]
    return (
        "\n\n".join(parts) + f"\n\nBatches of {content['batch']}, rank 1/4, AdamW, fp32, one "
        "thread a process unless it says two; medians over rounds in which all jobs take turns. "
        "The roof is one process by itself on each core, added up. Idle: share of the wall clock "
        "that a process does not compute. Memory: peak resident "
        "during steps, above that before the network was built. Other programs kept at most "
        f"{max(others):.2f} of {content['machine']['cores']} cores busy meanwhile. "
        f"{source(content)}"
    )


def stages(results: Results) -> str:
    """Predicted speeds of many stages, and a test of the formula against measured ones."""
    content = results["stages"]
    links, pipelines = (list(content["rows"][0][key]) for key in ("links", "pipelines"))
    rows = [
        [str(row["stages"]), *(f"{row['links'][link]:.1f} ×" for link in links)]
        + [f"{row['pipelines'][m]:.1f} ×" for m in pipelines]
        for row in content["rows"]
    ]
    tests = [
        [net, f"{predicted:.0f}", f"{measured:.0f}", f"{measured / predicted:.2f}"]
        for net, predicted, measured in map(dict.values, content["validation"])
    ]
    headings = ["stages", *links, *(f"backpropagation, {m} microbatches" for m in pipelines)]
    return (
        f"{markdown(headings, rows)}\n\n"
        f"{markdown(['tested on', 'predicted, images/s', 'measured', 'ratio'], tests)}\n\n"
        f"ResNet-{6 * content['blocks'] + 2}, batch {content['batch']}, times one process; worked "
        f"out from the times of ResNet-32's units. {source(content)}"
    )


def streaming(results: Results) -> str:
    """Speed and memory of streaming images."""
    content = results["streaming"]
    rows = [
        [
            row["kind"],
            f"{row['files']:,} of {row['width']} pixels, {row['size']} × {row['size']} windows",
            f"{row['images_per_cpu_second']:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['peak_bytes_of_a_worker'] / 2**20:.0f}",
        ]
        for row in content["rows"]
    ]
    headings = ["files", "images", "images per second of a core", "MiB", "MiB of a worker"]
    text = f"{markdown(headings, rows)}\n\n"
    if "training" in content:
        found = content["training"]
        text += (
            f"Training a {found['model']} at 224 × 224 by SSA at horizon 0 takes in "
            f"{found['training_images_per_cpu_second']:.1f} images per second of a core here, and "
            f"waits for images {found['waited_share']:.1%} of the time with one worker process. "
        )
    return (
        f"{text}Batches of {content['batch']}, {content['workers']} workers, one epoch; peak "
        f"resident memory, libraries included. {source(content)}"
    )


def streaming_readers(results: Results) -> str:
    """Memory of one process that reads Parquet files, by the number of images."""
    content = results["streaming_readers"]
    rows = [
        [
            f"{row['files']:,}",
            *(f"{row[key] / 2**20:.0f}" for key in ("peak_bytes", "arrow_peak_bytes")),
        ]
        for row in content["rows"]
        if row["width"] == content["rows"][0]["width"]
    ]
    return (
        f"{markdown(['images', 'MiB', 'MiB held by the readers at most'], rows)}\n\n"
        "Parquet, 160 pixels, no worker processes: 32 readers in one process; peak resident "
        f"memory, libraries included. {source(content)}"
    )


def epochs(results: Results) -> str:
    """Predicted epochs of the configs for ImageNet."""
    names = ("resnet18", "resnet50", "mobilenet_v1", "vit_s16")
    contents = [results[f"epoch_{name}"] for name in names]
    rows = [
        [
            content["config"]["model"],
            row["label"],
            gib(row["memory"]["peak"]),
            *(f"{seconds / 60:.1f}" for seconds in row["epoch_seconds"].values()),
        ]
        for content in contents
        for row in content["methods"]
    ]
    config = contents[0]["config"]
    headings = ["network", "method", "peak of a GPU", "minutes, 1 GPU", "minutes, 8 GPUs"]
    return (
        f"{markdown(headings, rows)}\n\n"
        f"Worked out, not run: {config['epoch_images']:,} images, batches of "
        f"{config['batch_size']} a GPU, fp32 memory, {config['device_flops']:.3g} FLOP/s at "
        f"{config['utilisation']:.0%}, {config['link'] / 1e9:.0f} GB/s between GPUs, images always "
        f"ready. {source(*contents)}"
    )


TABLES: dict[str, Callable[[Results], str]] = {
    "large_step": large_step,
    "parallel": parallel,
    "stages": stages,
    "streaming": streaming,
    "streaming_readers": streaming_readers,
    "epochs": epochs,
    "step": step,
    "step_two_threads": step_two_threads,
    "make_compare": partial(priced, network="SmallConv", name="compare", search="tune_compare"),
    "front_vgg8": partial(
        priced, network="VGG-8, a quarter as wide,", name="front_vgg8", search="tune_front_vgg8"
    ),
    "front_smallconv": partial(
        priced, network="SmallConv", name="front_smallconv", search="tune_smallconv"
    ),
    "front_resnet32": partial(
        priced,
        network="ResNet-32, half as wide,",
        name="front_resnet32",
        search="tune_front_resnet32",
    ),
    "reproduce/table1": partial(on_smallconv, name="table1"),
    "reproduce/table4": partial(on_smallconv, name="table4"),
    "memory": memory,
    "bp_floor": bp_floor,
    "break_even": break_even,
    "whole": whole,
    "peers": peers,
    "airbench": airbench,
    "airbench_levers_muon": partial(airbench_levers, levers=MUON_LEVERS),
    "airbench_search": airbench_search,
    "airbench_levers": airbench_levers,
}


# --- tables of a file ---------------------------------------------------------------------------


def of_file(content: Mapping[str, Any]) -> str:
    """The table of an experiment, of rank cuts or of a profile, as its content is."""
    if "experiment" in content:
        so_far = "" if content["status"] == "finished" else " Not all runs are done."
        lead = f"**{content['title']}.** {content['shows']}{so_far}"
        return f"{lead}\n\n{markdown(*experiment_table(content))}\n\n{source(content)}"
    if "summary" in content:
        if any("compact" in run for run in content.get("runs", ())):
            return f"{markdown(*rank_cuts(content))}\n\n{source(content)}"
        return changes(content)
    config = content["config"]
    how = "worked out" if config["estimate"] else "measured"
    fused = "fused layers, " if config.get("fuse") else ""
    return (
        f"{config['model']}, batch {config['batch_size']} of {config['image_size']} × "
        f"{config['image_size']} pixels, {config['optimizer']}, rank {config['rank']:.3g}, "
        f"{config['scheme']} scheme, {fused}{how}; memory in MiB.\n\n"
        f"{markdown(*profile(content))}\n\n{source(content)}"
    )


def rank_cuts(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Accuracy lost and costs saved by rank cuts while training, against the first change, without
    cuts."""
    rows, latencies = [], []
    fixed = content["summary"][0]
    for row in content["summary"]:
        mine = [run for run in content["runs"] if run["method"] == row["method"]]
        compact = [run["compact"] for run in mine]
        shares = (
            statistics.mean(of[key]["ratio"] for of in compact) for key in ("parameters", "macs")
        )
        times = {
            f"latency, batch {of[0]['batch']}": statistics.median(entry["ratio"] for entry in of)
            for of in zip(*(of["latency"] for of in compact), strict=True)
        }
        worst = max((dip for run in mine for dip in dips(run["history"])), default=None)
        latencies = list(times)
        rows.append(
            [
                row["change"],
                accuracy(row),
                f"{100 * (fixed['accuracy'] - row['accuracy']):.1f}",
                number(worst, "{:.1f}"),
                *(f"{share:.0%}" for share in shares),
                *(f"{ratio:.2f}" for ratio in times.values()),
            ]
        )
    headings = ["run", "test accuracy", "under fixed", "worst dip", "parameters", "MACs"]
    return [*headings, *latencies], rows


def dips(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """Points of test accuracy lost from one epoch to the next, for each epoch that ended in a cut
    and the one after it."""
    return [
        100 * (a["test_accuracy"] - b["test_accuracy"])
        for a, b in itertools.pairwise(history)
        if a["kept_energy"] or b["kept_energy"]
    ]


def profile(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    config, methods = content["config"], content["methods"]
    parts = ("peak", "parameters", "gradients", "optimizer", "activations")
    share = peak_shares(methods)
    headings = ["method", *parts, "peak × BP", "MACs", "time × BP", "inference × BP"]
    rows = [
        [
            row["label"] + own_settings(config, row["method"]),
            *(f"{row['memory'][part] / 2**20:,.0f}" for part in parts),
            share[row["label"]],
            count(row["step_macs"]),
            number(row.get("step_ratio"), "{:.2f}"),
            number(row.get("latency_ratio"), "{:.2f}"),
        ]
        for row in methods
    ]
    return headings, rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    check = parser.parse_args().check
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        fresh = render(text, Results(ROOT / "benchmarks" / "results", page.parent))
        if fresh != text:
            stale.append(page.name)
            if not check:
                page.write_text(fresh, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python benchmarks/results_table.py")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
