from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from svdalign.lab import data

datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CIFAR10_NAMES = [f"class{i}" for i in range(10)]


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def noise(n: int, side: int = 8, channels: int = 3) -> np.ndarray[Any, Any]:
    shape = (n, side, side, channels) if channels > 1 else (n, side, side)
    return np.random.default_rng(n + side).integers(0, 256, shape, dtype=np.uint8)


def write_parquet(
    path: Path,
    images: np.ndarray[Any, Any],
    labels: list[int],
    *,
    image: str = "img",
    label: str = "label",
    names: list[str] | None = None,
) -> None:
    """A file as the hub serves them; without ``names`` the labels are plain integers."""
    features = {
        image: datasets.Image(),
        label: datasets.ClassLabel(names=names) if names else datasets.Value("int64"),
    }
    rows = {image: [{"bytes": png(pixels), "path": None} for pixels in images], label: labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(path)


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """Two training files of 20 images each and a test file of 10, 8 x 8 pixels."""
    for i in range(2):
        write_parquet(
            tmp_path / f"train-0000{i}-of-00002.parquet",
            noise(40)[20 * i : 20 * (i + 1)],
            [j % 10 for j in range(20)],
            names=CIFAR10_NAMES,
        )
    write_parquet(tmp_path / "test.parquet", noise(10), list(range(10)), names=CIFAR10_NAMES)
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; 4 training and 2 validation images each, 8 x 8 pixels."""
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                colour = np.full((8, 8, 3), 100 * label + i, dtype=np.uint8)
                Image.fromarray(colour).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


# Embedded


def test_embedded_is_balanced_and_needs_no_other_library() -> None:
    d = data.load()
    assert d.train.images.shape == (10_000, 1, 28, 28)
    assert d.test.images.shape == (2_000, 1, 28, 28)
    assert d.train.images.dtype == torch.uint8
    assert d.train.labels.dtype == torch.int64
    assert d.train.labels.bincount().tolist() == [1000] * 10
    assert d.test.labels.bincount().tolist() == [200] * 10
    assert (d.num_classes, d.in_channels, d.image_size) == (10, 1, 28)
    # The whole of Fashion-MNIST: 0.2860 and 0.3530.
    assert d.mean == pytest.approx((0.286,), abs=0.005)
    assert d.std == pytest.approx((0.353,), abs=0.005)


def test_embedded_images_belong_to_their_labels() -> None:
    """The nearest class mean of the training images tells two thirds of the test images."""
    d = data.load()
    x, u = (s.images.flatten(1).float() for s in (d.train, d.test))
    means = torch.stack([x[d.train.labels == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(u, means).argmin(1) == d.test.labels).float().mean()
    assert accuracy > 0.6


def test_embedded_imports_neither_datasets_nor_pyarrow() -> None:
    code = (
        "import sys; from svdalign.lab import data; data.load(train_limit=10, test_limit=10);"
        "print(sorted({'datasets', 'pyarrow', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_mean_and_std_are_those_of_the_training_pixels() -> None:
    d = data.load(train_limit=100)
    pixels = d.train.images.double() / 255
    assert d.mean[0] == pytest.approx(pixels.mean().item())
    assert d.std[0] == pytest.approx(pixels.std(correction=0).item())


# Limits and sizes


@pytest.fixture(scope="module")
def seen() -> set[bytes]:
    """The pixels of all training images."""
    return {image.numpy().tobytes() for image in data.load().train.images}


@pytest.mark.parametrize("limit", [1, 9, 10, 25, 10_000])
def test_limit_takes_an_even_share_of_each_class_in_order(limit: int, seen: set[bytes]) -> None:
    part = data.load(train_limit=limit).train
    counts = part.labels.bincount(minlength=10)
    assert len(part) == limit
    assert counts.max() - counts.min() <= 1
    assert part.labels.equal(part.labels.sort().values)  # the sheets are sorted by class
    assert all(image.numpy().tobytes() in seen for image in part.images[:50])


def test_limit_is_a_function_of_the_seed() -> None:
    first, again, other = (data.load(train_limit=50, seed=s).train.images for s in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_limit_with_a_small_class_takes_what_there_is(tmp_path: Path) -> None:
    for split in ("train", "test"):
        labels = [0] * 10 + [1] * 2 + [2] * 10
        write_parquet(tmp_path / f"{split}.parquet", noise(22), labels)
    d = data.load("cifar10", data_dir=tmp_path, train_limit=12)
    assert d.train.labels.bincount().tolist() == [5, 2, 5]


@pytest.mark.parametrize("limit", [0, -1, 10_001])
def test_limits_out_of_range_are_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=rf"train_limit must be from 1 to 10000, got {limit}"):
        data.load(train_limit=limit)
    with pytest.raises(ValueError, match=rf"test_limit must be from 1 to 2000, got {limit}"):
        data.load(train_limit=1, test_limit=limit)


def test_shrinking_by_a_whole_factor_takes_the_mean_of_each_area() -> None:
    whole, half = data.load(train_limit=20), data.load(train_limit=20, image_size=14)
    area = torch.nn.functional.avg_pool2d(whole.train.images.float(), 2)
    assert half.train.images.shape == (20, 1, 14, 14)
    # Pillow rounds twice, after the rows and after the columns.
    assert (half.train.images - area).abs().max() <= 1


def test_growing() -> None:
    assert data.load(train_limit=2, test_limit=2, image_size=32).test.images.shape[2:] == (32, 32)


def test_image_size_crops_the_centre_of_wide_and_tall_images(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 200
    for split in ("train", "test"):
        for name, pixels in (("wide", wide), ("tall", wide.transpose(1, 0, 2))):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / split / name / "a.png")
    with pytest.raises(ValueError, match=r"tall.*is 8 x 24.*give image_size"):
        data.load("folder", data_dir=tmp_path)
    d = data.load("folder", data_dir=tmp_path, image_size=4)
    assert d.train.images.shape == (2, 3, 4, 4)
    assert d.train.images.eq(200).all()


# Parquet


def test_parquet_files_are_read_in_order(cifar10: Path) -> None:
    d = data.load("cifar10", data_dir=cifar10)
    expected = torch.from_numpy(noise(40)).permute(0, 3, 1, 2)
    assert d.train.images.equal(expected)
    assert d.train.labels.tolist() == [j % 10 for j in range(20)] * 2
    assert d.test.labels.tolist() == list(range(10))
    assert d.classes == tuple(CIFAR10_NAMES)
    assert d.in_channels == 3


@pytest.mark.parametrize(
    ("name", "image", "label", "channels"),
    [("fashion_mnist", "image", "label", 1), ("cifar100", "img", "fine_label", 3)],
)
def test_columns_of_each_data_set(
    tmp_path: Path, name: str, image: str, label: str, channels: int
) -> None:
    pixels = noise(10, channels=channels)
    for split in ("train", "test"):
        write_parquet(
            tmp_path / name / f"{split}.parquet", pixels, list(range(10)), image=image, label=label
        )
    d = data.load(name, data_dir=tmp_path)  # the folder above is enough
    assert d.train.images.equal(torch.from_numpy(pixels).reshape(10, 8, 8, channels).movedim(3, 1))
    assert d.classes[3] == "3"  # plain integers have no names


def test_reading_parquet_leaves_nothing_behind(cifar10: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    code = f"from svdalign.lab import data; data.load('cifar10', data_dir={str(cifar10)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HOME": str(home)})
    assert not list(home.rglob("*"))


def test_corrupt_parquet_is_named(cifar10: Path) -> None:
    file = cifar10 / "train-00001-of-00002.parquet"
    whole = file.read_bytes()
    for damaged in (b"", b"not Parquet at all" * 100, whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{file.name} cannot be read as Parquet"):
            data.load("cifar10", data_dir=cifar10)
    # A whole frame around damaged pages.
    file.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(ValueError, match=file.name):
        data.load("cifar10", data_dir=cifar10)


def test_corrupt_image_is_named(tmp_path: Path) -> None:
    rows = {"img": [{"bytes": b"no image", "path": None}], "label": [0]}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet, row 0 is not a readable image"):
        data.load("cifar10", data_dir=tmp_path)


def test_missing_column_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", noise(2), [0, 1], label="coarse")
    with pytest.raises(
        ValueError, match=r"train\.parquet lacks the column 'label'; it has img, coarse"
    ):
        data.load("cifar10", data_dir=tmp_path)


def test_label_out_of_range_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", noise(3), [0, 9, 10])
    with pytest.raises(ValueError, match=r"row 2: label 10 is outside the 10 classes \(0 to 9\)"):
        data.load("cifar10", data_dir=tmp_path)


def test_wrong_number_of_classes_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", noise(2), [0, 1], names=["a", "b"])
    with pytest.raises(ValueError, match="names 2 classes, not 10"):
        data.load("cifar10", data_dir=tmp_path)


def test_splits_with_different_classes_are_refused(cifar10: Path) -> None:
    names = CIFAR10_NAMES[::-1]
    write_parquet(cifar10 / "test.parquet", noise(10), list(range(10)), names=names)
    with pytest.raises(ValueError, match=r"test\.parquet name different classes"):
        data.load("cifar10", data_dir=cifar10)


def test_missing_test_file_and_empty_split_are_named(cifar10: Path) -> None:
    write_parquet(cifar10 / "test.parquet", noise(0), [], names=CIFAR10_NAMES)
    with pytest.raises(ValueError, match="the test split holds no images"):
        data.load("cifar10", data_dir=cifar10)
    (cifar10 / "test.parquet").unlink()
    with pytest.raises(ValueError, match=r"holds no file test\.parquet"):
        data.load("cifar10", data_dir=cifar10)


def test_splits_of_different_sizes_are_refused_unless_resized(cifar10: Path) -> None:
    write_parquet(cifar10 / "test.parquet", noise(10, 6), list(range(10)), names=CIFAR10_NAMES)
    with pytest.raises(ValueError, match=r"training images are 8 pixels wide, test images 6"):
        data.load("cifar10", data_dir=cifar10)
    assert data.load("cifar10", data_dir=cifar10, image_size=4).image_size == 4


LABELS = [
    ([0.0, 1.0, 9.0], None, [0, 1, 9]),
    ([0, 1, 9], pyarrow.uint8(), [0, 1, 9]),
    (pyarrow.array([0, 1, 9]).dictionary_encode(), None, [0, 1, 9]),
    ([0, 1, 1.7], None, r"row 2: label must be a whole number, the class, got 1\.7"),
    ([0, 1, float("nan")], None, "row 2: label .* got nan"),
    ([0, 1, 1e30], None, r"row 2: label .* got 1e\+30"),
    ([0, 1, 2**64 - 1], pyarrow.uint64(), f"row 2: label .* got {2**64 - 1}"),
    ([0, None, 1], None, "row 1: label .* got None"),
    (["0", "1", "9"], None, "row 0: label .* got '0'"),
    (["cat", "dog", "cat"], None, "row 0: label .* got 'cat'"),
    ([True, False, True], None, "row 0: label .* got True"),
    ([[0], [1], [9]], None, r"row 0: label .* got \[0\]"),
    ([0, 1, -1], None, "row 2: label -1 is outside the 10 classes"),
]


def write_arrow(file: Path, images: object, labels: object, kind: object = None) -> None:
    """A file that knows nothing of ``datasets``."""
    rows = {"img": images, "label": pyarrow.array(labels, kind) if kind else labels}
    parquet.write_table(pyarrow.table(rows), file)


@pytest.mark.parametrize(("labels", "kind", "expected"), LABELS)
def test_labels_are_whole_numbers_or_refused(
    tmp_path: Path, labels: object, kind: object, expected: list[int] | str
) -> None:
    blobs = [{"bytes": png(pixels), "path": None} for pixels in noise(3)]
    write_arrow(tmp_path / "train.parquet", blobs, labels, kind)
    write_arrow(tmp_path / "test.parquet", blobs, [0, 1, 2])
    if isinstance(expected, list):
        assert data.load("cifar10", data_dir=tmp_path).train.labels.tolist() == expected
    else:
        with pytest.raises(ValueError, match=rf"train\.parquet, {expected}"):
            data.load("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
def test_images_may_be_plain_bytes(tmp_path: Path, kind: object) -> None:
    for split in ("train", "test"):
        blobs = pyarrow.array([png(pixels) for pixels in noise(3)], kind)
        write_arrow(tmp_path / f"{split}.parquet", blobs, [0, 1, 2])
    images = data.load("cifar10", data_dir=tmp_path).train.images
    assert images.equal(torch.from_numpy(noise(3)).permute(0, 3, 1, 2))


def test_rows_without_an_image_are_named(tmp_path: Path) -> None:
    blobs = [{"bytes": png(noise(1)[0]), "path": None}, {"bytes": None, "path": "1.png"}]
    write_arrow(tmp_path / "test.parquet", blobs, [0, 1])
    write_arrow(tmp_path / "train.parquet", blobs, [0, 1])
    with pytest.raises(
        ValueError, match=r"train\.parquet, row 1 is not a readable image: .*no image"
    ):
        data.load("cifar10", data_dir=tmp_path)
    write_arrow(tmp_path / "train.parquet", [3, 4], [0, 1])
    with pytest.raises(ValueError, match=r"train\.parquet: column 'img' holds no images"):
        data.load("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet", "test.parquet"],
        ["Train.Parquet", "TEST.PARQUET"],
        ["train-0.parquet", "train-1.parquet", "test-0.parquet"],
        ["data/train-00000-of-00002-0a1b.parquet", "data/train-00001-of-00002-2c3d.parquet",
         "data/test-00000-of-00001-4e5f.parquet"],
        ["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"],
    ],
)  # fmt: skip
def test_layouts_of_parquet_files(tmp_path: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        write_parquet(tmp_path / name, noise(2), [number, number])
    for name in ("train_small-0", "train-tiny", "trainval", "test_small", ".train-0", "my-train"):
        write_parquet(tmp_path / f"{name}.parquet", noise(2), [9, 9])
    d = data.load("cifar10", data_dir=tmp_path)
    last = len(names) - 1
    assert d.train.labels.tolist() == [n for n in range(last) for _ in range(2)]
    assert d.test.labels.tolist() == [last, last]


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002"],
        ["train-00000-of-00002", "train-00002-of-00003"],
        ["train", "train-0"],
        ["train-0", "train-00000-of-00001"],
    ],
)
def test_missing_and_doubled_shards_are_refused(tmp_path: Path, names: list[str]) -> None:
    for name in [*names, "test"]:
        write_parquet(tmp_path / f"{name}.parquet", noise(2), [0, 1])
    with pytest.raises(ValueError, match=f"one whole set of files, but .*{names[0]}"):
        data.load("cifar10", data_dir=tmp_path)


def test_empty_shards_do_not_matter(cifar10: Path) -> None:
    write_parquet(cifar10 / "test-1.parquet", noise(0), [], names=CIFAR10_NAMES)
    (cifar10 / "test.parquet").rename(cifar10 / "test-0.parquet")
    assert data.load("cifar10", data_dir=cifar10).test.labels.tolist() == list(range(10))


def test_hub_without_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(ValueError, match=r"uoft-cs/cifar10 cannot be loaded.*no route.*data_dir"):
        data.load("cifar10")


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own client, on a port that nothing listens on: no half a minute of retries."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be loaded from the hub .*give data_dir"):
        data.load("cifar10")
    assert time.monotonic() - started < 6  # with the import of the clients


def test_hub_tables_are_read_like_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def table(repository: str, *, split: str) -> Any:
        assert repository == "uoft-cs/cifar10"
        pixels = noise(10 if split == "train" else 5)
        features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=CIFAR10_NAMES)}
        rows = {
            "img": [{"bytes": png(p), "path": None} for p in pixels],
            "label": list(range(len(pixels))),
        }
        return datasets.Dataset.from_dict(rows, datasets.Features(features))

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", table)
    d = data.load("cifar10")
    assert d.train.images.equal(torch.from_numpy(noise(10)).permute(0, 3, 1, 2))
    assert d.test.labels.tolist() == [0, 1, 2, 3, 4]


# Image folders


def test_folder(folder: Path) -> None:
    d = data.load("folder", data_dir=folder)
    assert d.classes == ("ant", "bee")
    assert d.train.labels.tolist() == [0] * 4 + [1] * 4
    assert d.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 100, 101, 102, 103]
    assert d.test.images.shape == (4, 3, 8, 8)


def test_constant_images_have_a_usable_deviation(folder: Path) -> None:
    d = data.load("folder", data_dir=folder, train_limit=1)
    x, _ = next(data.batches(d.train, 1, mean=d.mean, std=d.std))
    assert x.isfinite().all()


def test_folder_errors(folder: Path) -> None:
    with pytest.raises(ValueError, match="'folder' needs data_dir"):
        data.load("folder")
    with pytest.raises(ValueError, match="data_dir is not a folder"):
        data.load("folder", data_dir=folder / "nowhere")
    with pytest.raises(ValueError, match="train is missing"):
        data.load("folder", data_dir=folder / "val")
    (folder / "train" / "ant" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png is not a readable image"):
        data.load("folder", data_dir=folder)
    (folder / "val" / "cow").mkdir()
    with pytest.raises(ValueError, match=r"cow holds no image file"):
        data.load("folder", data_dir=folder)
    Image.new("RGB", (8, 8)).save(folder / "val" / "cow" / "0.png")
    with pytest.raises(ValueError, match=r"train has 2 classes, .*val has 3; .*: cow"):
        data.load("folder", data_dir=folder)


def test_images_that_are_no_squares_of_one_size_are_named(folder: Path) -> None:
    Image.new("RGB", (40, 30)).save(folder / "train" / "bee" / "0.png")
    with pytest.raises(ValueError, match=r"bee/0\.png is 40 x 30, .*ant/\w+\.png is 8 x 8: images"):
        data.load("folder", data_dir=folder)
    for path in (folder / "train" / "ant").iterdir():
        Image.new("RGB", (40, 30)).save(path)
    with pytest.raises(ValueError, match=r"ant/\w+\.png is 40 x 30: images must be squares"):
        data.load("folder", data_dir=folder)


def test_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file train\.parquet"):
        data.load("cifar10", data_dir=tmp_path)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with pytest.raises(ValueError, match="train holds no folder"):
        data.load("folder", data_dir=tmp_path)


def test_what_is_hidden_or_left_behind_is_no_class_and_no_image(folder: Path) -> None:
    expected = data.load("folder", data_dir=folder)
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        for place in ("", "train", "val", "train/ant"):
            (folder / place / name).mkdir()
            Image.new("RGB", (8, 8)).save(folder / place / name / "0.png")
    for name in (".DS_Store", "Thumbs.db", "._1.png", "desktop.ini"):
        (folder / "train" / "ant" / name).write_bytes(b"junk")
        (folder / "train" / name).write_bytes(b"junk")
    d = data.load("folder", data_dir=folder)
    assert d.classes == expected.classes
    assert d.train.images.equal(expected.train.images)


def test_images_at_any_depth_with_any_suffix_count(folder: Path) -> None:
    image = Image.new("RGB", (8, 8), (200, 0, 0))
    names = ["a.gif", "b.JPG", "c.jpeg", "d.jfif", "e.tga", "f.ppm", "deep/er/g.webp", "h", "i.dat"]
    for name in names:
        path = folder / "train" / "ant" / "more" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = path.suffix.lower()
        image.save(path, {".jfif": "JPEG", "": "PNG", ".dat": "BMP"}.get(suffix))
    d = data.load("folder", data_dir=folder)
    assert d.classes == ("ant", "bee")
    assert d.train.labels.tolist() == [0] * (4 + len(names)) + [1] * 4
    assert d.train.images[4:-4, 0].float().mean() == pytest.approx(200, abs=2)


def test_files_that_are_no_images_are_left_out_aloud(folder: Path) -> None:
    for number in range(5):
        (folder / "train" / "bee" / f"{number}.txt").write_text("notes")
    with pytest.warns(UserWarning, match=r"left out of .*train, being no images: .*0\.txt.*2 more"):
        assert len(data.load("folder", data_dir=folder).train) == 8


@pytest.mark.parametrize("name", ["a.heic", "a.JPEG", "a.h5"])
def test_images_that_cannot_be_decoded_are_refused(folder: Path, name: str) -> None:
    (folder / "train" / "bee" / name).write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match=rf"{name} is not a readable image"):
        data.load("folder", data_dir=folder)


def test_images_beside_the_classes_are_refused(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "train" / "0.png")
    with pytest.raises(ValueError, match=r"train/0\.png lies in no class"):
        data.load("folder", data_dir=folder)


def test_links_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    expected = data.load("folder", data_dir=folder)
    linked = tmp_path_factory.mktemp("linked")
    for split in ("train", "val"):
        (linked / split).mkdir()
        (linked / split / "ant").symlink_to(folder / split / "ant")
        (linked / split / "bee").mkdir()
        for file in (folder / split / "bee").iterdir():
            (linked / split / "bee" / file.name).symlink_to(file)
    assert data.load("folder", data_dir=linked).train.images.equal(expected.train.images)
    (linked / "val" / "bee" / "9.png").symlink_to(linked / "nowhere.png")
    with pytest.raises(ValueError, match=r"9\.png is not a readable image: .*No such file"):
        data.load("folder", data_dir=linked)
    (linked / "val" / "bee" / "round").symlink_to(linked / "val" / "bee")
    with pytest.raises(ValueError, match="round is a link to a folder that it lies in"):
        data.load("folder", data_dir=linked)


@pytest.mark.parametrize("name", ["test", "VAL", "valid", "Validation"])
def test_names_of_the_folder_of_test_images(folder: Path, name: str) -> None:
    (folder / "train").rename(folder / "Train")
    (folder / "val").rename(folder / name)
    assert len(data.load("folder", data_dir=folder).test) == 4


def test_classes_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("10", "9", "Ant", "ant", "ä b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    assert data.load("folder", data_dir=tmp_path).classes == ("10", "9", "Ant", "ant", "ä b")


# Arguments


def test_unknown_names_and_arguments() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'mnist'; available: cifar10, cifar100"):
        data.load("mnist")
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        data.load(image_size=0)
    with pytest.raises(ValueError, match="'embedded' is inside the package and takes no data_dir"):
        data.load(data_dir=".")


def test_held_out_images_are_training_images_that_are_no_longer_trained_on() -> None:
    whole = data.load("embedded", train_limit=200, test_limit=10)
    part = data.hold_out(whole, 50)
    assert torch.equal(torch.bincount(part.test.labels), torch.full((10,), 5))
    rows = {bytes(image.numpy()) for image in whole.train.images}
    kept = {bytes(image.numpy()) for image in part.train.images}
    held = {bytes(image.numpy()) for image in part.test.images}
    assert kept | held == rows
    assert not kept & held
    with pytest.raises(ValueError, match="validation must be from 1 to 199, got 200"):
        data.hold_out(whole, 200)
