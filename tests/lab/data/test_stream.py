"""Streams: the same images as from memory, each once an epoch, in an order that a seed decides."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.oracles import imagenet
from torch import Tensor

from svdalign.lab import data
from svdalign.lab.data import _stream
from svdalign.lab.data._types import Epoch

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

# Image i of a split is grey, of value 2 i, and 16 x 16 pixels; its class is i % 3.
TRAIN, TEST = 61, 11
KINDS = ["folder", "parquet", "webdataset"]
CROP = data.Augment(crop=4)


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (value,) * 3).save(stream, "PNG")
    return stream.getvalue()


def write_folder(root: Path) -> None:
    for split, count in (("train", TRAIN), ("val", TEST)):
        for i in range(count):
            place = root / split / f"class{i % 3}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i:03d}.png").write_bytes(png(2 * i))


def write_parquet(root: Path) -> None:
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for split, cuts in (("train", (0, 7, 7, 40, TRAIN)), ("val", (0, TEST))):
        for shard, (low, high) in enumerate(itertools.pairwise(cuts)):
            blobs = [{"bytes": png(2 * i), "path": None} for i in range(low, high)]
            table = {
                "image": pyarrow.array(blobs, kind),
                "label": pyarrow.array([i % 3 for i in range(low, high)], pyarrow.int64()),
            }
            file = root / f"{split}-{shard:05d}-of-{len(cuts) - 1:05d}.parquet"
            parquet.write_table(pyarrow.table(table), file, row_group_size=5)


def write_webdataset(root: Path) -> None:
    for split, cuts in (("train", (0, 7, 40, TRAIN)), ("val", (0, TEST))):
        for shard, (low, high) in enumerate(itertools.pairwise(cuts)):
            with tarfile.open(root / f"{split}-{shard:06d}.tar", "w") as tar:
                for i in range(low, high):
                    for suffix, content in (("png", png(2 * i)), ("cls", str(i % 3).encode())):
                        member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


WRITE: dict[str, Callable[[Path], None]] = {
    "folder": write_folder,
    "parquet": write_parquet,
    "webdataset": write_webdataset,
}


@pytest.fixture(scope="module", params=KINDS)
def streamed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp(request.param)
    WRITE[request.param](root)
    return data.load(request.param, data_dir=root, image_size=8, stream=True, workers=0)


def run(split: data.Images, size: int = 4, **options: Any) -> list[tuple[Tensor, Tensor]]:
    end = data.num_batches(split, size)
    return list(split.fetch(Epoch(**{"batch_size": size, "start": 0, "end": end} | options)))


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.equal(u) and y.equal(v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def values(batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    """The numbers of the images, in order: every pixel shows it. Their labels are right."""
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (images == images[:, :1, :1, :1]).all()
    numbers = images[:, 0, 0, 0] // 2
    assert labels.equal(numbers.long() % 3)
    return numbers.tolist()


def test_what_is_in_it(streamed: data.ImageData) -> None:
    assert len(streamed.train), len(streamed.test) == (TRAIN, TEST)
    assert (streamed.num_classes, streamed.in_channels, streamed.image_size) == (3, 3, 8)
    pixels = np.repeat(2 * np.arange(60) / 255, 64)  # all but the last, of batches of six
    assert streamed.mean[0] == pytest.approx(pixels.mean(), abs=0.01)
    assert streamed.std[0] == pytest.approx(pixels.std(), abs=0.01)


@pytest.mark.parametrize("size", [1, 4, 61, 100])
def test_an_epoch_has_every_image_once(streamed: data.ImageData, size: int) -> None:
    plain = values(run(streamed.test, size))
    assert sorted(plain) == list(range(TEST))
    orders = [
        values(run(streamed.train, size, shuffle=True, seed=seed, epoch=epoch, augment=augment))
        for seed, epoch, augment in ((0, 0, None), (0, 1, None), (1, 0, CROP))
    ]
    for order in orders:
        assert sorted(order) == list(range(TRAIN))
        assert order != sorted(order)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_without_shuffling_every_epoch_is_the_same(streamed: data.ImageData) -> None:
    assert values(run(streamed.train)) == values(run(streamed.train, seed=1, epoch=1))


@pytest.mark.parametrize("size", [3, 20])
def test_going_on_equals_not_stopping(
    streamed: data.ImageData, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stream, "_RUN", 2)  # so that groups are several windows long
    monkeypatch.setattr(_stream, "_GROUPS", 2)
    options = {"shuffle": True, "seed": 3, "epoch": 2, "augment": replace(CROP, flip=True)}
    whole = run(streamed.train, size, **options)
    assert sorted(values(whole)) == list(range(TRAIN))
    for start in range(len(whole) + 1):
        torch.randn(7)  # the global generator has no part in it
        assert same(run(streamed.train, size, start=start, **options), whole[start:])


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(streamed: data.ImageData, workers: int) -> None:
    options = {"shuffle": True, "augment": data.Augment(crop=1, flip=True, alternate=True)}
    many = replace(streamed.train, workers=workers)
    state = torch.get_rng_state()
    for start in (0, 5):
        assert same(run(many, start=start, **options), run(streamed.train, start=start, **options))
    assert torch.get_rng_state().equal(state)


def test_worker_processes_do_not_die_of_signals_to_the_group(streamed: data.ImageData) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach them too; the run ends in its own time."""
    many = replace(streamed.train, workers=1)
    epoch = many.fetch(Epoch(4, 0, 15, shuffle=True))
    batches = [next(epoch)]
    workers = [child for child in multiprocessing.active_children() if child.pid]
    assert workers
    for worker, number in itertools.product(workers, (signal.SIGINT, signal.SIGTERM)):
        os.kill(worker.pid or 0, number)
    batches += epoch
    assert same(batches, run(streamed.train, end=15, shuffle=True))


BROKEN_LOOP = """
import sys
from svdalign.lab import data
images = data.load("folder", data_dir=sys.argv[1], image_size=8, stream=True, workers=2)
batches = data.batches(images.train, 4, mean=images.mean, std=images.std)
for x, y in batches:
    raise SystemExit("a mistake in the loop")
"""


def test_an_error_in_the_loop_ends_the_workers_with_the_program(tmp_path: Path) -> None:
    """Its traceback keeps their batches alive, so that they wait for more to do."""
    write_folder(tmp_path)
    program = [sys.executable, "-c", BROKEN_LOOP, str(tmp_path)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=100, check=False)
    assert (ended.returncode, ended.stderr) == (1, "a mistake in the loop\n")


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_an_epoch(streamed: data.ImageData, processes: int) -> None:
    size, whole = 2 * processes, run(streamed.train, 2 * processes, shuffle=True)
    shares = [
        run(streamed.train, size, shuffle=True, part=part, parts=processes)
        for part in range(processes)
    ]
    assert sorted(itertools.chain(*map(values, shares))) == list(range(TRAIN))
    for share in shares:
        assert len(share) == len(whole)  # as many steps on each
        assert all(len(y) == 2 for _, y in share[:-1])


def test_batches_are_normalised_and_end_where_memory_does(streamed: data.ImageData) -> None:
    kept = list(
        data.batches(streamed.train, 8, mean=streamed.mean, std=streamed.std, drop_last=True)
    )
    assert [len(y) for _, y in kept] == [8] * (TRAIN // 8)
    pixels = torch.cat([x for x, _ in kept])
    assert pixels.dtype == torch.float32
    assert pixels.mean().item() == pytest.approx(0, abs=0.2)


def test_pickled_sources_decode_the_same(streamed: data.ImageData) -> None:
    """As where worker processes are not forked."""
    import pickle

    again = pickle.loads(pickle.dumps(streamed.train))
    assert same(run(again, shuffle=True), run(streamed.train, shuffle=True))


# Limits and parts


def test_limits_and_held_out_images_of_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path)
    options = {"data_dir": tmp_path, "image_size": 8, "workers": 0}
    memory = data.load("folder", train_limit=30, stream=False, **options)
    streamed = data.load("folder", train_limit=30, stream=True, **options)
    assert sorted(values(run(memory.train))) == sorted(values(run(streamed.train)))
    memory, streamed = (data.hold_out(d, 9) for d in (memory, streamed))
    assert len(streamed.train) == 21
    assert sorted(values(run(memory.test))) == sorted(values(run(streamed.test)))


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_shards_are_used_as_a_whole(tmp_path: Path, kind: str) -> None:
    WRITE[kind](tmp_path)
    options: dict[str, Any] = {"data_dir": tmp_path, "image_size": 8, "workers": 0}
    with pytest.raises(ValueError, match="train_limit is for data that can be read in any order"):
        data.load(kind, train_limit=5, **options)
    with pytest.raises(ValueError, match="leave out train_limit, test_limit and validation"):
        data.hold_out(data.load(kind, **options), 5)
    with pytest.raises(ValueError, match="stream cannot be false"):
        data.load(kind, stream=False, **options)
    with pytest.raises(ValueError, match="image_size is needed"):
        data.load(kind, data_dir=tmp_path)


def test_large_folders_are_streamed_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path)
    pixels = (TRAIN + TEST) * 3 * 8 * 8
    for limit, streamed in ((pixels, False), (pixels - 1, True)):
        monkeypatch.setattr("svdalign.lab.data._load._IN_MEMORY", limit)
        d = data.load("folder", data_dir=tmp_path, image_size=8, workers=0)
        assert isinstance(d.train, _stream.Stream) == streamed


def test_labels_of_shards_are_whole_numbers_or_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    file = next(tmp_path.glob("train-00003*"))
    table = parquet.read_table(file)
    labels = [0.5] * len(table)
    parquet.write_table(table.set_column(1, "label", pyarrow.array(labels)), file)
    with pytest.raises(ValueError, match=rf"{file.name}, row 0: label must be a whole number"):
        data.load("parquet", data_dir=tmp_path, image_size=8, workers=0)
    (tmp_path / "tar").mkdir()
    write_webdataset(tmp_path / "tar")
    with tarfile.open(tmp_path / "tar" / "train-000001.tar", "w") as tar:
        member = tarfile.TarInfo("0.png")
        member.size = len(png(0))
        tar.addfile(member, io.BytesIO(png(0)))
    with pytest.raises(ValueError, match=r"train-000001\.tar, row 0: cls must be .* got None"):
        data.load("webdataset", data_dir=tmp_path / "tar", image_size=8, workers=0)


def test_test_images_without_labels_give_way_to_those_with(tmp_path: Path) -> None:
    """As in ImageNet on the hub, where all test images have label -1."""
    write_parquet(tmp_path)
    table = parquet.read_table(tmp_path / "val-00000-of-00001.parquet")
    hidden = table.set_column(1, "label", pyarrow.array([-1] * len(table)))
    parquet.write_table(hidden, tmp_path / "test.parquet")
    d = data.load("parquet", data_dir=tmp_path, image_size=8, workers=0)
    assert sorted(values(run(d.test))) == list(range(TEST))


def test_a_name_on_the_hub_is_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path)
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    asked, build = [], datasets.load_dataset_builder

    def builder(name: str) -> Any:
        asked.append(name)
        return build("parquet", data_files={"train": [str(p) for p in sorted(tmp_path.glob("tr*"))],
                                            "validation": str(tmp_path / "val*")},
                     cache_dir=tmp_path)  # fmt: skip

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    d = data.load("someone/images", image_size=8, workers=0)
    assert asked == ["someone/images"]
    assert sorted(values(run(d.train, shuffle=True))) == list(range(TRAIN))
    assert sorted(values(run(d.test))) == list(range(TEST))


# Windows


def test_random_windows_are_parts_of_the_image_of_all_sizes() -> None:
    boxes = [_stream._random_window((0, i), 200, 100) for i in range(400)]
    areas = np.array([(r - left) * (b - t) for left, t, r, b in boxes]) / 20_000
    ratios = np.array([(r - left) / (b - t) for left, t, r, b in boxes])
    assert all(0 <= left < r <= 200 and 0 <= t < b <= 100 for left, t, r, b in boxes)
    assert areas.min() > 0.08 - 1e-9
    assert areas.max() > 0.5
    assert ratios.min() >= 3 / 4 - 1e-9
    assert ratios.max() <= 4 / 3 + 1e-9
    # Up to an area of 0.375, windows of all ratios fit: none is likelier than another.
    assert (areas[areas < 0.375] < 0.2275).mean() == pytest.approx(0.5, abs=0.08)
    # Where no such window fits, it is the square in the middle.
    assert _stream._random_window((0,), 3000, 1) == (1499.5, 0, 1500.5, 1)


def test_without_augmentation_the_middle_is_seen(tmp_path: Path) -> None:
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[4:60, 36:92] = 200  # 7/8 of the square in the middle
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / split / name / "0.png")
    d = data.load("folder", data_dir=tmp_path, image_size=56, stream=True, workers=0)
    assert (run(d.test)[0][0] == 200).all()


# What cannot be read


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imagenet.make(tmp_path_factory.mktemp("imagenet"))


def test_imagenet_with_all_that_it_holds(tree: Path) -> None:
    options: dict[str, Any] = {"data_dir": tree, "image_size": 32, "stream": True, "workers": 0}
    d = data.load("folder", max_unreadable=0.1, **options)
    assert d.classes == tuple(f"n{i:08d}" for i in range(4))
    batches = run(d.train, 5, shuffle=True, augment=data.Augment(crop=1, flip=True))
    read = sum(len(labels) for _, labels in batches)
    assert read == len(d.train) - len(imagenet.UNREADABLE) == 4 * 6 + 9
    found = " ".join(d.unreadable)
    assert len(d.unreadable) == 2
    assert all(str(tree / "train" / name) in found for name in imagenet.UNREADABLE)
    # A window has its class's colour, whatever the kind of file; grey ones aside.
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for label in (2, 3):
        seen = images[labels == label].float().mean((0, 2, 3))
        assert seen.numpy() == pytest.approx(imagenet.colour(label, 4), abs=15)


def test_more_unreadable_images_than_allowed_are_refused_at_the_start(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"[12] of 3\d images cannot be read, more than max_unre"):
        data.load("folder", data_dir=tree, image_size=32, stream=True, workers=0)


def test_a_batch_that_cannot_be_read_at_all_is_refused(tree: Path) -> None:
    d = data.load("folder", data_dir=tree, image_size=32, stream=True, workers=0, max_unreadable=1)
    with pytest.raises(
        ValueError, match=r"none of the images of a batch can be read: .*(page|truncated)\."
    ):
        run(d.train, 1)


def test_unreadable_rows_are_left_out_of_shards_too(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    file = next(tmp_path.glob("train-00002*"))
    table = parquet.read_table(file)
    blobs = table["image"].to_pylist()
    blobs[0], blobs[1] = {"bytes": b"<html>", "path": None}, None
    parquet.write_table(
        table.set_column(0, "image", pyarrow.array(blobs, table["image"].type)), file
    )
    options: dict[str, Any] = {"data_dir": tmp_path, "image_size": 8, "workers": 0}
    d = data.load("parquet", max_unreadable=0.1, **options)
    order = values(run(d.train, 10, shuffle=True))
    assert sorted(order) == [i for i in range(TRAIN) if i not in (7, 8)]
    assert len(d.unreadable) == 2
    assert all(f"{file.name}, row" in reason for reason in d.unreadable)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"max_unreadable": 1.5}, r"max_unreadable must be from 0 to 1, got 1\.5"),
        ({"name": "parquet"}, "'parquet' needs data_dir"),
        ({"name": "a/b", "data_dir": "."}, "comes from the hub and takes no data_dir"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(**options)
