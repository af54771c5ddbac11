"""Several labels a sample: which garments are in a picture of two, laid over each other.

    python examples/multi_label.py

The loss is binary cross-entropy, one logit a label; everything else is as in classification.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svdalign as sva
from svdalign.lab import data


def pairs(split: data.Split, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures of two garments (N, 1, 28, 28) and which are in them (N, 10), zeros and ones."""
    images, labels = split.images.float() / 255, F.one_hot(split.labels, 10).float()
    other = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return torch.maximum(images, images[other]), torch.maximum(labels, labels[other])


def main(images: int = 3000, epochs: int = 4, width: int = 16) -> list[float]:
    """Share of right yes-or-no answers on test pictures after every epoch."""
    torch.manual_seed(0)
    fashion = data.load("embedded", train_limit=images, test_limit=min(images, 1000))
    x, y = pairs(fashion.train, 0)
    x_test, y_test = pairs(fashion.test, 1)
    net = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * width * 49, 10),
    )  # fmt: skip
    model = sva.factorize(net, rank=0.5)
    learner = sva.Learner(
        model,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 2e-3),
        example=x[:8],
        loss=F.binary_cross_entropy_with_logits,
    )
    right = []
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(x)).split(64):
            report = learner.step(x[batch], y[batch])
        model.eval()
        with torch.no_grad():
            right.append(((model(x_test) > 0) == (y_test > 0)).float().mean().item())
        print(f"epoch {epoch + 1}: loss {report.loss:.3f}, {right[-1]:.1%} of answers right")
    return right


if __name__ == "__main__":
    main()
