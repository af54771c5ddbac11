"""Comparisons of methods, and the reports drawn from them."""

from ..methods import METHODS, Method
from .compare import CompareConfig, Comparison

__all__ = ["METHODS", "CompareConfig", "Comparison", "Method"]
