"""The paper's figures and tables as data, and what runs and draws them."""

from .reproduction import ReproduceConfig, Reproduction
from .specs import EXPERIMENTS, SCALES, Experiment, Row

__all__ = ["EXPERIMENTS", "SCALES", "Experiment", "ReproduceConfig", "Reproduction", "Row"]
