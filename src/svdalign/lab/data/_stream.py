"""Images that stay on disk: worker processes decode and crop them when they are needed."""

from __future__ import annotations

import atexit
import io
import itertools
import math
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ._pixels import Box, UnreadableImageError, centre, decode
from ._shards import Shards
from ._types import Epoch, Images, Indexed, generator

_SEEN = 0.875  # side of the square in the middle, as a share of the shorter side: 224 of 256
_AREA, _LOG_RATIO = (0.08, 1.0), math.log(4 / 3)  # of a random window
_TRIES = 10

# Shards are read by this many groups of readers in turn, one batch each. Worker processes share the
# groups out among them, so the order of the samples does not depend on their number.
_GROUPS = 8
_READERS = 4  # of a group; each reads a part of the epoch of its own
_RUN = 64  # samples that a reader takes at once; a group's runs are permuted among themselves

_Decoded = tuple[npt.NDArray[np.uint8], int] | str  # pixels and their number, or an error
_Batch = tuple[Tensor, Tensor, list[str]]


@dataclass
class Unreadable:
    """The images that could not be decoded, each listed once, and how many may be.

    Attributes:
        share: of the images of a split.
        found: why not, by image.
    """

    share: float
    found: dict[str, None] = field(default_factory=dict)

    def add(self, reasons: Iterable[str], total: int) -> None:
        """Add images that could not be decoded; ValueError if they are more than the share of
        ``total``."""
        self.found |= dict.fromkeys(reasons)
        if len(self.found) > self.share * total:
            first = "; ".join(list(self.found)[:3])
            raise ValueError(
                f"{len(self.found)} of {total} images cannot be read, more than max_unreadable, "
                f"{self.share:g} of them: {first}"
            )


@dataclass(frozen=True)
class Stream(Images):
    """A split that is decoded anew in every epoch.

    ``augment.crop`` takes a window of random area, 8 % to all of the image, and random proportions,
    3:4 to 4:3, whatever its number (Szegedy et al. 2015). Without it the window is a square in the
    middle, 7/8 as high and wide as the shorter side.

    Attributes:
        source: where the images are.
        labels: int64, ``(N,)``, on the device that batches go to.
        size: height and width of the images.
        workers: processes that decode; 0: this one does.
        bad: what could not be decoded so far.
    """

    source: Indexed | Shards
    labels: Tensor
    size: int
    workers: int
    bad: Unreadable

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.source.mode), self.size, self.size

    @property
    def unreadable(self) -> Sequence[str]:
        return list(self.bad.found)

    def take(self, chosen: npt.NDArray[np.int64]) -> Stream:
        if isinstance(self.source, Shards):
            raise ValueError(
                "files that are read from front to back are used as a whole: leave out "
                "train_limit, test_limit and validation"
            )
        labels = self.labels[torch.from_numpy(chosen).to(self.device)]
        return replace(self, source=subset(self.source, chosen), labels=labels)

    def fetch(self, epoch: Epoch) -> Iterator[tuple[Tensor, Tensor]]:
        augment = None if epoch.augment is None else replace(epoch.augment, crop=0)
        turns = epoch.turns(len(self.labels))
        turns = None if turns is None else turns.to(self.device)
        batch = epoch.start
        for images, numbers, wrong in _ahead(_started(self._decoded(epoch)), self.device):
            self.bad.add(wrong, len(self.labels))
            if not len(numbers) and wrong:
                raise ValueError(f"none of the images of a batch can be read: {'; '.join(wrong)}")
            if augment is not None:
                turn = None if turns is None else turns[numbers]
                key = epoch.seed, epoch.epoch, batch * epoch.parts + epoch.part
                images = augment(images, generator(*key), turn)
            yield images, self.labels[numbers]
            batch += 1

    def inspect(self, count: int) -> Tensor:
        """Decode ``count`` images, spread over the split, or all if it has fewer; how often each
        value occurs in each channel, ``(C, 256)``. ValueError if too many are unreadable."""
        count = min(count, len(self))
        size = max(1, count // 10)
        levels = torch.zeros(self.shape[0], 256, dtype=torch.int64)
        wrong: list[str] = []
        for images, _, more in _started(self._decoded(Epoch(size, 0, count // size, shuffle=True))):
            levels += histogram(images)
            wrong += more
        self.bad.add(wrong, count)
        return levels

    def _decoded(self, epoch: Epoch) -> Iterable[_Batch]:
        """Batches from the worker processes, in pinned memory if they go to a GPU."""
        options: dict[str, Any] = {
            "num_workers": self.workers,
            "pin_memory": self.device.type == "cuda",
            "generator": torch.Generator(),  # leaves the global one as it is
            "worker_init_fn": _ignore_signals,
        }
        if isinstance(self.source, Shards):
            if self.workers:  # so many that each gets as many groups
                options["num_workers"] = min(_GROUPS, 1 << (self.workers.bit_length() - 1))
            total, part, parts = len(self), epoch.part, epoch.parts
            first, end = (p * total // parts for p in (part, part + 1))
            share = replace(epoch, batch_size=epoch.batch_size // parts)
            shards = _ShardBatches(self.source, self.size, first, end - first, share)
            return DataLoader(shards, batch_size=None, **options)
        order = np.arange(len(self.labels))
        if epoch.shuffle:
            order = torch.randperm(len(order), generator=generator(epoch.seed, epoch.epoch)).numpy()
        size = epoch.batch_size
        return DataLoader(
            _Decoder(self.source, self.size, epoch),
            batch_sampler=(
                order[batch * size : (batch + 1) * size][epoch.part :: epoch.parts].tolist()
                for batch in range(epoch.start, epoch.end)
            ),
            collate_fn=partial(_collate, shape=self.shape),
            **options,
        )


@dataclass(frozen=True)
class _Decoder(Dataset[_Decoded]):
    """Images of one epoch, decoded, in any order."""

    source: Indexed
    size: int
    epoch: Epoch

    def __getitem__(self, index: int) -> _Decoded:
        source = self.source
        return _decode(source, index, lambda: source.open(index), self.size, self.epoch)


@dataclass(frozen=True)
class _Subset(Indexed):
    """Some samples of another source."""

    whole: Indexed
    chosen: npt.NDArray[np.int64]

    def open(self, index: int) -> Image.Image:
        return self.whole.open(self.chosen[index])

    def where(self, index: int) -> str:
        return self.whole.where(self.chosen[index])


@dataclass(frozen=True)
class _ShardBatches(IterableDataset[_Batch]):
    """Batches of one epoch read from shards; each worker process yields its own.

    The shards in a random order make one sequence of samples, and each group reads a part of it.

    Attributes:
        first, count: this process's share of the epoch, in samples.
    """

    source: Shards
    size: int
    first: int
    count: int
    epoch: Epoch

    def __iter__(self) -> Iterator[_Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        groups: dict[int, Iterator[_Decoded]] = {}
        shape = len(self.source.mode), self.size, self.size
        for batch in range(self.epoch.start + worker, self.epoch.end, workers):
            group = batch % _GROUPS
            if group not in groups:
                groups[group] = self._group(group, batch // _GROUPS)
            left = max(0, self.count - batch * self.epoch.batch_size)
            size = min(self.epoch.batch_size, left)
            yield _collate(list(itertools.islice(groups[group], size)), shape)

    def _group(self, group: int, start: int) -> Iterator[_Decoded]:
        """The samples of a group from its batch ``start`` on."""
        size, parts = self.epoch.batch_size, [0]
        batches = -(-self.count // size)
        for other in range(group + 1):  # samples of the groups up to this one
            own = range(other, batches, _GROUPS)
            short = batches * size - self.count if own and own[-1] == batches - 1 else 0
            parts.append(parts[-1] + len(own) * size - short)
        begin = self.first + parts[-2]
        borders = np.linspace(begin, begin + parts[-1] - parts[-2], _READERS + 1).astype(int)
        window, done = divmod(start * size, _RUN * _READERS)
        readers = [
            self._read(low + window * _RUN, high)
            for low, high in itertools.pairwise(borders.tolist())
        ]
        while samples := [s for reader in readers for s in itertools.islice(reader, _RUN)]:
            if self.epoch.shuffle:
                key = self.epoch.seed, self.epoch.epoch, begin, window
                order = np.random.default_rng(key).permutation(len(samples))
                samples = [samples[i] for i in order]
            samples = samples[done:][::-1]
            while samples:  # freed once it is decoded
                index, blob = samples.pop()
                image = partial(_open, blob)
                yield _decode(self.source, index, image, self.size, self.epoch)
            window, done = window + 1, 0

    def _read(self, low: int, high: int) -> Iterator[tuple[int, bytes | None]]:
        """Samples ``low`` to ``high`` of the epoch: their number in the split, and the image."""
        source = self.source
        sizes = np.diff(source.starts)
        order = np.arange(len(sizes))
        if self.epoch.shuffle:
            key = generator(self.epoch.seed, self.epoch.epoch)
            order = torch.randperm(len(order), generator=key).numpy()
        ends = np.cumsum(sizes[order])
        while low < high:
            place = int(np.searchsorted(ends, low, side="right"))
            shard = int(order[place])
            row = int(sizes[shard] - (ends[place] - low))
            wanted = int(min(high, ends[place])) - low
            got = 0
            for blob in itertools.islice(source.rows(shard, row), wanted):
                yield int(source.starts[shard]) + row + got, blob
                got += 1
            if got < wanted:
                raise ValueError(f"{source.files[shard]} holds fewer images than it did")
            low += wanted


def subset(source: Indexed, chosen: npt.NDArray[np.int64]) -> Indexed:
    """The chosen samples of a source."""
    return _Subset(source.labels[chosen], source.mode, source, chosen)


def histogram(images: Tensor) -> Tensor:
    """How often each value occurs in each channel of uint8 images ``(N, C, H, W)``."""
    return torch.stack([c.flatten().int().bincount(minlength=256) for c in images.unbind(1)])


def _decode(
    source: Indexed | Shards,
    index: int,
    open: Callable[[], Image.Image],
    size: int,
    epoch: Epoch,
) -> _Decoded:
    window: Callable[[int, int], Box] = _middle
    if epoch.augment is not None and epoch.augment.crop:
        window = partial(_random_window, (epoch.seed, epoch.epoch, index))
    try:
        pixels = decode(open, source.where(index), source.mode, size, window)
    except UnreadableImageError as error:
        return str(error)
    return pixels, index


def _open(blob: bytes | None) -> Image.Image:
    if blob is None:
        raise ValueError("the row holds no image")
    return Image.open(io.BytesIO(blob))


def _middle(width: int, height: int) -> Box:
    left, top, right, bottom = centre(width, height)
    margin = (1 - _SEEN) / 2 * (right - left)
    return left + margin, top + margin, right - margin, bottom - margin


def _random_window(key: tuple[int, ...], width: int, height: int) -> Box:
    draw = np.random.default_rng(key).uniform
    for _ in range(_TRIES):
        area = width * height * draw(*_AREA)
        ratio = math.exp(draw(-_LOG_RATIO, _LOG_RATIO))
        across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if across <= width and down <= height:
            left, top = draw(0, width - across), draw(0, height - down)
            return left, top, left + across, top + down
    return centre(width, height)


def _collate(samples: list[_Decoded], shape: tuple[int, int, int]) -> _Batch:
    good = [sample for sample in samples if not isinstance(sample, str)]
    images = torch.empty(len(good), *shape, dtype=torch.uint8)
    for image, (pixels, _) in zip(images.numpy(), good, strict=True):
        image[...] = pixels
    numbers = torch.tensor([number for _, number in good], dtype=torch.int64)
    return images, numbers, [sample for sample in samples if isinstance(sample, str)]


_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def _started(loader: Iterable[_Batch]) -> Iterator[_Batch]:
    """The batches of ``loader``, whose worker processes are running."""
    before = multiprocessing.active_children()
    batches = iter(loader)
    _workers.update(set(multiprocessing.active_children()) - set(before))
    return batches


@atexit.register
def _end_workers() -> None:
    """End the workers that an error has left behind. When Python exits it would ask them by a
    signal, which they ignore, and wait for them."""
    left = [process for process in multiprocessing.active_children() if process in _workers]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an error
    for process in left:
        process.kill()


def _ahead(batches: Iterable[_Batch], device: torch.device) -> Iterator[_Batch]:
    """The batches on ``device``: a GPU is sent each while it works on the one before."""
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: _Batch | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            images, numbers = (tensor.to(device, non_blocking=True) for tensor in batch[:2])
        if waiting is not None:
            yield waiting
        working = torch.cuda.current_stream(device)
        working.wait_stream(copying)
        for tensor in (images, numbers):
            tensor.record_stream(working)
        waiting = images, numbers, batch[2]
    if waiting is not None:
        yield waiting


def _ignore_signals(worker: int) -> None:
    """Ctrl-C reaches all processes: only the main one handles it, and it still needs its
    workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
