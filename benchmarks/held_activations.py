"""Activation memory of a training step as a network gets deeper: BP against local learning.

    python benchmarks/held_activations.py [--out benchmarks/results/held_activations.json]

A chain of equal units (3 x 3 convolution, batch norm, ReLU; 32 channels at 16 x 16, batch 64), from
4 to 32 of them, takes an SGD step by BP and by SSA at horizons 0, 1 and 2. Counted are the bytes of
all tensors alive at the step's peak that are no parameter, gradient or optimizer state: activations
saved for the backward pass, the batch, and temporaries (see ``svdalign.lab.costs.step_memory``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import svdalign as sva
from svdalign.lab.costs import step_memory
from svdalign.lab.training.provenance import provenance
from svdalign.lab.training.record import write_json

DEPTHS = (4, 8, 16, 32)
METHODS: dict[str, tuple[str, int | None]] = {
    "BP": ("bp", None),
    "SSA, horizon 2": ("ssa", 2),
    "SSA, horizon 1": ("ssa", 1),
    "SSA, horizon 0": ("ssa", 0),
}
CHANNELS, SIZE, BATCH, CLASSES, RANK = 32, 16, 64, 10, 24


def network(depth: int) -> nn.Module:
    torch.manual_seed(0)
    units = [
        nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS),
            nn.ReLU(),
        )
        for _ in range(depth)
    ]
    net = nn.Sequential(*units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES))
    return sva.factorize(net, RANK, "spatial")


def measure(rule: str, horizon: int | None, depth: int) -> int:
    """Peak bytes of one step, less parameters, gradients and optimizer state."""
    model = network(depth)
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    y = torch.arange(BATCH) % CLASSES
    learner = sva.Learner(
        model,
        rule,
        units="layer",
        horizon=horizon,
        optimizer=lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
        example=x,
    )
    learner.step(x, y)  # the optimizer's state exists from here on
    modules = [model, learner.feedback]
    return step_memory(lambda: learner.step(x, y), modules, learner.optimizer, (x, y)).activations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "held_activations.json"
    parser.add_argument("--out", type=Path, default=default, help="where the JSON goes")
    out = parser.parse_args().out
    rows = {
        name: {str(depth): measure(rule, horizon, depth) for depth in DEPTHS}
        for name, (rule, horizon) in METHODS.items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "what": "peak bytes of a training step less parameters, gradients and optimizer state",
        "network": f"3x3 convolutions, {CHANNELS} channels at {SIZE}x{SIZE}, rank {RANK}",
        "batch": BATCH,
        "seed": 0,
        "bytes": rows,
        **provenance("cpu"),
    }
    write_json(out, result)
    print("MiB at depth  ", *(f"{depth:7}" for depth in DEPTHS))
    for name, row in rows.items():
        print(f"{name:14}", *(f"{held / 2**20:7.1f}" for held in row.values()))


if __name__ == "__main__":
    main()
