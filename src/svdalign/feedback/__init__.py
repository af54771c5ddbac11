"""How an error comes back to a unit: feedback matrices, and pooling that shrinks a feature map."""

from .matrices import Feedback, GaussianFeedback, StructuredFeedback
from .pooling import grid_size, pool, pooled_size
from .widened import WidenedFeedback

__all__ = [
    "Feedback",
    "GaussianFeedback",
    "StructuredFeedback",
    "WidenedFeedback",
    "grid_size",
    "pool",
    "pooled_size",
]
