"""What one training step costs: local learning against backpropagation on the same factors.

    python benchmarks/step.py [--nets ...] [--threads 1 2] [--precision fp32 bf16]
        [--batch 128] [--seconds 15] [--out benchmarks/results/step.json]

For each network every method takes its steps in turns on one batch, so that other load on the
machine hits all alike. Reported are medians of the rounds: seconds of a step, CPU seconds of the
process, both also as ratios to dense backpropagation (``bp-dense``) and to backpropagation on the
same fused factors (``bp``), and the bytes that are alive at the peak of a step (exact: they do not
depend on the machine's load). ``-checkpointed`` methods are gradient checkpointing at its cheaper
setting in memory. Methods named ``hN`` are SSA with horizon N.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import svdalign as sva
from svdalign import rules
from svdalign.lab import models
from svdalign.lab.costs import step_memory
from svdalign.lab.training.build import prepare_machine
from svdalign.lab.training.config import JobConfig
from svdalign.lab.training.record import provenance

MIB = 2**20


@dataclass(frozen=True)
class Net:
    """A network under study. ``local``: settings of the learner for every local method, beside
    ``rule``, settings of the rule."""

    model: str
    rank: float
    size: int
    width: float = 1.0
    local: Mapping[str, Any] = field(default_factory=dict)
    rule: Mapping[str, Any] = field(default_factory=dict)


NETS = {
    "smallconv-16": Net("smallconv", 0.5, 16),
    "smallconv-32": Net("smallconv", 0.5, 32),
    "vgg8-quarter": Net("vgg8", 0.5, 32, 0.25),
    "vgg13": Net("vgg13", 0.25, 32),
    "resnet32": Net("resnet32", 0.8, 16, 0.5, {"units": "block"}),
    "resnet32-recipe": Net(
        "resnet32", 0.8, 16, 0.5, {"units": 6, "recompute": True}, {"widen": 64}
    ),
}

METHODS = ("bp-dense", "bp-dense-checkpointed", "bp", "bp-checkpointed", "h0", "h1", "h2")


def learner_of(net: Net, method: str, x: Tensor) -> sva.Learner:
    """The learner of ``method`` on ``net``, the same initial weights for all."""
    torch.manual_seed(0)
    dense = models.build(net.model, num_classes=10, image_size=net.size, width=net.width)
    model: nn.Module = dense
    if not method.startswith("bp-dense"):
        model = sva.fuse(sva.factorize(dense, net.rank, "channel"))
    model = model.to(memory_format=torch.channels_last)
    if method.startswith("bp"):
        rule = rules.get("bp")
        options: dict[str, Any] = {"recompute": method.endswith("checkpointed")}
    else:
        options = {**net.local, "horizon": int(method[1:])}
        rule = replace(rules.get("ssa"), **net.rule)
    return sva.Learner(
        model,
        rule,
        example=x[:2],
        optimizer=lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.0, fused=x.is_cpu),
        **options,
    )


@dataclass
class Step:
    """One training step, over and over, on one batch."""

    learner: sva.Learner
    x: Tensor
    y: Tensor
    precision: str

    def __call__(self) -> None:
        half = self.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            self.learner.step(self.x, self.y)

    def peak_bytes(self) -> int:
        """Bytes alive at the peak of a step that is not the first."""
        self()  # the optimizer's state exists from now on
        learner = self.learner
        modules = [learner.model, learner.feedback]
        return step_memory(self, modules, learner.optimizer, [self.x, self.y]).peak


def alternate(
    steps: Mapping[str, Callable[[], None]], seconds: float, *, warmup: int = 1, least: int = 3
) -> dict[str, dict[str, float]]:
    """Median wall-clock and CPU seconds of each, and of their ratios to the first two of a round.

    Ratios are taken within a round before the median, which a drift of the machine's speed does
    not touch.
    """
    names = list(steps)
    wall: dict[str, list[float]] = defaultdict(list)
    cpu: dict[str, list[float]] = defaultdict(list)
    end = time.perf_counter() + seconds
    turn = 0
    while turn < warmup + least or time.perf_counter() < end:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter(), time.process_time()
            steps[name]()
            if turn >= warmup:
                wall[name].append(time.perf_counter() - start[0])
                cpu[name].append(time.process_time() - start[1])
        turn += 1
    found: dict[str, dict[str, float]] = {}
    for name in names:
        found[name] = {
            "seconds": statistics.median(wall[name]),
            "cpu_seconds": statistics.median(cpu[name]),
            "rounds": len(cpu[name]),
        }
        for reference in ("bp-dense", "bp"):
            if reference in steps:
                ratios = (a / b for a, b in zip(cpu[name], cpu[reference], strict=True))
                found[name][f"cpu_ratio_to_{reference}"] = statistics.median(ratios)
                ratios = (a / b for a, b in zip(wall[name], wall[reference], strict=True))
                found[name][f"ratio_to_{reference}"] = statistics.median(ratios)
    return found


def measure(
    name: str, methods: list[str], precision: str, threads: int, batch: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Costs of a step by method."""
    torch.set_num_threads(threads)
    net = NETS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, net.size, net.size, generator=generator)
    x, y = x.to(memory_format=torch.channels_last), torch.arange(batch) % 10
    steps = {m: Step(learner_of(net, m, x), x, y, precision) for m in methods}
    found = alternate(steps, seconds)
    for method, step in steps.items():
        found[method]["peak_bytes"] = step.peak_bytes()
    return found


def table(costs: Mapping[str, Mapping[str, float]]) -> str:
    """Costs of the methods of one network as text."""
    lines = [
        f"  {'method':24s} {'MiB':>7s} {'ms':>8s} {'/ BP':>6s} {'/ SVD-BP':>9s} {'rounds':>7s}"
    ]
    for method, cost in costs.items():
        ratios = [cost.get(f"cpu_ratio_to_{r}", float("nan")) for r in ("bp-dense", "bp")]
        lines.append(
            f"  {method:24s} {cost['peak_bytes'] / MIB:7.1f} {1e3 * cost['cpu_seconds']:8.1f} "
            f"{ratios[0]:6.2f} {ratios[1]:9.2f} {cost['rounds']:7.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="for the rounds of one network; at least three"
    )
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    prepare_machine(JobConfig())
    results = []
    for precision in args.precision:
        for threads in args.threads:
            for name in args.nets:
                costs = measure(name, args.methods, precision, threads, args.batch, args.seconds)
                print(f"{name}, {precision}, {threads} thread(s)\n{table(costs)}", flush=True)
                results.append(
                    {"net": name, "precision": precision, "threads": threads, "costs": costs}
                )
    if args.out is not None:
        document = {**provenance("cpu"), "batch": args.batch, "results": results}
        args.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
