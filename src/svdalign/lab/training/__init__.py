"""Training runs: what they are, how they go, and what they leave behind."""

from .build import build_learner, build_model, evaluate, load_data, make_rule
from .checkpoint import load_checkpoint, load_run, save_checkpoint
from .config import JobConfig, RunConfig
from .record import Record
from .run import train
from .trainer import Trainer

__all__ = [
    "JobConfig",
    "Record",
    "RunConfig",
    "Trainer",
    "build_learner",
    "build_model",
    "evaluate",
    "load_checkpoint",
    "load_data",
    "load_run",
    "make_rule",
    "save_checkpoint",
    "train",
]
