"""How an error comes back to a unit: feedback matrices, and the pooling of what they read. Imports
the factors, nothing else of the library but its plumbing."""

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
