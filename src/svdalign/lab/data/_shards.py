"""Images in files that are read from front to back, through Hugging Face ``datasets``: Parquet
files or tar files in WebDataset's layout, local or on the hub."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from ._types import Source

# `datasets` takes about a second to import, so it is imported where it is used.

SUFFIXES = {"parquet": "parquet", "webdataset": "tar"}

_TEST = ("test", "val", "valid", "validation")
_AT_ONCE = 16  # images read from a file
_BUFFER = 1 << 16  # bytes of it read ahead
_IMAGE = ("image", "img", "jpg", "jpeg", "png", "webp", "JPEG")
_LABEL = ("label", "labels", "fine_label", "cls", "class")


@dataclass(frozen=True)
class Shards(Source):
    """One split.

    Attributes:
        kind: of the files, as ``datasets`` calls it: a key of :data:`SUFFIXES`.
        files: paths or addresses.
        starts: ``(number of files + 1,)``: each file's first sample among all, and their number.
        image: the column of the images.
    """

    kind: str
    files: tuple[str, ...]
    starts: npt.NDArray[np.int64]
    image: str

    def where(self, index: int) -> str:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f"{self.files[shard]}, row {index - self.starts[shard]}"

    def rows(self, shard: int, start: int = 0) -> Iterator[bytes | None]:
        """The encoded images of one file, from row ``start`` on."""
        if self.kind == "parquet":
            yield from _parquet_rows(self.files[shard], self.image, start)
            return
        alone = self._all.shard(len(self.files), shard).skip(start)
        # In batches: one by one, `datasets` would share them out among torch's worker processes.
        for batch in alone.iter(_AT_ONCE):
            for image in batch[self.image]:
                yield None if image is None else image["bytes"]

    @cached_property
    def _all(self) -> Any:
        import datasets

        rows = _open(self.kind, self.files)
        return rows.select_columns([self.image]).cast_column(
            self.image, datasets.Image(decode=False)
        )


def read(name: str, data_dir: Path | None) -> tuple[Shards, Shards, tuple[str, ...]]:
    """Training and test images, and the classes' names.

    Args:
        name: ``parquet`` or ``webdataset``, files in ``data_dir``; or ``OWNER/NAME`` on the hub.

    Raises:
        ValueError: if a split is missing or has no labels, or a file cannot be read.
    """
    if "/" in name:
        if data_dir is not None:
            raise ValueError(f"data set {name!r} comes from the hub and takes no data_dir")
        kind, splits = _on_hub(name)
    else:
        if data_dir is None:
            raise ValueError(f"data set {name!r} needs data_dir, the folder of its files")
        kind, splits = name, _in_folder(data_dir, name)
    train, classes = _index(kind, splits["train"])
    # Some data sets keep the labels of their test images to themselves.
    for split in _TEST:
        if split in splits:
            test, test_classes = _index(kind, splits[split])
            if (test.labels >= 0).all():
                break
    else:
        raise ValueError(f"{name} has no split of test images with labels, of {', '.join(_TEST)}")
    if len(test_classes) > len(classes):
        classes = test_classes
    return train, test, classes


def _in_folder(folder: Path, kind: str) -> dict[str, tuple[str, ...]]:
    found = {}
    for split in ("train", *_TEST):
        if files := find(folder, split, SUFFIXES[kind]):
            found[split] = tuple(map(str, files))
    if "train" not in found:
        raise missing(folder, "train", SUFFIXES[kind])
    return found


def missing(folder: Path, split: str, suffix: str) -> ValueError:
    return ValueError(f"{folder} holds no file {split}.{suffix} or {split}-*.{suffix}")


def find(folder: Path, split: str, suffix: str) -> list[Path]:
    """The files of a split, in order.

    They are ``SPLIT.SUFFIX``, or ``SPLIT-0.SUFFIX`` and so on, in ``folder`` or its ``data``; or
    all that the folder ``SPLIT`` holds.

    Raises:
        ValueError: if some are missing, or there are several sets of them.
    """
    numbered = re.compile(rf"{split}([-_.]?\d.*)?\.{suffix}", re.IGNORECASE)
    visible = re.compile(rf"[^.].*\.{suffix}", re.IGNORECASE)
    for place, name in ((folder, numbered), (folder / "data", numbered), (folder / split, visible)):
        files = sorted(f for f in place.glob("*") if name.fullmatch(f.name))
        if files:
            _check_complete(files)
            return files
    return []


def _check_complete(files: list[Path]) -> None:
    """Refuse an incomplete set of files, and two sets of the same images."""
    numbers = [re.search(r"(\d+)-of-(\d+)", file.stem) for file in files]
    found = {(int(n[1]), int(n[2])) for n in numbers if n}
    whole = not found or found == {(i, len(files)) for i in range(len(files))}
    alone = len(files) == 1 or all(re.search(r"\d", file.stem) for file in files)
    if not (whole and alone):
        raise ValueError(
            f"{files[0].parent} does not hold one whole set of files, but "
            f"{', '.join(file.name for file in files)}"
        )


def _on_hub(name: str) -> tuple[str, dict[str, tuple[str, ...]]]:
    import datasets

    from ._hub import check_reachable, unreachable

    check_reachable(name)
    try:
        builder = datasets.load_dataset_builder(name)
    except Exception as error:  # clients of the network raise errors of many types
        raise unreachable(name, error) from error
    kind = type(builder).__name__.lower()
    if kind not in SUFFIXES:
        raise ValueError(f"{name} holds {kind} files; {' and '.join(SUFFIXES)} files are read")
    splits = {str(split): tuple(files) for split, files in builder.config.data_files.items()}
    if "train" not in splits:
        raise ValueError(f"{name} has no split 'train'; it has {', '.join(splits)}")
    return kind, splits


def _open(kind: str, files: tuple[str, ...]) -> Any:
    """A ``datasets.IterableDataset`` of the files. Nothing is copied or left behind."""
    import datasets
    import pyarrow

    try:
        with TemporaryDirectory() as cache:  # for lock files
            return datasets.load_dataset(
                kind,
                data_files=list(files),
                split="train",
                streaming=True,
                cache_dir=cache,
            )
    except (OSError, ValueError, pyarrow.ArrowException, tarfile.TarError) as error:
        raise ValueError(f"{files[0]} cannot be read as {kind}: {error}") from error


def _index(kind: str, files: tuple[str, ...]) -> tuple[Shards, tuple[str, ...]]:
    """The split of these files, and its classes; no image is read."""
    features = _open(kind, files).features
    image, label = _column(files[0], features, _IMAGE), _column(files[0], features, _LABEL)
    read_labels = _parquet_labels if kind == "parquet" else _tar_labels
    per_file = [whole_numbers(read_labels(file, label), file, label) for file in files]
    kept = [(file, labels) for file, labels in zip(files, per_file, strict=True) if len(labels)]
    if not kept:
        raise ValueError(f"{files[0]} holds no images")
    labels = np.concatenate([labels for _, labels in kept])
    starts = np.cumsum([0, *(len(labels) for _, labels in kept)])
    names = getattr(features[label], "names", None) or map(str, range(int(labels.max()) + 1))
    return Shards(labels, "RGB", kind, tuple(f for f, _ in kept), starts, image), tuple(names)


def _column(where: str, features: Any, names: tuple[str, ...]) -> str:
    for name in names:
        if name in features:
            return name
    raise ValueError(
        f"{where} has none of the columns {', '.join(names)}; it has {', '.join(features)}"
    )


def _parquet_rows(file: str, column: str, start: int) -> Iterator[bytes | None]:
    """The images of a Parquet file from row ``start`` on. Only a few pages are in memory at a time,
    however large a row group is; ``datasets`` would load several row groups for each reader."""
    import fsspec
    import pyarrow.parquet

    with (
        fsspec.open(file, "rb") as stream,
        pyarrow.parquet.ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False) as parquet,
    ):
        groups, skipped = 0, 0  # whole row groups before the first row
        while groups < parquet.num_row_groups:
            rows = parquet.metadata.row_group(groups).num_rows
            if skipped + rows > start:
                break
            groups, skipped = groups + 1, skipped + rows
        rest = range(groups, parquet.num_row_groups)
        for batch in parquet.iter_batches(_AT_ONCE, row_groups=rest, columns=[column]):
            for image in batch.column(0)[max(0, start - skipped) :].to_pylist():
                yield image["bytes"] if isinstance(image, dict) else image
            skipped += batch.num_rows


def _parquet_labels(file: str, column: str) -> list[Any]:
    import fsspec
    import pyarrow.parquet

    try:
        with fsspec.open(file, "rb") as stream, pyarrow.parquet.ParquetFile(stream) as parquet:
            labels: list[Any] = parquet.read([column])[column].to_pylist()
            return labels
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from error


def _tar_labels(file: str, column: str) -> list[Any]:
    """The labels of a tar file's samples, which are runs of files that share a name."""
    import fsspec

    labels: list[Any] = []
    sample = None
    try:
        with fsspec.open(file, "rb") as stream, tarfile.open(fileobj=stream) as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not (member.isreg() and stem and dot) or name.startswith("__"):
                    continue
                if (folder, stem) != sample:
                    sample = folder, stem
                    labels.append(None)
                if suffix == column:
                    content = tar.extractfile(member)
                    labels[-1] = int(content.read()) if content else None
    except (OSError, ValueError, tarfile.TarError) as error:
        raise ValueError(f"{file} cannot be read as webdataset: {error}") from error
    return labels


def whole_numbers(labels: list[Any], where: str, column: str) -> npt.NDArray[np.int64]:
    """``labels`` as int64. A float is accepted if it is whole; ValueError for anything else."""
    for row, label in enumerate(labels):
        number = isinstance(label, int | float) and not isinstance(label, bool)
        if not (number and -(2**63) <= label < 2**63 and label == label // 1):
            raise ValueError(
                f"{where}, row {row}: {column} must be a whole number, the class, got {label!r}"
            )
    return np.array(labels, dtype=np.int64)
