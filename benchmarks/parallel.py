"""Two processes of one thread each: units side by side, against what backpropagation can do.

    python benchmarks/parallel.py --nets vgg13 [--memory] [--processes 3]

Speed (the default): two processes keep every job ready and run them in turns, so that a drift of
the machine's speed affects all alike. Images a second and shares of idle time are of the steady
state: the clock of a pipeline runs while all its processes are at work. Medians over the rounds,
and beside them how many cores other programs kept busy meanwhile: run it on a machine with as many
idle cores as processes.

- SSA at horizon 0 on one process with one thread, and with two;
- the same on every process independently, added up: the upper bound for this machine;
- the same with its units on two processes (``svdalign.parallel.LayerParallel``);
- backpropagation on the same factors on one process with one thread and two, on two by
  ``DistributedDataParallel``, and in microbatches by ``torch.distributed.pipelining`` (GPipe,
  1F1B); and on the dense network.

``--memory``: each job in fresh processes; peak resident memory of a process during steps, above
what it had, with its libraries, before it built the network. It needs no idle machine. Both write
into the same file, a network at a time.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
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
from svdalign.lab.training.build import prepare_machine
from svdalign.lab.training.config import JobConfig
from svdalign.lab.training.provenance import provenance
from svdalign.lab.training.record import read_json, write_json

BATCH = 128
TAIL = 3  #: steps after the clock of a pipeline's process has stopped, for the others to end theirs
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "vgg13": ("vgg13", {"image_size": 32}),
    "resnet32": ("resnet32", {"image_size": 32}),
    "vit": ("vit_s16", {"image_size": 64, "width": 0.5}),
}


@dataclass(frozen=True)
class Job:
    """``kind`` of training on ``size`` processes (0: all), each with ``threads``."""

    kind: str
    size: int = 1
    threads: int = 1
    dense: bool = False
    microbatches: int = 1


BASE, ROOF = "SSA, one process, one thread", "SSA, by itself on each process, added up"
LAYERS = "SSA, units on all processes"
JOBS = {
    BASE: Job("ssa"),
    "SSA, one process, two threads": Job("ssa", threads=2),
    ROOF: Job("alone", 0),
    LAYERS: Job("layers", 0),
    "SVD-BP, one process, one thread": Job("bp"),
    "SVD-BP, one process, two threads": Job("bp", threads=2),
    "SVD-BP, data-parallel": Job("ddp", 0),
    "SVD-BP, GPipe, 4 microbatches": Job("gpipe", 0, microbatches=4),
    "SVD-BP, 1F1B, 4 microbatches": Job("1f1b", 0, microbatches=4),
    "SVD-BP, 1F1B, 8 microbatches": Job("1f1b", 0, microbatches=8),
    "BP, one process, two threads": Job("bp", threads=2, dense=True),
    "BP, data-parallel": Job("ddp", 0, dense=True),
}


# --- networks -----------------------------------------------------------------------------------


def build(name: str, dense: bool) -> tuple[nn.Module, Tensor, Tensor]:
    net = copy.deepcopy(network(name, dense))
    size = NETS[name][1]["image_size"]
    x = torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
    return net, x, torch.randint(10, (BATCH,))


@cache
def network(name: str, dense: bool) -> nn.Module:
    torch.manual_seed(0)
    model, options = NETS[name]
    net = models.build(model, num_classes=10, in_channels=3, **options)
    if not dense:
        net = sva.factorize(net, rank=0.25, scheme="channel")
        net = net if name == "vit" else sva.fuse(net)
    return net.to(memory_format=torch.channels_last)


class Embed(nn.Module):
    """The part of a vision transformer before its blocks."""

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


class Turned(nn.Module):
    """``inner`` with maps of shape (B, h, w, C) at borders inside the network: in memory they are
    channels-last, and gloo sends contiguous tensors only."""

    def __init__(self, inner: nn.Module, first: bool, last: bool) -> None:
        super().__init__()
        self.inner, self.first, self.last = inner, first, last

    def forward(self, h: Tensor) -> Tensor:
        h = h.permute(0, 3, 1, 2) if h.ndim == 4 and not self.first else h
        h = self.inner(h)
        return h.permute(0, 2, 3, 1).contiguous() if h.ndim == 4 and not self.last else h


def chain(net: Any) -> list[nn.Module]:
    """The network as a list of modules that run one after the other."""
    if hasattr(net, "blocks"):
        return [Embed(net), *net.blocks, Head(net)]
    parts: list[nn.Module] = []
    for child in net.children():
        parts += list(child) if isinstance(child, nn.Sequential) else [child]
    return parts


def seconds_of(parts: list[nn.Module], x: Tensor) -> list[float]:
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


# --- jobs ---------------------------------------------------------------------------------------


def make(job: Job, name: str, rank: int, size: int) -> tuple[Callable[[], object], dict[str, Any]]:
    """A training step of this process, and numbers to report of it."""
    model, x, y = build(name, job.dense)
    if job.kind in ("ssa", "alone", "layers"):
        learner = sva.Learner(
            model, "ssa", horizon=0, optimizer=lambda p: torch.optim.AdamW(p, 1e-3), example=x[:2]
        )
        if job.kind != "layers":
            return lambda: learner.step(x, y), {}
        stage = parallel.LayerParallel(learner, (x, y))
        stage.step(x, y)
        told = {"partition": stage.partition, "unit_seconds": stage.seconds, "sent": stage.sent}
        return lambda: stage.step(x, y), told
    if job.kind in ("bp", "ddp"):
        share = slice(rank * BATCH // size, (rank + 1) * BATCH // size) if job.size == 0 else ...
        inner = nn.parallel.DistributedDataParallel(model) if job.kind == "ddp" else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(inner(x[share]), y[share]).backward()
            optimizer.step()

        gradients = 4 * sum(p.numel() for p in model.parameters())
        # A ring: each process sends every gradient 2 (n - 1) / n times.
        return step, {"sent": gradients * 2 * (size - 1) // size} if job.size == 0 else {}
    parts = chain(model)
    costs = torch.tensor(seconds_of(parts, x[: BATCH // job.microbatches]))
    dist.broadcast(costs, 0)  # both have to cut alike
    ends = [0]
    for count in parallel.balanced(costs.tolist(), size):
        ends.append(ends[-1] + count)
    inner = nn.Sequential(*parts[ends[rank] : ends[rank + 1]])
    mine = Turned(inner, first=rank == 0, last=rank == size - 1)
    with torch.no_grad():
        border = nn.Sequential(*parts[: ends[1]])(x[:2])
    stage_ = PipelineStage(mine, rank, size, torch.device("cpu"))
    kind = ScheduleGPipe if job.kind == "gpipe" else Schedule1F1B
    schedule = kind(stage_, job.microbatches, loss_fn=F.cross_entropy)
    optimizer = torch.optim.AdamW(mine.parameters(), 1e-3)

    def pipelined() -> None:
        optimizer.zero_grad(set_to_none=True)
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y) if rank == size - 1 else schedule.step()
        optimizer.step()

    return pipelined, {"sent": 4 * border[0].numel() * BATCH, "partition": ends}


def at_work(job: Job, rank: int) -> bool:
    return rank == 0 or job.size == 0


def speeds(name: str, jobs: list[str], steps: int, end: float, rank: int, size: int) -> Any:
    """By job, this process's images a second and idle share in each round, and the numbers that it
    reports; and how many cores other programs kept busy in each round."""
    prepare_machine(JobConfig())
    found: dict[str, dict[str, Any]] = {}
    made = {}
    for key in jobs:
        if at_work(JOBS[key], rank):
            torch.set_num_threads(JOBS[key].threads)
            made[key], told = make(JOBS[key], name, rank, size)
            found[key] = {**told, "speeds": [], "idle": []}
            made[key]()
        dist.barrier()
        if rank == 0:
            print(f"{name:9} {key:42} ready", file=sys.stderr, flush=True)
    others: dict[str, list[float]] = {key: [] for key in jobs}
    go_on = torch.ones(())
    while go_on:
        for key in jobs:
            before, started = cpu_of_others(), time.perf_counter()
            if key in made:
                torch.set_num_threads(JOBS[key].threads)
                took, busy = timed(made[key], steps, TAIL if JOBS[key].size == 0 else 0)
                found[key]["speeds"].append(steps * BATCH / took)
                found[key]["idle"].append(max(0.0, 1 - busy / took / JOBS[key].threads))
            others[key].append((cpu_of_others() - before) / (time.perf_counter() - started))
        go_on.fill_(time.monotonic() < end)
        dist.broadcast(go_on, 0)
    return {"jobs": found, "others": others}


def cpu_of_others() -> float:
    """CPU seconds that all but these processes have had so far, the system's own included."""
    own = torch.tensor(time.process_time(), dtype=torch.float64)
    dist.all_reduce(own)
    user, nice, system, _, _, irq, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK") - own.item()


def timed(step: Callable[[], object], steps: int, tail: int) -> tuple[float, float]:
    """Wall-clock and CPU seconds of so many steps in the middle of others."""
    step()
    started, busy = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    took, busy = time.perf_counter() - started, time.process_time() - busy
    for _ in range(tail):
        step()
    return took, busy


def peak(name: str, key: str, rank: int, size: int) -> Any:
    """Peak resident bytes of this process while it takes steps of the only job."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # what is freed goes back to the system at once
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 65536)
    libc.mallopt(M_TRIM_THRESHOLD, 65536)
    job = JOBS[key]
    torch.set_num_threads(job.threads)
    warm_up()
    before = status("VmRSS")
    if not at_work(job, rank):
        return {}
    step, told = make(job, name, rank, size)
    network.cache_clear()
    step()
    step()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    step()
    step()
    return {**told, "peak_bytes": status("VmHWM") - before}


def warm_up() -> None:
    """Steps of a tiny network: libraries take their memory when they are first used."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(8 * 36, 10))
    x, y = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
    for model, rule in ((sva.fuse(sva.factorize(net)), "ssa"), (net, "bp")):
        sva.Learner(model, rule, optimizer=lambda p: torch.optim.AdamW(p, 1e-3), example=x).step(
            x, y
        )


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


# --- processes ----------------------------------------------------------------------------------

WHAT = {"speeds": speeds, "peak": peak}
CONTEXT = multiprocessing.get_context("forkserver")


def process(what: str, folder: str, rank: int, size: int, *arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=10),
    )
    found = WHAT[what](*arguments, rank, size)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def on_processes(what: str, size: int, *arguments: Any) -> list[dict[str, Any]]:
    """What each of ``size`` processes found."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=process, args=(what, folder, rank, size, *arguments))
            for rank in range(size)
        ]
        for p in processes:
            p.start()
        for p in processes:
            p.join()
        if any(p.exitcode for p in processes):
            raise RuntimeError(f"a process ended with {[p.exitcode for p in processes]}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240, help="for a network, about")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="measure memory, not speed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parallel.json"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "2"  # the most that any job sets
    CONTEXT.set_forkserver_preload(["svdalign.lab.models", "torch.distributed.pipelining"])
    size = options.processes
    for name in options.nets:
        content = read_json(options.out) or {}
        title = f"{name}, {size} processes"
        rows = content.setdefault("rows", {}).setdefault(title, {})
        what = "memory" if options.memory else "speed"
        content.setdefault("made", {})[f"{title}, {what}"] = provenance("cpu")
        if options.memory:
            for key in options.jobs:
                found = on_processes("peak", size, name, key)
                bytes_ = [f["peak_bytes"] for f in found if f]
                rows.setdefault(key, {})["peak_bytes"] = bytes_
                print(f"{name:9} {key:42}", *(f"{b / 2**20:6.0f} MiB" for b in bytes_), flush=True)
                write_json(options.out, {**content, "batch": BATCH, **provenance("cpu")})
        else:
            end = time.monotonic() + options.seconds
            found = on_processes("speeds", size, name, options.jobs, options.steps, end)
            for key in options.jobs:
                each = [f["jobs"][key] for f in found if key in f["jobs"]]
                row = rows.setdefault(key, {})
                row |= summary(key, each)
                row["others"] = statistics.median(found[0]["others"][key])
            base = rows[BASE]["rounds"]
            for key in options.jobs:
                row = rows[key]
                ratios = [a / b for a, b in zip(row["rounds"], base, strict=True)]
                row["ratio"] = statistics.median(ratios)
                idle = " ".join(f"{share:.0%}" for share in row["idle"])
                print(
                    f"{name:9} {key:42} {row['images_per_second']:7.0f} images/s "
                    f"{row['ratio']:5.2f}×  idle {idle:8} {row['sent'] / 2**20:6.2f} MiB sent  "
                    f"others {row['others']:.2f} cores",
                    flush=True,
                )
        write_json(options.out, {**content, "batch": BATCH, **provenance("cpu")})


def summary(key: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """One job, from what its processes found."""
    together = sum if JOBS[key].kind == "alone" else min
    rounds = [together(values) for values in zip(*(f["speeds"] for f in found), strict=True)]
    told = {k: v for k, v in found[0].items() if k not in ("speeds", "idle")}
    return {
        **told,
        "sent": max(f.get("sent", 0) for f in found),
        "rounds": rounds,
        "images_per_second": statistics.median(rounds),
        "idle": [statistics.median(f["idle"]) for f in found],
    }


if __name__ == "__main__":
    main()
