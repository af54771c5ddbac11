"""The streaming engine: where units end, one batch through them, and the learner. Imports factors,
feedback, losses, rules and the task; alignment, storage and parallel import it."""

from .learner import Learner, StepReport
from .plan import make_plan
from .units import Plan, Unit

__all__ = ["Learner", "Plan", "StepReport", "Unit", "make_plan"]
