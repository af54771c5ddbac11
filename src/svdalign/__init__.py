"""Train neural networks without a global backward pass, in the SVD space of their weights."""

from .engine import Learner, StepReport
from .factors import SVDConv2d, SVDLinear, factorize

__version__ = "0.1.0"

__all__ = ["Learner", "SVDConv2d", "SVDLinear", "StepReport", "__version__", "factorize"]
