"""Train neural networks without a global backward pass, in the SVD space of their weights."""

from . import _interrupt, parallel, rules  # noqa: F401  (_interrupt: before torch comes)
from .alignment import alignment
from .engine import Learner, StepReport
from .export import compact
from .factors import Muon, RankCut, SVDConv2d, SVDLinear, factorize, fuse, reduce_rank
from .fitting import Choices, plan
from .storage import load, save

__version__ = "0.1.0"

__all__ = [
    "Choices",
    "Learner",
    "Muon",
    "RankCut",
    "SVDConv2d",
    "SVDLinear",
    "StepReport",
    "__version__",
    "alignment",
    "compact",
    "factorize",
    "fuse",
    "load",
    "parallel",
    "plan",
    "reduce_rank",
    "rules",
    "save",
]
