"""Image data, and batches of it.

:func:`load` decodes a data set once into tensors on the device, or leaves it on disk and has worker
processes decode it in every epoch. :func:`batches` gives augmented and normalised batches of it,
reproducibly from any batch of any epoch.
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
