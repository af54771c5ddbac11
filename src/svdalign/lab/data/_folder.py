"""Folders of images: ``train/CLASS/…`` and ``test/CLASS/…`` (or ``val``).

``datasets`` has an ``imagefolder`` of its own, but that takes the innermost folder for the class
and silently leaves out files that it does not know.
"""

from __future__ import annotations

import os
import warnings
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ._types import Indexed

_TEST = ("test", "val", "valid", "validation")
# What file managers, archivers and notebooks leave behind, beside names with a leading dot.
_LEFT_BEHIND = frozenset(
    {"$RECYCLE.BIN", "@eaDir", "Thumbs.db", "__MACOSX", "__pycache__", "desktop.ini"}
)
# Images that Pillow may lack a decoder for: not to be taken for some other kind of file.
_FOREIGN = frozenset({".avif", ".heic", ".heif", ".jxl", ".svg"})


@dataclass(frozen=True)
class _Files(Indexed):
    """Paths stored in one block of bytes, which worker processes share. A million strings would be
    copied into each of them."""

    paths: bytes
    ends: npt.NDArray[np.int64]

    def open(self, index: int) -> Image.Image:
        return Image.open(self.where(index))

    def where(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.paths[start : self.ends[index]])


def read(folder: Path) -> tuple[Indexed, Indexed, tuple[str, ...]]:
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


def _read_split(folder: Path) -> tuple[Indexed, tuple[str, ...]]:
    entries = _visible(folder)
    classes = tuple(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise ValueError(f"{folder} holds no folder: one folder a class is needed")
    others = [entry.path for entry in entries if not entry.is_dir()]
    for path in others:
        if _is_image(path):
            raise ValueError(f"{path} lies in no class: one folder a class is needed")
    paths, lengths, counts = bytearray(), array("q"), []
    for name in classes:
        before = len(lengths)
        for path in _files(folder / name):
            if _is_image(path):
                encoded = os.fsencode(path)
                paths += encoded
                lengths.append(len(encoded))
            else:
                others.append(path)
        counts.append(len(lengths) - before)
        if not counts[-1]:
            raise ValueError(f"{folder / name} holds no image file")
    if others:
        warnings.warn(
            f"left out of {folder}, being no images: {', '.join(others[:3])}"
            + f" and {len(others) - 3} more" * (len(others) > 3),
            stacklevel=2,
        )
    labels = np.repeat(np.arange(len(classes)), counts)
    return _Files(labels, "RGB", bytes(paths), np.cumsum(lengths)), classes


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
    """Whether the suffix is that of an image, or else Pillow can open the file."""
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
