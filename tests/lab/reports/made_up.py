"""Results as ``results.json`` holds them, made up: pages are tested without a training."""

from __future__ import annotations

import math
import statistics
from typing import Any

LABELS = {"bp-dense": "BP", "dfa": "DFA", "ssa": "SSA, horizon 2"}
SOURCE: dict[str, Any] = {
    "svdalign": "0.1.0", "torch": "2.13.0", "python": "3.11", "git": None, "command": "svdalign …",
    "machine": {"system": "Linux", "cpu": "a CPU", "cores": 2, "threads": 2, "device": "cpu"},
}  # fmt: skip


def history(top: float, epochs: int = 4, *, angles: bool = False) -> list[dict[str, Any]]:
    rows = []
    for epoch in range(1, epochs + 1):
        score = 0.1 + (top - 0.1) * epoch / epochs
        row: dict[str, Any] = {
            "epoch": epoch, "loss": 2.3 / epoch, "train_accuracy": score, "test_loss": 2.4 / epoch,
            "test_accuracy": score, "lr": 0.01, "seconds": 3.5, "images_per_second": 1000.0,
            "ranks": {"conv1": 8, "conv2": 16 - epoch}, "kept_energy": {},
            "spectra": {"conv1": [3.0, 1.0, 0.1], "conv2": [2.0, 1.0 / epoch, 0.2 / epoch]},
        }  # fmt: skip
        if angles:
            row["alignment"] = {"layers": {"conv1": 95.0 - epoch, "conv2": 40.0}, "units": {}}
        rows.append(row)
    return rows


def run(method: str, seed: int, top: float, **changes: Any) -> dict[str, Any]:
    past = history(top)
    return {
        "method": method, "seed": seed, "status": "finished", "accuracy": top, "history": past,
        "unfinished_epoch": None, "parameters": 1000, "macs": 50_000, "wall_seconds": 20.0,
        "config": {"lr": 0.01 if method != "dfa" else 0.005, "batch_size": 32}, **changes,
    }  # fmt: skip


def comparison(seeds: int = 2, labels: dict[str, str] = LABELS, **config: Any) -> dict[str, Any]:
    """BP and SSA learn; DFA stays at chance."""
    tops = dict(zip(labels, (0.7, 0.1, 0.65), strict=True))
    runs = [run(m, s, tops[m] + 0.01 * s * (tops[m] > 0.1)) for s in range(seeds) for m in labels]
    memory = {"parameters": 1, "gradients": 2, "optimizer": 3, "activations": 4, "peak": 10}
    summary = []
    for i, (method, label) in enumerate(labels.items()):
        scores = [r["accuracy"] for r in runs if r["method"] == method]
        summary.append({
            "method": method, "label": label, "runs": seeds, "complete": True,
            "accuracy": statistics.mean(scores),
            "accuracy_std": statistics.stdev(scores) if seeds > 1 else None,
            "parameters": 1000 + i, "macs": 50_000, "step_macs": 10**9,
            "memory": {part: (i + 1) * 2**20 * n for part, n in memory.items()},
            "step_seconds": 0.01, "step_ratio": 1.0,
        })  # fmt: skip
    return {
        "status": "finished",
        "config": {"model": "mlp", "epochs": 4, "seeds": seeds, "validation": None,
                   "settings": {}, **config},
        "data": {"name": "embedded", "train": 320, "test": 400, "classes": 10,
                 "shape": [1, 28, 28]},
        "summary": summary, "runs": runs, **SOURCE,
    }  # fmt: skip


def single(accuracy: float | None = 0.7, **changes: Any) -> dict[str, Any]:
    whole = comparison(1)
    past = history(accuracy) if accuracy is not None and math.isfinite(accuracy) else []
    return {
        "status": "finished", "accuracy": accuracy, "seed": 3, "history": past,
        "parameters": 1000, "macs": 50_000, "train_seconds": 14.0,
        "config": {"model": "mlp", "epochs": 4, "validation": None}, "data": whole["data"],
        **SOURCE, **changes,
    }  # fmt: skip
