"""The streaming engine: units, one batch through them, and the learner that users hold."""

from .learner import Learner, StepReport
from .plan import make_plan
from .units import Plan, Unit

__all__ = ["Learner", "Plan", "StepReport", "Unit", "make_plan"]
