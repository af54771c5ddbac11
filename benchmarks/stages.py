"""How fast 8, 64 and 512 stages would be, from measured unit times and stated links.

    python benchmarks/stages.py --validate benchmarks/results/parallel.json --plot docs/stages.svg

Units on p processes take, for a batch in the steady state,

    T(p) = max( longest stage, longest border: bytes / bandwidth + latency ),

where a stage is the sum of the measured times of its units and of a forward pass without values
through all units before it (``LayerParallel`` leaves the model's own ``forward`` as it is, so each
stage runs what comes before on torch's meta device). Borders overlap with work: a process sends
while it works on the next batch. There is no bubble. A pipeline of backpropagation (GPipe, 1F1B) in
m microbatches of the same stages takes (m + p - 1) / m times its longest stage.

The network is a CIFAR ResNet-1202 (He et al. 2016): 600 blocks, so that 512 stages can have one
each. Where p processes have fewer cores than processes, the least is the sum of all stages over
the cores. ``--validate``: the same formula against what ``benchmarks/parallel.py`` measured.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import svdalign as sva
from svdalign import parallel
from svdalign.lab.models._resnet import ResNet
from svdalign.lab.training.provenance import provenance
from svdalign.lab.training.record import read_json, write_json

LINKS = {  # bits a second, seconds
    "1 Gbit/s, 100 µs": (1e9, 1e-4),
    "10 Gbit/s, 50 µs": (1e10, 5e-5),
    "100 Gbit/s, 10 µs": (1e11, 1e-5),
}
STAGES = (1, 2, 3, 8, 64, 512)
MICROBATCHES = 8


def longest(seconds: Sequence[float], counts: Sequence[int], meta: Sequence[float]) -> list[float]:
    """Seconds of each stage: of its units, and of the pass without values through those before."""
    found, at = [], 0
    for count in counts:
        found.append(sum(seconds[at : at + count]) + sum(meta[:at]))
        at += count
    return found


def border_seconds(
    sizes: Sequence[int], counts: Sequence[int], bandwidth: float, latency: float
) -> float:
    """Of the slowest border between two stages; ``sizes``: bytes that each unit hands on."""
    ends = [sum(counts[: i + 1]) - 1 for i in range(len(counts) - 1)]
    return max((8 * sizes[end] / bandwidth + latency for end in ends), default=0.0)


def handed_on(learner: sva.Learner, x: torch.Tensor) -> tuple[list[int], list[float]]:
    """By unit: bytes of what it hands on for ``x``, and seconds of a pass without values."""
    sizes: list[int] = []
    ends: list[float] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tensors = [v for v in tree_leaves(output) if isinstance(v, torch.Tensor)]
        sizes.append(sum(v.numel() * v.element_size() for v in tensors))
        ends.append(time.perf_counter())

    model = learner.model.to("meta")
    paths = [unit.exit for unit in learner.units[:-1]]
    handles = [model.get_submodule(path).register_forward_hook(hook) for path in paths]
    with torch.no_grad():
        for _ in range(2):  # the first is a warm-up
            sizes.clear()
            ends[:] = [time.perf_counter()]
            model(x.to("meta"))
    for handle in handles:
        handle.remove()
    return sizes, [*(b - a for a, b in itertools.pairwise(ends)), 0.0]


def measure(depth: int, batch: int) -> dict[str, Any]:
    torch.manual_seed(0)
    net = sva.factorize(ResNet(depth, 10, 3, 1.0), rank=0.25, scheme="channel")
    model = sva.fuse(net).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,))
    learner = sva.Learner(
        model, "ssa", horizon=0, optimizer=lambda p: torch.optim.SGD(p, 1e-3), example=x[:2]
    )
    seconds = parallel.unit_seconds(learner, x, y, repeats=2)
    sizes, meta = handed_on(learner, x)
    return {
        "layers": 6 * depth + 2,
        "batch": batch,
        "seconds": seconds,
        "bytes": sizes,
        "meta": meta,
    }


def predict(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    seconds, none = found["seconds"], [0.0] * len(found["seconds"])
    for p in STAGES:
        if p > len(seconds):
            continue
        counts = parallel.balanced(seconds, p)
        stage = max(longest(seconds, counts, found["meta"]))
        ideal = max(longest(seconds, counts, none))
        row = {"stages": p, "stage_seconds": stage, "without_prefix_seconds": ideal, "links": {}}
        for name, link in LINKS.items():
            took = max(stage, border_seconds(found["bytes"], counts, *link))
            row["links"][name] = {
                "images_per_second": found["batch"] / took,
                "times_one": sum(seconds) / took,
                "times_one_without_prefix": sum(seconds)
                / max(ideal, border_seconds(found["bytes"], counts, *link)),
            }
        row["bubble"] = (p - 1) / (MICROBATCHES + p - 1)
        rows.append(row)
    return rows


def validate(measured: dict[str, Any], cores: int) -> list[dict[str, Any]]:
    """The formula against images a second that were measured on one machine."""
    rows = []
    for name, jobs in measured["rows"].items():
        for job in jobs.values():
            if "unit_seconds" not in job:
                continue
            seconds = job["unit_seconds"]
            stages = longest(seconds, job["partition"], [0.0] * len(seconds))
            took = max(max(stages), sum(seconds) / min(cores, len(stages)))
            predicted = measured["batch"] / took
            rows.append(
                {
                    "net": name,
                    "stages": len(stages),
                    "predicted": predicted,
                    "measured": job["images_per_second"],
                    "ratio": job["images_per_second"] / predicted,
                }
            )
            print(rows[-1])
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    ps = [row["stages"] for row in rows]
    for name in LINKS:
        line = [row["links"][name]["times_one_without_prefix"] for row in rows]
        axes.plot(ps, line, marker="o", label=f"units side by side, {name}")
    prefix = [row["links"]["100 Gbit/s, 10 µs"]["times_one"] for row in rows]
    axes.plot(ps, prefix, marker="s", label="as it is now: each stage passes through those before")
    axes.plot(
        ps,
        [row["stages"] * (1 - row["bubble"]) for row in rows],
        linestyle="--",
        color="grey",
        label=f"backpropagation in {MICROBATCHES} microbatches, at best",
    )
    axes.set(xscale="log", yscale="log", xlabel="stages", ylabel="times one process")
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=200, help="blocks a stage of the ResNet")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--keep", action="store_true", help="use the unit times in the file")
    parser.add_argument("--validate", type=Path, help="a file of benchmarks/parallel.py")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stages.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    content = read_json(options.out) or {}
    if not options.keep:
        content |= {**measure(options.depth, options.batch_size), **provenance("cpu")}
    content["rows"] = predict(content)
    if options.validate:
        measured = read_json(options.validate)
        assert measured is not None, f"{options.validate} holds nothing"
        content["validation"] = validate(measured, measured["machine"]["cores"])
    write_json(options.out, content)
    for row in content["rows"]:
        links = {name: round(link["times_one"], 1) for name, link in row["links"].items()}
        print(row["stages"], links, f"bubble of backpropagation {row['bubble']:.0%}")
    if options.plot:
        plot(content["rows"], options.plot)


if __name__ == "__main__":
    main()
