"""The streaming engine: units, one batch through them, and the learner that users hold."""

from .learner import Learner, StepReport
from .units import Plan, Unit, make_plan

__all__ = ["Learner", "Plan", "StepReport", "Unit", "make_plan"]
