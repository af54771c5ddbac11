"""A folder in ImageNet's layout with what the real one holds, and what people leave in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

#: Files that no decoder can read, relative to the folder of a split; there are none in ``val``.
UNREADABLE = ("n00000000/truncated.JPEG", "n00000001/page.jpg")


def colour(label: int, classes: int) -> np.ndarray:
    """What all images of a class look like, but for noise."""
    return np.array([40 + 200 * label // classes, 120, 240 - 200 * label // classes])


def make(
    folder: Path, classes: int = 4, images: int = 6, largest: int = 400, *, odd: bool = True
) -> Path:
    """``train`` and ``val`` (half as many) of JPEG files from 30 pixels to ``largest``; ``odd``:
    with one image of each unusual kind, :data:`UNREADABLE` files and hidden folders."""
    for split, count in (("train", images), ("val", max(1, images // 2))):
        for label in range(classes):
            place = folder / split / f"n{label:08d}"
            place.mkdir(parents=True)
            for i in range(count):
                _image(label, classes, i, largest).save(place / f"{place.name}_{i}.JPEG")
    if odd:
        _add_odd(folder / "train", classes, largest)
    return folder


def _image(label: int, classes: int, number: int, largest: int) -> Image.Image:
    draw = np.random.default_rng((label, number))
    width, height = np.exp(draw.uniform(np.log(30), np.log(largest), 2)).astype(int)
    noise = draw.integers(-30, 31, (height // 8 + 1, width // 8 + 1, 3))
    pixels = (colour(label, classes) + noise).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((int(width), int(height)))


def _add_odd(train: Path, classes: int, largest: int) -> None:
    first, second = train / "n00000000", train / "n00000001"
    image = _image(0, classes, 1000, largest)
    image.convert("L").save(first / "grey.JPEG")
    image.convert("CMYK").save(first / "cmyk.JPEG")
    image.quantize(16).save(first / "palette.png")
    image.convert("RGBA").save(first / "transparent.PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(first / "turned.jpg", exif=exif)
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(second / "sixteen.png")
    frames = [_image(1, classes, 1001 + i, 100).resize((50, 40)) for i in range(3)]
    frames[0].save(second / "animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (largest, 30), tuple(colour(1, classes))).save(second / "wide.jpeg")
    (second / "deeper").mkdir()
    image.save(second / "deeper" / "nested.JPEG")
    for hidden in (train / ".cache", second / ".thumbnails"):
        hidden.mkdir()
        image.save(hidden / "0.png")
    (second / ".DS_Store").write_bytes(b"junk")
    whole = (first / "n00000000_0.JPEG").read_bytes()
    (train / UNREADABLE[0]).write_bytes(whole[: len(whole) * 2 // 3])
    (train / UNREADABLE[1]).write_text("<!DOCTYPE html><html><title>404</title></html>")
