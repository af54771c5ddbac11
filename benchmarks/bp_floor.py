"""What the engine adds to backpropagation: a step of ``rule="bp"`` against a hand-written loop.

    python benchmarks/bp_floor.py [--out benchmarks/results/bp_floor.json]

Both train the same dense network with AdamW on the same batch, in turns; the ratio is the median
over the rounds of one step's time over the other's of the same round. The mark is 1.05.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svdalign as sva
from svdalign.lab import models
from svdalign.lab.costs import alternate
from svdalign.lab.training.build import prepare_machine
from svdalign.lab.training.config import JobConfig
from svdalign.lab.training.provenance import provenance
from svdalign.lab.training.record import write_json

BATCH, CLASSES, MARK = 128, 10, 1.05


def network(name: str, size: int, width: float) -> nn.Module:
    torch.manual_seed(0)
    net = models.build(name, num_classes=CLASSES, image_size=size, width=width)
    return net.to(memory_format=torch.channels_last)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-3)


def hand_written(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = adamw(list(net.parameters()))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def by_learner(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    learner = sva.Learner(net, "bp", optimizer=adamw, example=x[:2])

    def step() -> None:
        learner.step(x, y)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bp_floor.json"))
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    prepare_machine(JobConfig(threads=options.threads))
    rows = []
    for name, size, width in (("mlp", 16, 1.0), ("smallconv", 28, 1.0), ("resnet20", 16, 0.5)):
        x, y = torch.randn(BATCH, 3, size, size), torch.arange(BATCH) % CLASSES
        x = x.contiguous(memory_format=torch.channels_last)
        work = {
            "hand-written": hand_written(network(name, size, width), x, y),
            "learner": by_learner(network(name, size, width), x, y),
        }
        times = alternate(work, rounds=options.rounds, warmup=5)
        ratio = times["learner"].ratio(times["hand-written"])
        rows.append(
            {
                "model": name,
                "width": width,
                "image_size": size,
                "batch_size": BATCH,
                "hand_written_seconds": times["hand-written"].median,
                "learner_seconds": times["learner"].median,
                "ratio": ratio,
            }
        )
        print(f"{name:10} {ratio:.3f}  ({1e3 * times['hand-written'].median:.1f} ms)", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, {"mark": MARK, "rows": rows, **provenance("cpu")})


if __name__ == "__main__":
    main()
