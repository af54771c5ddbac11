"""A loop of your own: accumulation, mixed precision, clipping, a schedule and averaged weights.

    python examples/your_own_loop.py

``learner.backward`` adds gradients, ``learner.update`` steps the optimizer and retracts the
factors. With a ``GradScaler`` (float16) its own calls take the place of ``update``:

    learner.backward(x, y, scale=scaler.scale)
    scaler.unscale_(learner.optimizer)
    scaler.step(learner.optimizer)
    scaler.update()
    learner.after_update()
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import svdalign as sva
from svdalign.lab import data, models

ACCUMULATE = 2


def main(images: int = 4000, epochs: int = 3, width: float = 0.5) -> list[float]:
    """Accuracy of the averaged weights on test images after every epoch."""
    torch.manual_seed(0)
    fashion = data.load("embedded", train_limit=images, test_limit=min(images, 1000))
    x, y = fashion.train.images.float() / 255, fashion.train.labels
    x_test, y_test = fashion.test.images.float() / 255, fashion.test.labels
    net = models.build("smallconv", num_classes=10, in_channels=1, image_size=28, width=width)
    model = sva.factorize(net, rank=0.5)

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """No weight decay for vectors: biases, norms, singular values."""
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim <= 1]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 1e-2}, {"params": vectors, "weight_decay": 0.0}],
            lr=5e-3,
        )

    learner = sva.Learner(model, optimizer=optimizer, example=x[:8])
    updates = epochs * (len(x) // (64 * ACCUMULATE))
    schedule = torch.optim.lr_scheduler.OneCycleLR(learner.optimizer, 5e-3, total_steps=updates)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    right = []
    for epoch in range(epochs):
        model.train()
        batches = torch.randperm(len(x)).split(64)
        for i in range(0, len(x) // (64 * ACCUMULATE) * ACCUMULATE, ACCUMULATE):
            learner.optimizer.zero_grad()
            for batch in batches[i : i + ACCUMULATE]:
                with torch.autocast("cpu", torch.bfloat16):
                    learner.backward(x[batch], y[batch], scale=lambda loss: loss / ACCUMULATE)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            learner.update()
            schedule.step()
            average.update_parameters(model)
        average.eval()
        with torch.no_grad():
            right.append((average(x_test).argmax(1) == y_test).float().mean().item())
        print(f"epoch {epoch + 1}: {right[-1]:.1%} right")
    return right


if __name__ == "__main__":
    main()
