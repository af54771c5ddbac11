"""Image data as tensors on the device, and batches of them.

:func:`load` decodes a data set once; :func:`batches` gathers, augments and normalises whole
batches on the device, reproducibly from any batch of any epoch.
"""

from ._augment import Augment
from ._batches import batches, num_batches
from ._load import available, hold_out, load, sizes
from ._types import ImageData, Images, Split

__all__ = [
    "Augment",
    "ImageData",
    "Images",
    "Split",
    "available",
    "batches",
    "hold_out",
    "load",
    "num_batches",
    "sizes",
]
