"""Two processes of one thread each: units side by side, against what backpropagation can do.

    python benchmarks/parallel.py [--nets vgg13 resnet32 vit] [--out FILE.json]

For each network, images a second, peak memory of a process above what it had before it built the
network, bytes sent a step and share of time spent waiting, of

- SSA at horizon 0 on one process with one thread, and with two;
- the same with its units on two processes (``svdalign.parallel.LayerParallel``);
- backpropagation on the same factors on one process with one thread and two, and on two by
  ``DistributedDataParallel``;
- the same on two by ``torch.distributed.pipelining``, GPipe and 1F1B, in microbatches.

Every job runs in processes of its own, in turns; medians over the rounds. Run it on a machine with
two idle cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import svdalign as sva
from svdalign import parallel
from svdalign.lab import models
from svdalign.lab.training.record import provenance

BATCH, MICROBATCHES, WARMUP = 128, 4, 2
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "vgg13": ("vgg13", {"image_size": 32}),
    "resnet32": ("resnet32", {"image_size": 32}),
    "vit": ("vit_s16", {"image_size": 64, "width": 0.5}),
}
JOBS = {
    "SSA, one process, one thread": ("ssa", 1, 1),
    "SSA, one process, two threads": ("ssa", 1, 2),
    "SSA, units on two processes": ("layers", 2, 1),
    "SVD-BP, one process, one thread": ("bp", 1, 1),
    "SVD-BP, one process, two threads": ("bp", 1, 2),
    "SVD-BP, data-parallel on two processes": ("ddp", 2, 1),
    "SVD-BP, GPipe on two processes": ("gpipe", 2, 1),
    "SVD-BP, 1F1B on two processes": ("1f1b", 2, 1),
}


class Embed(nn.Module):
    """What a vision transformer does before its blocks."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.patches, self.token, self.positions = net.patches, net.token, net.positions

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT
        return torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.positions


class Head(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.norm, self.classifier = net.norm, net.classifier

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.norm(h)[:, 0])
        return out


def chain(net: Any) -> list[nn.Module]:
    """The network as a list of modules that run one after the other."""
    if hasattr(net, "blocks"):
        return [Embed(net), *net.blocks, Head(net)]
    parts: list[nn.Module] = []
    for child in net.children():
        parts += list(child) if isinstance(child, nn.Sequential) else [child]
    return parts


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, options = NETS[name]
    net = models.build(model, num_classes=10, in_channels=3, **options)
    factored = sva.factorize(net, rank=0.25, scheme="channel")
    if name != "vit":
        factored = sva.fuse(factored).to(memory_format=torch.channels_last)
    size = options["image_size"]
    x = torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
    return factored, x, torch.randint(10, (BATCH,))


def make_step(
    kind: str, name: str, rank: int, size: int
) -> tuple[Callable[[], object], Callable[[], dict[str, float]]]:
    """A training step of ``kind``, and what there is to tell of bytes sent and seconds waited."""
    model, x, y = build(name)
    if kind in ("ssa", "layers"):
        learner = sva.Learner(
            model, "ssa", horizon=0, optimizer=lambda p: torch.optim.AdamW(p, 1e-3), example=x
        )
        if kind == "ssa":
            return lambda: learner.step(x, y), _per_step(0)
        stage = parallel.LayerParallel(learner, (x, y))
        return lambda: stage.step(x, y), lambda: {"sent": stage.sent, "waited": stage.waited}
    if kind in ("bp", "ddp"):
        share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        inner = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(inner(x[share]), y[share]).backward()
            optimizer.step()

        gradients = 4 * sum(p.numel() for p in model.parameters()) if kind == "ddp" else 0
        return step, _per_step(gradients)  # between two, every gradient is sent once
    parts = chain(model)
    count = parallel.balanced(_seconds(parts, x[: BATCH // MICROBATCHES]), size)[0]
    mine = nn.Sequential(*(parts[:count] if rank == 0 else parts[count:]))
    stage_ = PipelineStage(mine, rank, size, torch.device("cpu"))
    schedule = (ScheduleGPipe if kind == "gpipe" else Schedule1F1B)(
        stage_, MICROBATCHES, loss_fn=F.cross_entropy
    )
    optimizer = torch.optim.AdamW(mine.parameters(), 1e-3)
    with torch.no_grad():
        border = nn.Sequential(*parts[:count])(x[:2])

    def pipelined() -> None:
        optimizer.zero_grad(set_to_none=True)
        schedule.step(x) if rank == 0 else schedule.step(target=y)
        optimizer.step()

    return pipelined, _per_step(4 * border[0].numel() * BATCH)


def _per_step(sent: int) -> Callable[[], dict[str, float]]:
    return lambda: {"sent_each": sent, "waited": float("nan")}


def _seconds(parts: list[nn.Module], x: Tensor) -> list[float]:
    """Of each part, forward and backward, for a microbatch."""
    found = []
    for part in parts:
        took = []
        for _ in range(3):
            h = x.detach().requires_grad_()
            started = time.perf_counter()
            out = part(h)
            out.sum().backward()
            took.append(time.perf_counter() - started)
        found.append(min(took))
        x = out.detach()
    return found


def run(kind: str, name: str, rank: int, size: int, threads: int, steps: int, folder: str) -> None:
    torch.set_num_threads(threads)
    if size > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step, tell = make_step(kind, name, rank, size)
    for _ in range(WARMUP):
        step()
    if size > 1:
        dist.barrier()
    told, started = tell(), time.perf_counter()
    for _ in range(steps):
        step()
    if size > 1:
        dist.barrier()
    seconds = time.perf_counter() - started
    after = tell()
    sent = after["sent_each"] if "sent_each" in after else (after["sent"] - told["sent"]) / steps
    found = {
        "images_per_second": steps * BATCH / seconds,
        "peak_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "sent_bytes": sent,
        "waited_share": (after["waited"] - told["waited"]) / seconds,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure(job: str, name: str, steps: int) -> dict[str, Any]:
    kind, size, threads = JOBS[job]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=run, args=(kind, name, rank, size, threads, steps, folder))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(600)
            if process.exitcode:
                raise RuntimeError(f"{job} on {name}: a process ended with {process.exitcode}")
        found = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(size)]
    return {
        "images_per_second": min(f["images_per_second"] for f in found),
        "peak_bytes": [f["peak_bytes"] for f in found],
        "sent_bytes": max(f["sent_bytes"] for f in found),
        "waited_share": [f["waited_share"] for f in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parallel.json"))
    options = parser.parse_args()
    rows = []
    for name in options.nets:
        rounds = [
            {job: measure(job, name, options.steps) for job in JOBS} for _ in range(options.rounds)
        ]
        base = statistics.median(
            r["SSA, one process, one thread"]["images_per_second"] for r in rounds
        )
        for job in JOBS:
            speeds = [r[job]["images_per_second"] for r in rounds]
            row = {
                **rounds[-1][job],
                "net": name,
                "job": job,
                "images_per_second": statistics.median(speeds),
                "rounds": speeds,
                "ratio": statistics.median(speeds) / base,
            }
            rows.append(row)
            print(
                f"{name:9} {job:40} {row['images_per_second']:7.0f} img/s  {row['ratio']:.2f}×  "
                f"{max(row['peak_bytes']) / 2**20:5.0f} MiB  {row['sent_bytes'] / 2**20:6.2f} MiB",
                flush=True,
            )
    content = {"batch": BATCH, "microbatches": MICROBATCHES, "rows": rows, **provenance("cpu")}
    options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
