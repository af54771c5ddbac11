"""The paper's figures and tables as data, and what runs and draws them."""

from .reproduction import ReproduceConfig, Reproduction
from .specs import EXPERIMENTS, SCALES, Experiment, Variant

__all__ = ["EXPERIMENTS", "SCALES", "Experiment", "ReproduceConfig", "Reproduction", "Variant"]
