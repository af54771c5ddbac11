"""Named data sets through Hugging Face ``datasets``: from the hub, or from local Parquet files."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ._shards import find, missing, whole_numbers
from ._types import Indexed

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

_PROBE_SECONDS = 5


@dataclass(frozen=True)
class _Table:
    """Encoded images and labels of one file, or of one split of the hub."""

    where: str
    blobs: list[bytes | None]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Rows(Indexed):
    tables: list[_Table]
    starts: npt.NDArray[np.int64]  # index of each table's first row

    def open(self, index: int) -> Image.Image:
        table, row = self._find(index)
        blob = table.blobs[row]
        if blob is None:
            raise ValueError("the row holds no image")
        return Image.open(io.BytesIO(blob))

    def where(self, index: int) -> str:
        table, row = self._find(index)
        return f"{table.where}, row {row}"

    def _find(self, index: int) -> tuple[_Table, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.tables[number], index - int(self.starts[number])


def read(name: str, data_dir: Path | None) -> tuple[Indexed, Indexed, tuple[str, ...]]:
    """Training images, test images and class names of one of :data:`NAMED`.

    Args:
        name: key of :data:`NAMED`.
        data_dir: folder of Parquet files (see :func:`._shards.find`), or the folder above it if it
            is called ``name``. None for the hub.

    Raises:
        ValueError: if a file is missing, cannot be read, lacks a column, or has labels that are no
            whole numbers; if the class names are not those of the data set, or not the same
            everywhere.
    """
    named = NAMED[name]
    if data_dir is None:
        check_reachable(named.repository)
        tables = {split: [_from_hub(named, split)] for split in ("train", "test")}
    else:
        folder = data_dir / name if (data_dir / name).is_dir() else data_dir
        tables = {split: _from_folder(named, folder, split) for split in ("train", "test")}
    first = tables["train"][0]
    for table in (*tables["train"], *tables["test"]):
        if table.classes != first.classes:
            raise ValueError(f"{first.where} and {table.where} name different classes")
    return _source(tables["train"], named.mode), _source(tables["test"], named.mode), first.classes


def check_reachable(repository: str) -> None:
    """Ask the hub for ``repository`` once: ``datasets`` would ask for half a minute."""
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        return  # then `datasets` turns to its cache at once
    try:
        huggingface_hub.HfApi().dataset_info(repository, timeout=_PROBE_SECONDS)
    except Exception as error:  # clients of the network raise errors of many types
        raise unreachable(repository, error) from error


def _from_hub(named: Named, split: str) -> _Table:
    import datasets

    try:
        rows = datasets.load_dataset(named.repository, split=split)
    except Exception as error:  # likewise
        raise unreachable(named.repository, error) from error
    return _table(named, rows, f"{named.repository} ({split})")


def unreachable(repository: str, error: Exception) -> ValueError:
    return ValueError(
        f"{repository} cannot be loaded from the hub ({error}); without a network, give "
        "data_dir, a folder with its Parquet files, or set HF_HUB_OFFLINE=1 if it is "
        "in the hub's cache"
    )


def _from_folder(named: Named, folder: Path, split: str) -> list[_Table]:
    files = find(folder, split, "parquet")
    if not files:
        raise missing(folder, split, "parquet")
    return [_from_parquet(named, file) for file in files]


def _from_parquet(named: Named, file: Path) -> _Table:
    import datasets
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            rows = datasets.Dataset(parquet.read())
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {error}") from error
    return _table(named, rows, str(file))


def _table(named: Named, rows: Any, where: str) -> _Table:
    """``rows`` is a ``datasets.Dataset``."""
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
    try:
        encoded = rows.cast_column(named.image, datasets.Image(decode=False)).with_format("arrow")
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{where}: column {named.image!r} holds no images ({error})") from error
    blobs: list[bytes | None] = []
    labels: list[Any] = []
    for batch in encoded.iter(batch_size=1000):
        blobs += batch[named.image].combine_chunks().field("bytes").to_pylist()
        labels += batch[named.label].to_pylist()
    return _Table(where, blobs, whole_numbers(labels, where, named.label), classes)


def _source(tables: list[_Table], mode: str) -> Indexed:
    counts = [len(table.blobs) for table in tables]
    return _Rows(
        np.concatenate([table.labels for table in tables]),
        mode,
        tables,
        np.cumsum([0, *counts[:-1]]),
    )
