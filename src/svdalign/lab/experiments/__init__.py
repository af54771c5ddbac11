"""Comparisons of methods, searches of rates, profiles, cards, the paper's figures and tables."""

from ..methods import METHODS, Method
from .compare import CompareConfig, Comparison

__all__ = ["METHODS", "CompareConfig", "Comparison", "Method"]
