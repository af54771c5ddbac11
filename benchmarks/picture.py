"""Draw the pictures of README.md and docs/ from benchmarks/results.

    python benchmarks/picture.py

``docs/overview.svg``: accuracy, and activations held against depth; ``docs/rank.svg``: training
through rank cuts.
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


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "svdalign", "font.size": 9, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "svg.fonttype": "none"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    overview(left, right)
    figure.savefig(HERE.parent / "docs" / "overview.svg", metadata={"Date": None})
    figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    rank(axes)
    figure.savefig(HERE.parent / "docs" / "rank.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
