"""Real targets: by how much has a garment been turned?

    python examples/regression.py

The loss is the mean squared error of one output. Rules that compare samples by class leave that
term out by themselves.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svdalign as sva
from svdalign.lab import data


def turned(split: data.Split, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) turned by up to 60 degrees, and the angles (N, 1) in [-1, 1]."""
    images = split.images.float() / 255
    angle = 2 * torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) - 1
    cos, sin, zero = (angle * math.pi / 3).cos(), (angle * math.pi / 3).sin(), 0 * angle
    turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False), angle[:, None]


def main(images: int = 3000, epochs: int = 6, width: int = 16) -> list[float]:
    """Mean error on test images after every epoch, in degrees."""
    torch.manual_seed(0)
    fashion = data.load("embedded", train_limit=images, test_limit=min(images, 1000))
    x, y = turned(fashion.train, 0)
    x_test, y_test = turned(fashion.test, 1)
    net = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * width * 49, 64), nn.ReLU(), nn.Linear(64, 1),
    )  # fmt: skip
    model = sva.factorize(net, rank=0.5)
    learner = sva.Learner(
        model,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 2e-3),
        example=x[:8],
        loss=F.mse_loss,
    )
    errors = []
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(x)).split(64):
            report = learner.step(x[batch], y[batch])
        model.eval()
        with torch.no_grad():
            errors.append(60 * (model(x_test) - y_test).abs().mean().item())
        print(f"epoch {epoch + 1}: loss {report.loss:.3f}, off by {errors[-1]:.1f} degrees")
    return errors


if __name__ == "__main__":
    main()
