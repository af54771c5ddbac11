from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svdalign.lab import data


@pytest.fixture(scope="session")
def fashion() -> tuple[Tensor, Tensor]:
    """Real images (160, 1, 16, 16), standardised and shuffled, and their classes (160,)."""
    split = data.load("embedded", train_limit=160, test_limit=10, image_size=16).train
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0))
    x = split.images[order].float()
    return (x - x.mean()) / x.std(), split.labels[order]
