"""Folders of images: ``train/CLASS/*.png`` and ``test/CLASS/*.png`` (or ``val``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ._types import Source

_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def read(folder: Path) -> tuple[Source, Source, tuple[str, ...]]:
    """Training and test images, and the classes: the directories' names, sorted.

    Raises:
        ValueError: if a split is missing, a class has no images, or the splits' classes differ.
    """
    test_folder = folder / "test" if (folder / "test").is_dir() else folder / "val"
    train, classes = _read_split(folder / "train")
    test, test_classes = _read_split(test_folder)
    if classes != test_classes:
        raise ValueError(
            f"{folder / 'train'} has {len(classes)} classes, {test_folder} has "
            f"{len(test_classes)}; only in one of them: "
            f"{', '.join(sorted(set(classes) ^ set(test_classes)))}"
        )
    return train, test, classes


def _read_split(folder: Path) -> tuple[Source, tuple[str, ...]]:
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is missing: an image folder has the directories train and test (or val), "
            "with one directory a class in each"
        )
    classes = tuple(sorted(d.name for d in folder.iterdir() if d.is_dir()))
    if not classes:
        raise ValueError(f"{folder} holds no directory: one directory a class is needed")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in _SUFFIXES)
        if not images:
            raise ValueError(
                f"{folder / name} holds no image file ({', '.join(sorted(_SUFFIXES))})"
            )
        paths += images
        labels += [label] * len(images)
    source = Source(
        labels=np.array(labels, dtype=np.int64),
        open=lambda index: Image.open(paths[index]),
        where=lambda index: str(paths[index]),
        mode="RGB",
    )
    return source, classes
