"""Images of every kind that Pillow opens: read for what a viewer shows, or refused by name."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from svdalign.lab.data._pixels import UnreadableImageError, decode

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4  # different in every pixel
LEVELS = RAMP.astype(np.float64) / 255


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def read(blob: bytes, mode: str = "RGB", **options: Any) -> np.ndarray[Any, Any]:
    return decode(lambda: Image.open(io.BytesIO(blob)), "the file", mode, **options)


def colour(blob: bytes) -> list[int]:
    """The one colour of an image."""
    pixels = read(blob).reshape(3, -1)
    assert (pixels == pixels[:, :1]).all()
    return pixels[:, 0].tolist()


@pytest.mark.parametrize(
    ("pixels", "format"),
    [
        ((LEVELS * 65535).round().astype(np.uint16), "PNG"),
        ((LEVELS * 65535).round().astype(np.uint16), "TIFF"),
        ((LEVELS * 65535).round().astype(np.int32), "PPM"),
        (LEVELS.astype(np.float32), "TIFF"),
        (LEVELS.astype(np.float32), "PPM"),
        (RAMP, "PNG"),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_any_depth_is_scaled_to_eight_bits(
    pixels: np.ndarray[Any, Any], format: str, mode: str
) -> None:
    result = read(encoded(Image.fromarray(pixels), format), mode)
    assert result.shape == (len(mode), 8, 8)
    assert (result == RAMP).all()


def test_twelve_bits_in_a_tiff_are_twelve_bits() -> None:
    values = (LEVELS * 4095).round().astype(np.uint16)
    high, low = values[:, 0::2].astype(int), values[:, 1::2].astype(int)
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], -1).astype(np.uint8)
    # A header and one strip: width, height, 12 bits, uncompressed, black is 0, where, 8 rows, size.
    tags = [(256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 110), (278, 8), (279, 96)]
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little")
        for tag, value in tags
    )
    blob = b"II*\0\x08\0\0\0" + len(tags).to_bytes(2, "little") + entries + bytes(4)
    blob = blob.ljust(110, b"\0") + packed.tobytes()
    assert (read(blob, "L") == RAMP).all()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((4, 4), 70_000, np.int32), "32-bit pixels have no known range"),
        (np.full((4, 4), 255, np.float32), r"from 255\.0 to 255\.0, but must lie from 0 to 1"),
        (np.full((4, 4), -0.1, np.float32), "must lie from 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), "must lie from 0 to 1"),
    ],
)
def test_what_has_no_known_range_is_refused(pixels: np.ndarray[Any, Any], message: str) -> None:
    with pytest.raises(
        UnreadableImageError, match=f"the file is not a readable image: .*{message}"
    ):
        read(encoded(Image.fromarray(pixels), "TIFF"))


def palette(*colours: tuple[int, int, int]) -> Image.Image:
    """All pixels are of the last colour."""
    image = Image.new("P", (8, 8), len(colours) - 1)
    image.putpalette([value for entry in colours for value in entry])
    return image


BLACK, ORANGE = (0, 0, 0), (200, 100, 50)


@pytest.mark.parametrize(
    ("blob", "expected"),
    [
        (encoded(palette(BLACK, ORANGE)), [200, 100, 50]),
        (encoded(palette(BLACK, ORANGE), transparency=0), [200, 100, 50]),
        (encoded(palette(BLACK, ORANGE), transparency=1), [255, 255, 255]),
        (encoded(palette(BLACK, ORANGE), transparency=bytes([0, 255])), [200, 100, 50]),
        (encoded(palette(BLACK, ORANGE), transparency=bytes([255, 0])), [255, 255, 255]),
        (encoded(palette(BLACK, ORANGE), "GIF"), [200, 100, 50]),
        (encoded(Image.new("1", (8, 8), 1)), [255, 255, 255]),
        (encoded(Image.new("LA", (8, 8), (100, 255))), [100, 100, 100]),
        (encoded(Image.new("LA", (8, 8), (100, 0))), [255, 255, 255]),
        (encoded(Image.new("RGBA", (8, 8), (10, 20, 30, 255))), [10, 20, 30]),
        (encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), [255, 255, 255]),
        (encoded(Image.new("RGBA", (8, 8), (0, 100, 255, 51))), [204, 224, 255]),
        (encoded(Image.new("L", (8, 8), 7), transparency=7), [255, 255, 255]),
        (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), [255, 0, 0]),
        (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), [255, 0, 0]),
    ],
)
def test_every_mode_is_what_it_looks_like_on_white(blob: bytes, expected: list[int]) -> None:
    assert colour(blob) == pytest.approx(expected, abs=1)


def test_several_images_in_a_file_are_its_first() -> None:
    frames = [Image.new("L", (8, 8), value) for value in (40, 200)]
    for format in ("GIF", "TIFF", "WEBP"):
        blob = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert colour(blob) == pytest.approx([40, 40, 40], abs=2)


# What EXIF says lies at the top and at the left of the stored rows and columns.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a.T[:, ::-1],
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: a.T[::-1],
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_images_are_the_right_way_up(orientation: int, format: str) -> None:
    stored = RAMP[:4]
    exif = Image.Exif()
    exif[0x0112] = orientation
    blob = encoded(Image.fromarray(stored), format, exif=exif)
    assert (read(blob, "L")[0] == TURNS[orientation](stored)).all()
    sixteen = encoded(Image.fromarray(stored.astype(np.uint16) * 257), format, exif=exif)
    assert (read(sixteen, "L")[0] == TURNS[orientation](stored)).all()


def test_a_window_is_meant_in_the_image_as_it_is_seen() -> None:
    pixels = np.zeros((80, 160), np.uint8)
    pixels[:, :80] = 240  # the left half; turned by orientation 6 it is the upper
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("PNG", "JPEG"):
        blob = encoded(Image.fromarray(pixels), format, exif=exif)
        seen: list[tuple[int, int]] = []

        def upper(width: int, height: int, seen: Any = seen) -> tuple[float, float, float, float]:
            seen.append((width, height))
            return 0, 0, width, height / 2

        half = read(blob, "L", size=10, window=upper)
        assert seen == [(80, 160)]
        assert half.shape == (1, 10, 10)
        assert (abs(half.astype(int) - 240) <= 2).all()


@pytest.mark.parametrize(
    "exif", [b"MM\0*garbage!!!", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 20]
)
def test_damaged_exif_data_do_not_matter(exif: bytes) -> None:
    blob = encoded(Image.new("RGB", (8, 8), ORANGE), "JPEG", exif=b"Exif\0\0" + exif)
    assert colour(blob) == pytest.approx([200, 100, 50], abs=3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_files_are_refused(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), format)
    assert read(whole).shape == (3, 64, 64)
    for length in (0, 3, len(whole) // 2):
        with pytest.raises(UnreadableImageError, match="the file is not a readable image"):
            read(whole[:length])


def test_what_is_no_image_is_refused() -> None:
    for blob in (b"", b"<!DOCTYPE html><html>404</html>", b"\x89PNG\r\n\x1a\n" + bytes(50)):
        with pytest.raises(UnreadableImageError, match="the file is not a readable image"):
            read(blob)


@pytest.mark.parametrize("side", [60, 224, 500, 1790, 1800])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_large_images_shrink_by_area(side: int, format: str) -> None:
    """A smooth image, whose areas are known: JPEG is decoded at reduced size where that does."""
    y, x = (np.mgrid[:side, : side + 37] + 0.5) / side
    smooth = np.stack([127 + 100 * np.sin(3 * x), 255 * y, 127 + 100 * np.cos(2 * y)], -1)
    image = Image.fromarray(smooth.round().astype(np.uint8))
    blob = encoded(image, format, quality=95)  # which PNG does not heed
    got = read(blob, size=112)
    middle = (np.arange(112) + 0.5) / 112
    across = 3 * (middle + 37 / 2 / side)
    expected = np.stack(
        [
            np.broadcast_to(127 + 100 * np.sin(across), (112, 112)),
            np.broadcast_to(255 * middle[:, None], (112, 112)),
            np.broadcast_to(127 + 100 * np.cos(2 * middle[:, None]), (112, 112)),
        ]
    )
    assert abs(got - expected).mean() < 1.5
    assert abs(got - expected).max() < 9
