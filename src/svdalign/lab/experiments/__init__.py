"""Comparisons of methods, and the reports drawn from them."""

from .compare import CompareConfig, Comparison
from .methods import METHODS, Method

__all__ = ["METHODS", "CompareConfig", "Comparison", "Method"]
