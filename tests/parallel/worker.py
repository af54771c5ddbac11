"""What one process of a test does: :func:`main`, started on each of them."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import svdalign as sva
from svdalign import parallel
from svdalign.rules import SSA

torch.set_num_threads(1)


def net(norm: bool = True) -> nn.Module:
    """A chain. No biases before norms: Adam would make steps of their rounding errors."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in ((1, 6), (6, 8), (8, 8)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=not norm)]
        layers += [*[nn.BatchNorm2d(b)] * norm, nn.ReLU()]
    layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 9, 12), nn.ReLU(), nn.Linear(12, 4)]
    return nn.Sequential(*layers).double()


@dataclasses.dataclass
class Map:
    """What blocks hand on: a tensor by name."""

    values: Tensor


class Residual(nn.Module):
    """A forward of its own: functional activations, a skip inside blocks, a pooled end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.body = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = Map(torch.relu(self.stem(x)))
        for block in self.body:
            h = block(h)
        return self.head(h.values.mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Map) -> Map:
        return Map(torch.relu(x.values + self.norm(self.conv(x.values))))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual().double()


NETS = {"chain": net, "fused": net, "residual": residual}


def batches(n: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 1, 6, 6, generator=g).double(),
            torch.randint(0, 4, (size,), generator=g),
        )
        for _ in range(n)
    ]


def learner(kind: str, horizon: int = 0, **options: Any) -> sva.Learner:
    model = sva.factorize(NETS[kind](), rank=0.4, scheme="channel")
    if kind == "fused":
        model = sva.fuse(model)
    return sva.Learner(
        model,
        SSA(horizon=horizon, grid=2),
        units="block" if kind == "residual" else "layer",
        optimizer=lambda p: torch.optim.AdamW(p, 1e-2),
        example=batches(1)[0][0],
        **options,
    )


def main(job: str, rank: int, size: int, folder: Path, *arguments: Any) -> None:
    """Run ``job`` as one of ``size`` processes; what goes wrong is in ``errorRANK.txt``."""
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / f'meeting-{job}-{size}'}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=5 if job == "endless" else 60),
        )
        JOBS[job](rank, size, folder, *arguments)
        dist.barrier()
    except BaseException:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)


def command(rank: int, size: int, folder: Path, port: int, words: list[str]) -> None:
    """``svdalign WORDS`` as ``torchrun`` starts it; its exit code is the process's."""
    os.chdir(folder)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    from svdalign.lab.cli import main as svdalign

    with (folder / f"said{rank}.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os._exit(svdalign(words))


def layers(rank: int, size: int, folder: Path, kind: str, horizon: int) -> None:
    """Six steps, a cut of ranks, two more; the output and the whole state afterwards."""
    mine = learner(kind, horizon)
    stage = parallel.LayerParallel(mine, batches(1)[0])
    foreign = [n for n, p in mine.model.named_parameters() if p.is_meta]
    losses = []
    for i, (x, y) in enumerate(batches(8)):
        if i == 6:
            with stage.whole() as whole:
                sva.reduce_rank(whole.model, whole.optimizer, rank=2)
        losses.append(stage.step(x, y).loss)
    mine.model.eval()
    z = stage(batches(1)[0][0])
    stage.save(folder / "state.safetensors")
    torch.save(
        {"losses": torch.stack(losses), "z": z, "foreign": foreign, "sent": stage.sent,
         "partition": stage.partition},
        folder / f"rank{rank}.pt",
    )  # fmt: skip


def shapes(rank: int, size: int, folder: Path) -> None:
    """Steps on batches of changing size; how often a module inside the first block ran."""
    mine = learner("residual")
    stage = parallel.LayerParallel(mine, batches(1)[0], partition=(2, len(mine.units) - 2))
    ran = []
    mine.model.body[0].conv.register_forward_hook(lambda *_: ran.append(1))
    losses = [stage.step(x, y).loss for x, y in of_sizes(8, 8, 5, 5, 8)]
    torch.save({"losses": torch.stack(losses), "ran": len(ran)}, folder / f"rank{rank}.pt")


def of_sizes(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(x[:n], y[:n]) for (x, y), n in zip(batches(len(sizes)), sizes, strict=True)]


def resumed(rank: int, size: int, folder: Path, kind: str, horizon: int) -> None:
    """Two steps more from the file that another number of processes wrote."""
    mine = learner(kind, horizon)
    sva.load(folder / "state.safetensors", into=mine)
    stage = parallel.LayerParallel(mine, batches(1)[0])
    for x, y in batches(10)[8:]:
        stage.step(x, y)
    stage.save(folder / "further.safetensors")


def gradients(rank: int, size: int, folder: Path, horizon: int) -> None:
    """The gradients of one batch."""
    stage = parallel.LayerParallel(learner("chain", horizon), batches(1)[0])
    stage.backward(*batches(1)[0])
    found = {n: p.grad for n, p in stage.model.named_parameters() if p.grad is not None}
    torch.save({"gradients": found, "partition": stage.partition}, folder / f"rank{rank}.pt")


def side(seed: int = 0) -> sva.Learner:
    """A learner whose loss is a mean over samples."""
    return sva.Learner(
        sva.factorize(net(norm=False), rank=0.4, scheme="channel"),
        SSA(horizon=1, grid=2, alpha=0.0),
        units="layer",
        optimizer=lambda p: torch.optim.AdamW(p, 1e-2),
        example=batches(1)[0][0],
        seed=seed,
    )


def data(rank: int, size: int, folder: Path) -> None:
    """Four steps, each process with its share of every batch, a cut of ranks, two more."""
    mine = side(seed=rank)  # the first process's feedback is the one that counts
    both = parallel.DataParallel(mine)
    for i, (x, y) in enumerate(batches(6)):
        if i == 4:
            sva.reduce_rank(mine.model, mine.optimizer, energy=0.6, min_rank=1)
        both.step(x.chunk(size)[rank], y.chunk(size)[rank])
    both.save(folder / "state.safetensors")
    torch.save(mine.model.state_dict(), folder / f"rank{rank}.pt")


def endless(rank: int, size: int, folder: Path) -> None:
    """Steps and checkpoints until something goes wrong."""
    both = parallel.DataParallel(side())
    for x, y in itertools.cycle(batches(6)):
        both.step(x, y)
        both.save(folder / "state.safetensors")


def dies(rank: int, size: int, folder: Path) -> None:
    """The first process ends after a step; the second says so."""
    stage = parallel.LayerParallel(learner("chain"), batches(1)[0])
    for i, (x, y) in enumerate(batches(5)):
        if rank == 0 and i == 2:
            os._exit(9)
        stage.step(x, y)


JOBS = {job.__name__: job for job in (layers, shapes, resumed, gradients, data, endless, dies)}
