"""Data sets by name: in memory, or streamed."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import _embedded, _folder, _hub, _shards
from ._pixels import decode
from ._shards import Shards
from ._stream import Stream, Unreadable, histogram, subset
from ._types import ImageData, Indexed, Source, Split

_IN_MEMORY = 4 << 30  # bytes of pixels; an image folder with more is streamed
_INSPECTED = 1000  # images of each split that are decoded before a stream is used
_MOST_WORKERS = 8


def available() -> list[str]:
    """Names that :func:`load` takes, sorted, beside ``OWNER/NAME`` of any image data set on the
    Hugging Face hub."""
    return sorted(["embedded", "folder", *_shards.SUFFIXES, *_hub.NAMED])


def load(
    name: str = "embedded",
    *,
    data_dir: str | Path | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    image_size: int | None = None,
    stream: bool | None = None,
    workers: int | None = None,
    max_unreadable: float = 0.01,
) -> ImageData:
    """A data set on ``device``: decoded once into memory, or streamed, that is, decoded anew in
    every epoch.

    Args:
        name: ``embedded`` (10,000 + 2,000 images of Fashion-MNIST, inside the package);
            ``fashion_mnist``, ``cifar10``, ``cifar100`` (from the Hugging Face hub, or from Parquet
            files in ``data_dir``); ``folder`` (``data_dir/train/CLASS/…``, and ``test`` or ``val``
            likewise; read as RGB); ``parquet`` or ``webdataset`` (files of that kind in
            ``data_dir``) or ``OWNER/NAME`` (of the hub), which are always streamed.
        data_dir: the folder with the files, ``train-*.parquet`` or so and ``test-*`` or ``val-*``,
            or, of the data sets with a name, the one above it if it is called ``name``; for
            ``folder``, the one with ``train`` and ``test``.
        train_limit: use only so many training images, spread evenly over the classes.
        test_limit: likewise for the test images.
        device: where the batches are.
        seed: of the random choice of images under a limit.
        image_size: bring the images to this height and width: the shorter side is resized to it
            (by area when shrinking), the rest cut off around the centre. Needed if sizes differ,
            and for streams.
        stream: whether to leave the images where they are and have them decoded by worker processes
            when they are needed. None: if their pixels would take more than 4 GiB.
        workers: processes that decode a stream; 0: this one does. None: one a CPU core, at most 8.
        max_unreadable: share of a stream's images that may be unreadable and are left out. A
            thousand of each split are decoded beforehand.

    Raises:
        ValueError: for an unknown name, a folder or file that is missing, empty or unreadable, a
            label outside the classes, a limit that cannot be met, or images of different sizes.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if workers is not None and workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")
    if not 0 <= max_unreadable <= 1:
        raise ValueError(f"max_unreadable must be from 0 to 1, got {max_unreadable}")
    train, test, classes = _read(name, data_dir)
    whole = len(train.labels), len(test.labels)
    sources = [
        _limited(train, train_limit, "train_limit", seed),
        _limited(test, test_limit, "test_limit", seed),
    ]
    for which, source in zip(("train", "test"), sources, strict=True):
        _check_labels(which, source, classes)
    if stream is None:
        pixels = sum(len(s.labels) * len(s.mode) for s in sources) * (image_size or 0) ** 2
        stream = isinstance(train, Shards) or pixels > _IN_MEMORY
    if stream:
        data = _streamed(name, sources, classes, image_size, device, workers, max_unreadable)
        return dataclasses.replace(data, whole=whole)
    train_split, test_split = (_decoded(name, s, image_size, device) for s in sources)
    if train_split.shape != test_split.shape:
        raise ValueError(
            f"training images are {train_split.shape[2]} pixels wide, test images "
            f"{test_split.shape[2]}; give image_size to bring them to one size"
        )
    mean, std = _statistics(histogram(train_split.images))
    return ImageData(name, train_split, test_split, classes, mean, std, whole)


def sizes(name: str, data_dir: str | Path | None = None) -> tuple[int, int]:
    """How many training and test images there are; none is decoded. Arguments and errors as in
    :func:`load`."""
    train, test, _ = _read(name, data_dir)
    return len(train.labels), len(test.labels)


def hold_out(data: ImageData, count: int) -> ImageData:
    """``data`` for choosing settings without the test images: ``count`` training images, spread
    evenly over the classes, take the place of its test split, the others are left to train on."""
    if not 1 <= count < len(data.train):
        raise ValueError(f"validation must be from 1 to {len(data.train) - 1}, got {count}")
    labels = data.train.labels.cpu().numpy()
    held = _choose(labels, count, "validation", seed=0)
    train = data.train.take(np.setdiff1d(np.arange(len(labels)), held))
    whole = data.whole[0] if data.whole else len(labels)
    data = dataclasses.replace(data, train=train, test=data.train.take(held), whole=(whole, whole))
    if isinstance(train, Split):
        mean, std = _statistics(histogram(train.images))
        data = dataclasses.replace(data, mean=mean, std=std)
    return data


def _read(
    name: str, data_dir: str | Path | None
) -> tuple[Indexed | Shards, Indexed | Shards, tuple[str, ...]]:
    if name not in available() and "/" not in name:
        raise ValueError(
            f"unknown data set {name!r}; available: {', '.join(available())}, OWNER/NAME of the hub"
        )
    folder = None if data_dir is None else Path(data_dir)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"data_dir is not a folder: {folder}")
    if name == "embedded":
        if folder is not None:
            raise ValueError(
                f"data set 'embedded' is inside the package and takes no data_dir, got {folder}"
            )
        return _embedded.read("train"), _embedded.read("test"), _embedded.CLASSES
    if name == "folder":
        if folder is None:
            raise ValueError("data set 'folder' needs data_dir, the folder with train and test")
        return _folder.read(folder)
    if name in _hub.NAMED:
        return _hub.read(name, folder)
    return _shards.read(name, folder)


def _limited(
    source: Indexed | Shards, limit: int | None, argument: str, seed: int
) -> Indexed | Shards:
    if limit is None:
        return source
    if not isinstance(source, Indexed):
        raise ValueError(f"{argument} is for data that can be read in any order, not for streams")
    return subset(source, _choose(source.labels, limit, argument, seed))


def _streamed(
    name: str,
    sources: list[Indexed | Shards],
    classes: tuple[str, ...],
    image_size: int | None,
    device: str | torch.device,
    workers: int | None,
    max_unreadable: float,
) -> ImageData:
    if image_size is None:
        raise ValueError("image_size is needed for images that are streamed")
    if workers is None:
        workers = min(_MOST_WORKERS, _cores())
    train, test = (
        Stream(
            source,
            torch.from_numpy(source.labels).to(device),
            image_size,
            workers,
            Unreadable(max_unreadable),
        )
        for source in sources
    )
    test.inspect(_INSPECTED)
    return ImageData(name, train, test, classes, *_statistics(train.inspect(_INSPECTED)))


def _cores() -> int:
    """How many CPU cores this process may use; those of the machine where that is not known."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _decoded(
    name: str, source: Indexed | Shards, image_size: int | None, device: str | torch.device
) -> Split:
    if not isinstance(source, Indexed):
        raise ValueError(f"data set {name!r} is read from front to back: stream cannot be false")
    images = torch.from_numpy(_decode(source, image_size))
    return Split(images.to(device), torch.from_numpy(source.labels).to(device))


def _check_labels(split: str, source: Source, classes: tuple[str, ...]) -> None:
    if not len(source.labels):
        raise ValueError(f"the {split} split holds no images")
    outside = np.flatnonzero((source.labels < 0) | (source.labels >= len(classes)))
    if len(outside):
        raise ValueError(
            f"{source.where(outside[0])}: label {source.labels[outside[0]]} is outside the "
            f"{len(classes)} classes (0 to {len(classes) - 1})"
        )


def _choose(
    labels: npt.NDArray[np.int64], limit: int, argument: str, seed: int
) -> npt.NDArray[np.int64]:
    """Indices, in order, of ``limit`` samples, divided among the classes as equally as possible."""
    if not 1 <= limit <= len(labels):
        raise ValueError(f"{argument} must be from 1 to {len(labels)}, got {limit}")
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    # Deal the shuffled samples of every class out in rounds, one a class in each.
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        turn[members] = np.arange(len(members))
    return np.sort(shuffled[np.argsort(turn[shuffled], kind="stable")[:limit]])


def _decode(source: Indexed, image_size: int | None) -> npt.NDArray[np.uint8]:
    """Pixels of the images, ``(N, C, H, W)``."""

    def pixels(index: int) -> npt.NDArray[np.uint8]:
        where = source.where(index)
        return decode(lambda: source.open(index), where, source.mode, image_size)

    first = pixels(0)
    decoded = np.empty((len(source.labels), *first.shape), dtype=np.uint8)
    for index in range(len(decoded)):
        image = pixels(index)
        _, height, width = image.shape
        if image.shape != first.shape or height != width:
            other = f"{source.where(0)} is {first.shape[2]} x {first.shape[1]}"
            raise ValueError(
                f"{source.where(index)} is {width} x {height}{f', {other}' * (index > 0)}: images "
                "must be squares of one size; give image_size to bring them to it"
            )
        decoded[index] = image
    return decoded


def _statistics(histogram: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel, pixels from 0 to 1; a constant channel's deviation is 1."""
    values = torch.linspace(0, 1, 256, dtype=torch.float64)
    means, stds = [], []
    for counts in histogram.double().cpu():
        mean = (counts @ values) / counts.sum()
        variance = (counts @ (values - mean) ** 2) / counts.sum()
        means.append(mean.item())
        stds.append(variance.sqrt().item() if variance > 0 else 1.0)
    return tuple(means), tuple(stds)
