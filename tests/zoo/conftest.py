from __future__ import annotations

import importlib
from collections.abc import Iterator

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


@pytest.fixture(scope="session")
def torchvision_operators() -> Iterator[None]:
    """timm, Lightning and transformers' Trainer need torchvision to import, and torchvision the
    operators of a compiled library, which may not load beside a CPU torch. None of them calls
    these here: to declare them is enough."""
    try:
        importlib.import_module("torchvision")
        yield
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    missing = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        missing.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield
