"""From an image file to 8-bit pixels: upright, with the full range of values, at the wanted
size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

Box = tuple[float, float, float, float]  # left, top, right, bottom

_SIDEWAYS = (5, 6, 7, 8)  # the EXIF orientations that swap width and height
_BITS_PER_SAMPLE = 258  # a TIFF tag
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # what Pillow reads from these into mode I is 16 bits wide


class UnreadableImageError(ValueError):
    """An image that cannot be decoded, or not without guessing its range."""


def centre(width: int, height: int) -> Box:
    """The largest square in the middle of an image."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def decode(
    open: Callable[[], Image.Image],
    where: str,
    mode: str,
    size: int | None = None,
    window: Callable[[int, int], Box] = centre,
) -> npt.NDArray[np.uint8]:
    """Pixels of one image, ``(C, H, W)``; of a file with several, its first.

    Args:
        open: gives the image, as ``Image.open`` does.
        where: what the image is called in an error.
        mode: ``L`` or ``RGB``.
        size: height and width to bring the window to; None: the whole image as it is.
        window: from the image's width and height to the part of it that is wanted.

    Raises:
        UnreadableImageError: if it cannot be decoded; says ``where`` and why.
    """
    try:
        # Pillow warns of odd EXIF data and of large images: they are read all the same.
        with warnings.catch_warnings(action="ignore"), open() as image:
            return _decode(image, mode, size, window)
    except Exception as error:  # damaged files make decoders raise almost anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is of no known format" if unknown else error
        raise UnreadableImageError(f"{where} is not a readable image: {reason}") from error


def _decode(
    image: Image.Image, mode: str, size: int | None, window: Callable[[int, int], Box]
) -> npt.NDArray[np.uint8]:
    width, height = image.size
    if image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS:
        width, height = height, width
    box = (0.0, 0.0, width, height) if size is None else window(width, height)
    if size is not None:
        # Have JPEG decoded at half, a quarter or an eighth of its size where that is enough.
        shrink = min(box[2] - box[0], box[3] - box[1]) / size
        image.draft(None, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    plain = _eight_bits(image, mode)
    if size is not None:
        plain = _resize(plain, box, (width, height), size)
    return np.atleast_3d(np.asarray(plain)).transpose(2, 0, 1)


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """``image`` in ``mode``, its range scaled to 0 to 255; what is transparent lies on white."""
    top: float | None = None  # the largest value, of images of more than 8 bits
    if image.mode.startswith("I;16"):
        top = 2 ** getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0] - 1
    elif image.mode == "I":
        if image.format not in _SIXTEEN_BIT_FORMATS:
            raise ValueError("32-bit pixels have no known range; save them with 8 or 16 bits")
        top = 2**16 - 1
    elif image.mode == "F":
        top = 1.0
    if top is not None:
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= top):  # NaN included
            raise ValueError(
                f"its pixels go from {values.min()} to {values.max()}, but must lie from 0 to {top}"
            )
        return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _resize(image: Image.Image, box: Box, full: tuple[int, int], size: int) -> Image.Image:
    """Crop ``image`` to ``box``, given in pixels of an image of size ``full``, and resize it to a
    square, by area when it shrinks."""
    across, down = image.width / full[0], image.height / full[1]
    box = box[0] * across, box[1] * down, box[2] * across, box[3] * down
    if image.size == (size, size) and box == (0, 0, size, size):
        return image
    shrinks = min(box[2] - box[0], box[3] - box[1]) >= size
    filter = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return image.resize((size, size), filter, box=box)
