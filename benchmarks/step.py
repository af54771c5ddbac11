"""What one training step costs: local learning against backpropagation on the same factors.

    python benchmarks/step.py [--nets ...] [--methods ...] [--threads 1 2] [--precision fp32 bf16]
        [--batch 128] [--minutes 8] [--device cpu] [--out benchmarks/results/step.json]
    python benchmarks/step.py --show benchmarks/results/step.json

For each network all methods take their steps in turns on one batch, so that other load on the
machine hits all alike. Reported are medians over the rounds: seconds of a step, CPU seconds of the
process, and their ratios to dense backpropagation and to backpropagation on the same factors; and
the bytes that are alive at the peak of a step, which do not depend on the load. The time is shared
out among the combinations, at least two rounds each; the file is written after each of them. With
``--device cuda`` it is waited for before and after each step.
``--show`` prints a file as Markdown.

Methods: ``bp-dense`` is backpropagation, ``bp`` the same on fused factors, ``ssa-N`` SSA with
horizon N, ``ssa-balanced-N`` in two units of about equal memory, ``ssa-unaligned-N`` without
similarity; ``-checkpointed`` adds gradient checkpointing of the segments that save most,
``-measured`` lets each layer compute with its fastest kernel (``svdalign.fuse(model, x)``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import svdalign as sva
from svdalign import rules
from svdalign.lab import models
from svdalign.lab.experiments.costs import Step
from svdalign.lab.training.build import precision, prepare_machine
from svdalign.lab.training.checkpointing import smallest_checkpointed
from svdalign.lab.training.config import JobConfig
from svdalign.lab.training.provenance import provenance

MIB = 2**20
REFERENCES = ("bp-dense", "bp")


@dataclass(frozen=True)
class Net:
    """A network under study, at ``size`` pixels. ``local``: settings of the learner for every local
    method; ``rule``: of the rule."""

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
    "resnet32": Net("resnet32", 0.8, 16, 0.5),
    "resnet32-recipe": Net("resnet32", 0.8, 16, 0.5, {"units": 6}, {"widen": 64}),
}
METHODS = (
    "bp-dense", "bp-dense-checkpointed", "bp", "bp-checkpointed", "bp-measured",
    "ssa-0", "ssa-0-measured", "ssa-unaligned-0", "ssa-balanced-0", "ssa-balanced-unaligned-0",
    "ssa-balanced-unaligned-0-measured", "ssa-1", "ssa-2",
)  # fmt: skip


def make_step(net: Net, method: str, job: JobConfig) -> Step:
    """The step of ``method`` on ``net``, from the same initial weights for all."""
    torch.manual_seed(0)
    batch, device = job.batch_size, job.device
    x = torch.randn(batch, 3, net.size, net.size).to(memory_format=torch.channels_last)
    x, y = x.to(device), (torch.arange(batch) % 10).to(device)
    name, *kinds = method.split("-")
    model: nn.Module = models.build(
        net.model, num_classes=10, image_size=net.size, width=net.width
    ).to(memory_format=torch.channels_last)
    if "dense" not in kinds:
        model = sva.factorize(model, net.rank, "channel").to(memory_format=torch.channels_last)
    model = model.to(device)
    if "dense" not in kinds:
        with precision(job):
            model = sva.fuse(model, x if "measured" in kinds else None)
    if "checkpointed" in kinds:
        model = smallest_checkpointed(model, tuple(x.shape))
    options: dict[str, Any] = {"rule": "bp"}
    if name == "ssa":
        rule = replace(rules.get("ssa"), **net.rule)
        if "unaligned" in kinds:
            rule = replace(rule, alpha=0.0)
        horizon = next(int(kind) for kind in kinds if kind.isdigit())
        options = {"rule": rule, "horizon": horizon, **net.local}
        if "balanced" in kinds:
            options["units"] = "balanced"
    learner = sva.Learner(
        model,
        example=x[:2],
        optimizer=lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.0, fused=True),
        **options,
    )
    return Step(learner, job, x, y)


def alternate(
    steps: Mapping[str, Callable[[], None]], seconds: float
) -> dict[str, dict[str, float]]:
    """Median wall-clock and CPU seconds of each after a round to warm up, and medians of their
    ratios to the references within a round, which a drift of the machine's speed does not touch."""
    names = list(steps)
    taken: dict[str, dict[str, list[float]]] = {
        "seconds": defaultdict(list), "cpu_seconds": defaultdict(list)
    }  # fmt: skip
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        if turn > 2 and time.perf_counter() > end:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter(), time.process_time()
            steps[name]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn > 0:
                taken["seconds"][name].append(time.perf_counter() - start[0])
                taken["cpu_seconds"][name].append(time.process_time() - start[1])
    found: dict[str, dict[str, float]] = {name: {"rounds": turn - 1} for name in names}
    for (kind, times), name in itertools.product(taken.items(), names):
        found[name][kind] = statistics.median(times[name])
        for reference in set(REFERENCES).intersection(names):
            pairs = zip(times[name], times[reference], strict=True)
            found[name][f"{kind}_to_{reference}"] = statistics.median(a / b for a, b in pairs)
    return found


def measure(
    net: Net, methods: list[str], job: JobConfig, seconds: float
) -> dict[str, dict[str, float]]:
    """Costs of a step by method."""
    start = time.perf_counter()
    steps = {method: make_step(net, method, job) for method in methods}
    peaks = {method: step.memory().peak for method, step in steps.items()}
    left = seconds - (time.perf_counter() - start)
    found = alternate(steps, left)
    return {method: {"peak_bytes": peaks[method], **found[method]} for method in methods}


def table(result: Mapping[str, Any]) -> str:
    """Costs of the methods on one network, in Markdown; times of one thread are CPU seconds."""
    where = result.get("device", f"{result['threads']} thread(s)")
    kind = "cpu_seconds" if where == "1 thread(s)" else "seconds"
    title = f"{result['net']}, {result['precision']}, {where}"
    lines = [
        f"| {title} | peak, MiB | ms | of BP | of SVD-BP |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, cost in result["costs"].items():
        ratios = [cost.get(f"{kind}_to_{r}") for r in REFERENCES]
        cells = [f"{cost['peak_bytes'] / MIB:.1f}", f"{1e3 * cost[kind]:.1f}"]
        cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=8.0, help="shared out among all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--show", type=Path, default=None, help="print this file and end")
    args = parser.parse_args()
    if args.show is not None:
        print("\n".join(map(table, json.loads(args.show.read_text())["results"])))
        return
    prepare_machine(JobConfig(device=args.device))
    end = time.perf_counter() + 60 * args.minutes
    document = {**provenance(args.device), "batch": args.batch, "results": list[Any]()}
    todo = list(itertools.product(args.threads, args.precision, args.nets))
    for i, (threads, bits, name) in enumerate(todo):
        torch.set_num_threads(threads)
        share = (end - time.perf_counter()) / (len(todo) - i)
        job = JobConfig(precision=bits, batch_size=args.batch, device=args.device)
        costs = measure(NETS[name], args.methods, job, share)
        result = {"net": name, "precision": bits, "threads": threads, "costs": costs}
        result |= {} if args.device == "cpu" else {"device": args.device}
        print(table(result), flush=True)
        document["results"].append(result)
        if args.out is not None:
            args.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
