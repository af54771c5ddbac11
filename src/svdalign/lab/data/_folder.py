"""Folders of images: ``train/CLASS/…`` and ``test/CLASS/…`` (or ``val``).

Not read by ``datasets``' own ``imagefolder``: that takes the innermost folder for the class, and
leaves out what it does not know without a word.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ._types import Source

_TEST = ("test", "val", "valid", "validation")
# What file managers, archivers and notebooks leave behind, beside names with a leading dot.
_LEFT_BEHIND = frozenset(
    {"$RECYCLE.BIN", "@eaDir", "Thumbs.db", "__MACOSX", "__pycache__", "desktop.ini"}
)
# Images that Pillow may lack a decoder for: not to be taken for some other kind of file.
_FOREIGN = frozenset({".avif", ".heic", ".heif", ".jxl", ".svg"})


@dataclass(frozen=True)
class _Files(Source):
    paths: list[str]

    def open(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])

    def where(self, index: int) -> str:
        return self.paths[index]


def read(folder: Path) -> tuple[Source, Source, tuple[str, ...]]:
    """Training and test images, and the classes: the folders' names, sorted.

    A class's images may lie at any depth of its folder. Links are followed. Names with a leading
    dot are left out.

    Raises:
        ValueError: if a split is missing, a class has no images, an image lies beside the classes,
            or the splits' classes differ.
    """
    train_folder, test_folder = _split_folder(folder, ("train",)), _split_folder(folder, _TEST)
    train, classes = _read_split(train_folder)
    test, test_classes = _read_split(test_folder)
    if classes != test_classes:
        raise ValueError(
            f"{train_folder} has {len(classes)} classes, {test_folder} has "
            f"{len(test_classes)}; only in one of them: "
            f"{', '.join(sorted(set(classes) ^ set(test_classes)))}"
        )
    return train, test, classes


def _split_folder(folder: Path, names: tuple[str, ...]) -> Path:
    """The folder of a split: the first of ``names`` that is there, in any case."""
    there = {e.name.lower(): Path(e.path) for e in os.scandir(folder) if e.is_dir()}
    for name in names:
        if name in there:
            return there[name]
    raise ValueError(
        f"{folder / names[0]} is missing: an image folder has the folders train and test (or val), "
        "with one folder a class in each"
    )


def _read_split(folder: Path) -> tuple[Source, tuple[str, ...]]:
    entries = _visible(folder)
    classes = tuple(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise ValueError(f"{folder} holds no folder: one folder a class is needed")
    others = [entry.path for entry in entries if not entry.is_dir()]
    for path in others:
        if _is_image(path):
            raise ValueError(f"{path} lies in no class: one folder a class is needed")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images: list[str] = []
        for path in _files(folder / name):
            (images if _is_image(path) else others).append(path)
        if not images:
            raise ValueError(f"{folder / name} holds no image file")
        paths += images
        labels += [label] * len(images)
    if others:
        warnings.warn(
            f"left out of {folder}, being no images: {', '.join(others[:3])}"
            + f" and {len(others) - 3} more" * (len(others) > 3),
            stacklevel=2,
        )
    return _Files(np.array(labels, dtype=np.int64), "RGB", paths), classes


def _visible(folder: Path | str) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted by name, without what is hidden."""
    with os.scandir(folder) as entries:
        kept = [e for e in entries if e.name[0] != "." and e.name not in _LEFT_BEHIND]
    return sorted(kept, key=lambda entry: entry.name)


def _files(folder: Path | str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Files at any depth of ``folder``. ``above``: the real paths of the folders on the way."""
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{folder} is a link to a folder that it lies in")
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _files(entry.path, (*above, real))
        else:
            yield entry.path


def _is_image(path: str) -> bool:
    """By its suffix; of any other file, whether Pillow knows it."""
    if os.path.splitext(path)[1].lower() in _suffixes():
        return True
    try:
        with Image.open(path):
            return True
    except OSError:
        return False


@cache
def _suffixes() -> frozenset[str]:
    known = Image.registered_extensions().items()
    return _FOREIGN.union(suffix for suffix, format in known if format in Image.OPEN)
