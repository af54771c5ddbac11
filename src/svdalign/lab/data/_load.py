from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import _embedded, _folder, _hub
from ._pixels import decode
from ._types import ImageData, Source, Split


def available() -> list[str]:
    """Names that :func:`load` takes, sorted."""
    return sorted(["embedded", "folder", *_hub.NAMED])


def load(
    name: str = "embedded",
    *,
    data_dir: str | Path | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    image_size: int | None = None,
) -> ImageData:
    """Decode a data set into tensors on ``device``.

    Args:
        name: ``embedded`` (10,000 + 2,000 images of Fashion-MNIST, inside the package);
            ``fashion_mnist``, ``cifar10``, ``cifar100`` (from the Hugging Face hub, or from Parquet
            files in ``data_dir``); ``folder`` (``data_dir/train/CLASS/*.png``, and ``test`` or
            ``val`` likewise; read as RGB).
        data_dir: the folder with the Parquet files, or the one above it if it is called ``name``;
            for ``folder``, the one with ``train`` and ``test``.
        train_limit: use only so many training images, spread evenly over the classes.
        test_limit: likewise for the test images.
        device: where the tensors live.
        seed: of the choice that the limits make.
        image_size: bring the images to this height and width: the shorter side is resized to it
            (by area when shrinking), the rest cut off around the centre. Needed if sizes differ.

    Raises:
        ValueError: for an unknown name, a folder or file that is missing, empty or unreadable, a
            label outside the classes, a limit that cannot be met, or images of different sizes.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    train, test, classes = _read(name, data_dir)

    def split(which: str, source: Source, limit: int | None) -> Split:
        _check_labels(which, source, classes)
        chosen = _choose(source.labels, limit, f"{which}_limit", seed)
        images = torch.from_numpy(_decode(source, chosen, image_size))
        return Split(images.to(device), torch.from_numpy(source.labels[chosen]).to(device))

    train_split, test_split = split("train", train, train_limit), split("test", test, test_limit)
    sizes = [s.images.shape[2] for s in (train_split, test_split)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"training images are {sizes[0]} pixels wide, test images {sizes[1]}; "
            "give image_size to bring them to one size"
        )
    mean, std = _statistics(train_split.images)
    return ImageData(name, train_split, test_split, classes, mean, std)


def sizes(name: str, data_dir: str | Path | None = None) -> tuple[int, int]:
    """How many training and test images there are; none is decoded. Arguments and errors as in
    :func:`load`."""
    train, test, _ = _read(name, data_dir)
    return len(train.labels), len(test.labels)


def hold_out(data: ImageData, count: int, *, seed: int = 0) -> ImageData:
    """``data`` with ``count`` of its training images, spread evenly over the classes, in place of
    its test split, and the others left to train on: what settings are chosen by."""
    if not 1 <= count < len(data.train):
        raise ValueError(f"validation must be from 1 to {len(data.train) - 1}, got {count}")
    labels = data.train.labels.cpu().numpy()
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[torch.from_numpy(_choose(labels, count, "validation", seed))] = True
    held = held.to(data.train.labels.device)
    rest, out = (Split(data.train.images[m], data.train.labels[m]) for m in (~held, held))
    mean, std = _statistics(rest.images)
    return dataclasses.replace(data, train=rest, test=out, mean=mean, std=std)


def _read(name: str, data_dir: str | Path | None) -> tuple[Source, Source, tuple[str, ...]]:
    if name not in available():
        raise ValueError(f"unknown data set {name!r}; available: {', '.join(available())}")
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
    return _hub.read(name, folder)


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
    labels: npt.NDArray[np.int64], limit: int | None, argument: str, seed: int
) -> npt.NDArray[np.int64]:
    """Indices, in order, of ``limit`` samples with as equal a share of every class as there is."""
    if limit is None:
        return np.arange(len(labels))
    if not 1 <= limit <= len(labels):
        raise ValueError(f"{argument} must be from 1 to {len(labels)}, got {limit}")
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    # Deal the shuffled samples of every class out in rounds, one a class in each.
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        turn[members] = np.arange(len(members))
    return np.sort(shuffled[np.argsort(turn[shuffled], kind="stable")[:limit]])


def _decode(
    source: Source, chosen: npt.NDArray[np.int64], image_size: int | None
) -> npt.NDArray[np.uint8]:
    """Pixels of the chosen images, ``(N, C, H, W)``."""

    def pixels(index: int) -> npt.NDArray[np.uint8]:
        where = source.where(index)
        return decode(lambda: source.open(index), where, source.mode, image_size)

    first = pixels(chosen[0])
    decoded = np.empty((len(chosen), *first.shape), dtype=np.uint8)
    for row, index in enumerate(chosen):
        image = pixels(index)
        _, height, width = image.shape
        if image.shape != first.shape or height != width:
            other = f"{source.where(chosen[0])} is {first.shape[2]} x {first.shape[1]}"
            raise ValueError(
                f"{source.where(index)} is {width} x {height}{f', {other}' * (row > 0)}: images "
                "must be squares of one size; give image_size to bring them to it"
            )
        decoded[row] = image
    return decoded


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel, pixels from 0 to 1; a constant channel's deviation is 1."""
    means, stds = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten().int(), minlength=256).double().cpu()
        values = torch.linspace(0, 1, 256, dtype=torch.float64)
        mean = (counts @ values) / counts.sum()
        variance = (counts @ (values - mean) ** 2) / counts.sum()
        means.append(mean.item())
        stds.append(variance.sqrt().item() if variance > 0 else 1.0)
    return tuple(means), tuple(stds)
