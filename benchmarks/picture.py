"""Draw the pictures of README.md and docs/ from benchmarks/results.

    python benchmarks/picture.py

``docs/overview.svg``: accuracy, and activations held against depth; ``docs/rank.svg``: training
through rank cuts; ``docs/bench.svg``: accuracy over time, over arithmetic and against memory;
``docs/front_NETWORK.svg``: accuracy against time and memory by units
and horizon.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from results_table import EQUAL_TIME, label_of

from svdalign.lab.reports import plots

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
FIXED = "#c77f2a"  #: rules with fixed feedback
COLOURS = {
    "BP": "#5b6675",
    "SSA": "#2f6fb3",
    "Sign": "#8a6fd1",
    **dict.fromkeys(("DFA", "FA", "DRTP"), FIXED),
}

#: Runs of the bench, ``airbench/NAME-0.json``: label, and the method of
#: ``profile_airbench_bf16.json``, where ``ssa-local`` is ``ssa``.
BENCH = {
    "bp-dense": ("BP", "bp-dense"),
    "bp-muon": ("SVD-BP", "bp"),
    "ssa-first-muon": ("SSA, two units", "ssa-local"),
}


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return content


def colour(label: str) -> str:
    return next(c for start, c in COLOURS.items() if start in label)


def overview() -> list[plots.Plot]:
    rows = read("reproduce/table1")["rows"]
    held = read("held_activations")["bytes"]
    return [
        plots.bars(
            {row["label"]: {"accuracy": 100 * row["accuracy"]} for row in rows},
            "test accuracy, % (10,000 images of CIFAR-10, 16×16)",
            spread={row["label"]: 100 * row["accuracy_std"] for row in rows},
            colours=colour,
            start=40.0,
        ),
        plots.curves(
            {
                name: [[(int(depth), size / 2**20) for depth, size in by_depth.items()]]
                for name, by_depth in held.items()
            },
            "depth, convolutional units",
            "activations at the peak, MiB",
        ),
    ]


def rank() -> list[plots.Plot]:
    """Training accuracy: means over an epoch and over seeds are smoother than test accuracy is at
    a high learning rate."""
    content = read("rank_state")
    histories = {
        row["change"]: [r["history"] for r in content["runs"] if r["method"] == row["method"]]
        for row in content["summary"]
    }
    points = {
        change: [[(i, 100 * row["train_accuracy"]) for i, row in enumerate(h, 1)] for h in seeds]
        for change, seeds in histories.items()
    }
    return [plots.curves(points, "epoch", "training accuracy, %", whole=True)]


def bench() -> list[plots.Plot]:
    """Seed 0 of every method. Time and arithmetic are those of a step at the last ranks, measured
    side by side, times the steps. Points of checkpointed backpropagation are hollow: it computes
    the same."""
    costs = {row["method"]: row for row in read("profile_airbench_bf16")["methods"]}
    over_time: dict[str, plots.Seeds] = {}
    over_macs: dict[str, plots.Seeds] = {}
    against_memory: dict[str, tuple[float, float, None]] = {}

    def peak(method: str) -> float:
        return float(costs[method]["memory"]["peak"]) / 2**20

    for name, (label, method) in BENCH.items():
        run = read(f"airbench/{name}-0")
        reached = [100 * row["test_accuracy"] for row in run["history"]]
        steps = 50_000 // run["config"]["batch_size"]
        minutes, macs = (costs[method][key] * steps for key in ("step_seconds", "step_macs"))
        epochs = list(enumerate(reached, 1))
        over_time[label] = [[(minutes * epoch / 60, score) for epoch, score in epochs]]
        over_macs[label] = [[(macs * epoch / 1e15, score) for epoch, score in epochs]]
        against_memory[label] = (peak(method), reached[-1], None)
    for label, method in (BENCH["bp-dense"], BENCH["bp-muon"]):
        against_memory[f"{label}, checkpointed"] = (
            peak(f"{method}-checkpointed"),
            against_memory[label][1],
            None,
        )
    accuracy, scale = "test accuracy, %", (60.0, 95.0)
    return [
        plots.curves(over_time, "minutes of training, one thread", accuracy, limits=scale),
        plots.curves(over_macs, "multiply-accumulates, 10¹⁵", accuracy, limits=scale),
        plots.scatter(
            against_memory,
            "peak memory of a step, MiB",
            accuracy,
            styles=lambda label: {"mfc": "none"} if "checkpointed" in label else {},
        ),
    ]


def front(network: str) -> list[plots.Plot]:
    """Each choice of units and horizon as a point: its accuracy, against time and peak memory of a
    step, by SVD-BP's."""
    summary = read(f"front_{network}")["summary"]
    rows = [row for row in summary if EQUAL_TIME not in row["method"]]
    factored = next(row for row in rows if row["of"] == "SVD-BP")

    def against(quantity: str, of: Callable[[dict[str, Any]], float]) -> plots.Plot:
        points = {
            label_of(row).replace("SSA, ", "").replace("horizon ", "h"): (
                of(row) / of(factored), 100 * row["accuracy"], 100 * row["accuracy_std"]
            )
            for row in rows
        }  # fmt: skip
        return plots.scatter(points, f"{quantity} of a step, × SVD-BP", "test accuracy, %")

    return [against("time", step_seconds), against("peak memory", peak_bytes)]


def step_seconds(row: dict[str, Any]) -> float:
    return float(row["step_seconds"])


def peak_bytes(row: dict[str, Any]) -> float:
    return float(row["memory"]["peak"])


def main() -> None:
    pictures = {"overview": overview, "rank": rank, "bench": bench}
    fronts = {f"front_{name}": partial(front, name) for name in ("vgg8", "smallconv", "resnet32")}
    for name, draw in (pictures | fronts).items():
        plots.save(draw(), DOCS / f"{name}.svg")


if __name__ == "__main__":
    main()
