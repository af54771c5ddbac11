"""One real training step of a network too large for backpropagation on this machine.

    python benchmarks/large_step.py [--model vit_l16] [--batch-size 256] [--precision bf16]

SSA at horizon 0, 224×224 pixels, 1,000 classes: peak resident memory of a process that builds the
network and takes a step, beside the estimates for it and for its rivals. What the process takes
before it builds the network (Python and torch) is given as well.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import svdalign as sva
from svdalign.lab import models
from svdalign.lab.experiments.profile import Profile, ProfileConfig
from svdalign.lab.training.provenance import provenance

METHODS = ["bp-dense", "bp-dense-checkpointed", "bp", "bp-checkpointed", "ssa"]
SIZE, CLASSES = 224, 1000


def resident() -> int:
    """Peak resident memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def step(model: str, batch_size: int, rank: float, precision: str) -> dict[str, Any]:
    """Build the network, take one step; in a process of its own."""
    before = resident()
    torch.manual_seed(0)
    net = models.build(model, num_classes=CLASSES, in_channels=3, image_size=SIZE)
    factored = sva.factorize(net, rank=rank, scheme="channel")
    del net
    factored = sva.fuse(factored)
    if model.startswith("resnet"):
        factored = factored.to(memory_format=torch.channels_last)
    x = torch.randn(batch_size, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    y = torch.randint(CLASSES, (batch_size,))
    learner = sva.Learner(
        factored,
        "ssa",
        horizon=0,
        optimizer=lambda p: torch.optim.AdamW(p, 1e-4, foreach=False),
        example=x[:2],
    )
    built, started = resident(), time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        report = learner.step(x, y)
    return {
        "seconds": time.perf_counter() - started,
        "loss": report.loss.item(),
        "units": len(learner.units),
        "resident_before": before,
        "resident_built": built,
        "resident_peak": resident(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_l16")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rank", type=float, default=0.25)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--out", type=Path, help="benchmarks/results/large_step_MODEL.json")
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    job = (options.model, options.batch_size, options.rank, options.precision)
    if options.step:
        print(json.dumps(step(*job)))
        return
    worked_out = Profile(
        ProfileConfig(
            model=options.model,
            image_size=SIZE,
            classes=CLASSES,
            batch_size=options.batch_size,
            rank=options.rank,
            methods=METHODS,
            estimate=True,
        ),
        f"runs/large_step_{options.model}",
        overwrite=True,
    ).run()
    estimates = {row["label"]: row["memory"]["peak"] for row in worked_out["methods"]}
    for label, peak in estimates.items():
        print(f"{label:28} {peak / 2**30:6.1f} GiB, fp32, worked out", flush=True)
    done = subprocess.run(
        [sys.executable, *sys.argv, "--step"], capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    print(
        f"SSA, horizon 0: {measured['resident_peak'] / 2**30:.1f} GiB resident at the peak of a "
        f"real step in {options.precision} ({measured['resident_before'] / 2**30:.1f} GiB of it "
        f"before the network is built), {measured['seconds']:.0f} s"
    )
    config = dict(zip(("model", "batch_size", "rank", "precision"), job, strict=True))
    content = {"config": config, "estimates": estimates, **measured, **provenance("cpu")}
    out = options.out or Path(f"benchmarks/results/large_step_{options.model}.json")
    out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
