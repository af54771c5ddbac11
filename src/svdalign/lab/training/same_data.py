"""Whether the data of a resumed run, which may have been moved, are those that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import ImageData, Images
from ..data._types import Epoch

_LOOKED_AT = 16  #: images of each split
_GREY_LEVELS = 2.0  #: allowed between decoders, in means over a 4 x 4 grid


def fingerprint(data: ImageData) -> dict[str, Any]:
    """What a checkpoint keeps to recognise the data by: ``classes``, ``shape`` of an image, and for
    each split the number of images, a hash of all ``labels``, and the first ``images``, shrunk to
    float32 (n, C, 4, 4)."""
    splits = {"train": data.train, "test": data.test}
    return {
        "classes": list(data.classes),
        "shape": list(data.train.shape),
        **{name: _fingerprint(split) for name, split in splits.items()},
    }


def _fingerprint(split: Images) -> dict[str, Any]:
    labels = split.labels.cpu().contiguous().numpy().tobytes()
    size = min(_LOOKED_AT, len(split))
    images = next((x for x, _ in split.fetch(Epoch(size, 0, 1))), torch.empty(0, 1, 1, 1))
    return {
        "count": len(split),
        "labels": hashlib.sha256(labels).hexdigest(),
        "images": F.adaptive_avg_pool2d(images.cpu().float(), 4),
    }


def check_same_data(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """ValueError unless two fingerprints agree: ``there``, in a checkpoint, and ``here``, of the
    data at hand."""
    for what in ("classes", "shape"):
        _check(what, there[what], here[what])
    for name in ("train", "test"):
        old, new = there[name], here[name]
        _check(f"number of {name} images", old["count"], new["count"])
        if old["labels"] != new["labels"]:
            raise ValueError(f"the labels of its {name} images differ from those here")
        if not _alike(old["images"], new["images"]):
            raise ValueError(f"its {name} images differ from those here")


def _check(what: str, old: Any, new: Any) -> None:
    if old != new:
        raise ValueError(f"its {what} was {old}, here it is {new}")


def _alike(old: Tensor, new: Tensor) -> bool:
    return old.shape == new.shape and bool(((old - new).abs() <= _GREY_LEVELS).all())
