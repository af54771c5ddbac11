"""Draw the pictures of README.md and docs/ from benchmarks/results.

    python benchmarks/picture.py

``docs/overview.svg``: accuracy, and activations held against depth; ``docs/rank.svg``: training
through rank cuts; ``docs/bench.svg``: accuracy over time, over arithmetic and against memory.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
FIXED = "#c77f2a"  #: rules whose errors come back by something fixed
COLOURS = {"BP": "#5b6675", "DFA": FIXED, "FA": FIXED, "DRTP": FIXED, "SSA": "#2f6fb3"}


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return content


def colour(label: str) -> str:
    return next(c for start, c in COLOURS.items() if start in label)


def overview(left: Axes, right: Axes) -> None:
    rows = list(reversed(read("reproduce/table1")["rows"]))
    left.barh(
        [row["label"] for row in rows],
        [100 * row["accuracy"] for row in rows],
        xerr=[100 * row["accuracy_std"] for row in rows],
        color=[colour(row["label"]) for row in rows],
        height=0.65,
    )
    left.set(xlim=(40, 68), xlabel="test accuracy, % (10,000 images of CIFAR-10, 16×16)")
    held = read("held_activations")
    for (name, by_depth), style in zip(held["bytes"].items(), ("-", ":", "--", "-"), strict=True):
        depths = [int(depth) for depth in by_depth]
        sizes = [size / 2**20 for size in by_depth.values()]
        right.plot(depths, sizes, style, color=colour(name), marker="o", ms=3, label=name)
    right.set(xlabel="depth, convolutional units", ylabel="activations at the peak, MiB")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)


def rank(axes: Axes) -> None:
    """Training accuracy: means over an epoch and over seeds are smoother than test accuracy is at
    a high learning rate."""
    content = read("rank_state")
    for i, variant in enumerate(row["variant"] for row in content["summary"]):
        histories = [row["history"] for row in content["rows"] if row["variant"] == variant]
        epochs = zip(*histories, strict=True)
        curve = [100 * statistics.mean(e["train_accuracy"] for e in epoch) for epoch in epochs]
        axes.plot(range(1, len(curve) + 1), curve, marker="o", ms=3, label=variant, color=f"C{i}")
    axes.set(xlabel="epoch", ylabel="training accuracy, %")
    axes.legend(frameon=False)


#: Runs of the bench, ``airbench/NAME-0.json``: label, and the method of ``profile_airbench.json``.
BENCH = {
    "bp-dense": ("BP", "bp-dense"),
    "bp": ("SVD-BP", "bp"),
    "ssa-two": ("SSA, two units", "ssa-local"),
}


def bench(over_time: Axes, over_macs: Axes, against_memory: Axes) -> None:
    """Seed 0 of every method. Arithmetic is that of a step at the first rank; later ranks are
    smaller."""
    costs = {row["method"]: row for row in read("profile_airbench")["methods"]}
    styles = {"bp-dense": "o-", "bp": "s--", "dfa": "^-", "ssa-two": "P-"}
    for name, (label, method) in BENCH.items():
        run = read(f"airbench/{name}-0")
        config, history = run["config"], run["history"]
        reached = [100 * row["test_accuracy"] for row in history]
        minutes = [
            sum(row["seconds"] for row in history[: i + 1]) / 60 for i in range(len(history))
        ]
        macs = costs[method]["step_macs"] * (50_000 // config["batch_size"])
        draw = {"color": colour(label.removeprefix("SVD-")), "ms": 3, "label": label}
        over_time.plot(minutes, reached, styles[name], **draw)
        petas = [epoch * macs / 1e15 for epoch in range(1, len(history) + 1)]
        over_macs.plot(petas, reached, styles[name], **draw)
        peak = costs[method]["memory"]["peak"] / 2**20
        against_memory.plot(peak, reached[-1], styles[name][0], color=draw["color"], label=label)
    # Run again in parts, backpropagation computes the same.
    for name, again in {"bp-dense": "bp-dense-checkpointed", "bp": "bp-checkpointed"}.items():
        against_memory.plot(
            costs[again]["memory"]["peak"] / 2**20,
            100 * read(f"airbench/{name}-0")["accuracy"],
            styles[name][0],
            color=colour("BP"),
            mfc="white",
            label=f"{BENCH[name][0]}, checkpointed",
        )
    over_time.set(xlabel="minutes of training, one thread", ylabel="test accuracy, %")
    over_macs.set(xlabel="multiply-accumulates, 10¹⁵")
    against_memory.set(xlabel="peak memory of a step, MiB")
    against_memory.set_xlim(left=0)
    against_memory.margins(y=0.2)
    against_memory.legend(frameon=False, fontsize=7)
    for axes in (over_time, over_macs):
        axes.set_ylim(60, 95)


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "svdalign", "font.size": 9, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "svg.fonttype": "none"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    overview(left, right)
    figure.savefig(HERE.parent / "docs" / "overview.svg", metadata={"Date": None})
    figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    rank(axes)
    figure.savefig(HERE.parent / "docs" / "rank.svg", metadata={"Date": None})
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    bench(*panels)
    figure.savefig(HERE.parent / "docs" / "bench.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
