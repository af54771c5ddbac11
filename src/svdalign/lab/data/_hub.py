"""Named data sets through Hugging Face ``datasets``: from the hub, or from local Parquet files."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from ._types import Source

# `datasets` takes about a second to import, so it is imported where it is used.


@dataclass(frozen=True)
class Named:
    """Where a data set is found on the hub, and what is in it."""

    repository: str
    num_classes: int
    mode: str
    image: str
    label: str


NAMED = {
    "fashion_mnist": Named("zalando-datasets/fashion_mnist", 10, "L", "image", "label"),
    "cifar10": Named("uoft-cs/cifar10", 10, "RGB", "img", "label"),
    "cifar100": Named("uoft-cs/cifar100", 100, "RGB", "img", "fine_label"),
}


@dataclass(frozen=True)
class _Table:
    """Encoded images and labels of one file, or of one split of the hub."""

    where: str
    blobs: list[bytes]
    labels: list[int]
    classes: tuple[str, ...]


def read(name: str, data_dir: Path | None) -> tuple[Source, Source, tuple[str, ...]]:
    """Training images, test images and class names of one of :data:`NAMED`.

    Args:
        name: key of :data:`NAMED`.
        data_dir: folder with ``train*.parquet`` and ``test*.parquet``, or the folder above it if
            it is called ``name``. None for the hub.

    Raises:
        ValueError: if a file is missing, cannot be read, or lacks a column, or if the class names
            are not those of the data set, or not the same everywhere.
    """
    named = NAMED[name]
    if data_dir is None:
        tables = {split: [_from_hub(named, split)] for split in ("train", "test")}
    else:
        folder = data_dir / name if (data_dir / name).is_dir() else data_dir
        tables = {split: _from_folder(named, folder, split) for split in ("train", "test")}
    first = tables["train"][0]
    for table in (*tables["train"], *tables["test"]):
        if table.classes != first.classes:
            raise ValueError(f"{first.where} and {table.where} name different classes")
    return _source(tables["train"], named.mode), _source(tables["test"], named.mode), first.classes


def _from_hub(named: Named, split: str) -> _Table:
    import datasets

    try:
        rows = datasets.load_dataset(named.repository, split=split)
    except Exception as error:  # the network's and its clients' own kinds are many
        raise ValueError(
            f"{named.repository} cannot be had from the hub ({error}); without a network, give "
            "data_dir, a folder with its Parquet files"
        ) from error
    return _table(named, rows, f"{named.repository} ({split})")


def _from_folder(named: Named, folder: Path, split: str) -> list[_Table]:
    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no file {split}*.parquet")
    return [_from_parquet(named, file) for file in files]


def _from_parquet(named: Named, file: Path) -> _Table:
    import datasets
    import pyarrow

    try:
        # Streamed, the table isn't copied to the cache; the lock files go with the folder.
        with TemporaryDirectory() as cache:
            rows = datasets.load_dataset(
                "parquet", data_files=[str(file)], split="train", streaming=True, cache_dir=cache
            )
            return _table(named, rows, str(file))
    except (OSError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {error}") from error


def _table(named: Named, rows: Any, where: str) -> _Table:
    """``rows`` is a ``datasets.Dataset`` or ``IterableDataset``."""
    import datasets

    for column in (named.image, named.label):
        if column not in rows.features:
            raise ValueError(
                f"{where} lacks the column {column!r}; it has {', '.join(rows.features)}"
            )
    feature = rows.features[named.label]
    classes = tuple(getattr(feature, "names", map(str, range(named.num_classes))))
    if len(classes) != named.num_classes:
        raise ValueError(f"{where} names {len(classes)} classes, not {named.num_classes}")
    encoded = rows.cast_column(named.image, datasets.Image(decode=False)).with_format("arrow")
    blobs: list[bytes] = []
    labels: list[int] = []
    for batch in encoded.iter(batch_size=1000):
        blobs += batch[named.image].combine_chunks().field("bytes").to_pylist()
        labels += batch[named.label].to_pylist()
    return _Table(where, blobs, labels, classes)


def _source(tables: list[_Table], mode: str) -> Source:
    blobs = [blob for table in tables for blob in table.blobs]
    rows = [(table.where, row) for table in tables for row in range(len(table.blobs))]

    def where(index: int) -> str:
        file, row = rows[index]
        return f"{file}, row {row}"

    return Source(
        labels=np.array([label for table in tables for label in table.labels], dtype=np.int64),
        open=lambda index: Image.open(io.BytesIO(blobs[index])),
        where=where,
        mode=mode,
    )
