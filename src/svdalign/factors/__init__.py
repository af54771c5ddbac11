"""Weights as ``U diag(s) V^T``: factored layers, how a dense network gets them, how ranks are cut
and how layers are fused with what follows them. Imports nothing of the library but its
plumbing (``_*.py``)."""

from .factorize import Factorization, LayerReport, factorize
from .fuse import fuse
from .fused import FusedConv2d
from .fused_linear import FusedLinear
from .layers import FactoredLayer, Scheme, SVDConv2d, SVDLinear, break_even_rank, factored_layers
from .muon import Muon
from .rank import RankCut, reduce_rank

__all__ = [
    "FactoredLayer",
    "Factorization",
    "FusedConv2d",
    "FusedLinear",
    "LayerReport",
    "Muon",
    "RankCut",
    "SVDConv2d",
    "SVDLinear",
    "Scheme",
    "break_even_rank",
    "factored_layers",
    "factorize",
    "fuse",
    "reduce_rank",
]
