"""A run's checkpoint: everything that its trainer needs to go on as if it had never stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ... import storage
from .build import build_learner, load_data, prepare_machine
from .config import RunConfig, differences, from_dict
from .record import Record
from .trainer import Trainer

__all__ = ["load_checkpoint", "load_run", "save_checkpoint"]


def load_run(folder: str | Path) -> Trainer:
    """The trainer of the run in ``folder``, as its last checkpoint has it, with its data.

    Raises ValueError or FileNotFoundError for a folder without a run that has a checkpoint.
    """
    record = Record(folder)
    config = from_dict(RunConfig, record.config())
    if not record.checkpoint_path.exists():
        raise ValueError(f"the run in {folder} has no checkpoint yet")
    prepare_machine(config)
    data = load_data(config)
    trainer = Trainer(config, data, build_learner(config, data))
    load_checkpoint(trainer, record.checkpoint_path)
    return trainer


def save_checkpoint(trainer: Trainer, path: str | Path) -> None:
    """Write ``trainer`` to ``path``, all or nothing; :func:`svdalign.load` reads it too."""
    extra = {"config": dataclasses.asdict(trainer.config), "trainer": trainer.state_dict()}
    storage.save(trainer.learner, path, extra=extra)


def load_checkpoint(trainer: Trainer, path: str | Path) -> None:
    """Make ``trainer``, just built from the same config, go on where the saved one stopped.

    Raises FileNotFoundError, and ValueError for a file that is truncated, foreign, of a newer
    format or of another config; ``trainer`` is then left as it was.
    """
    state = storage.load(path)
    extra = state["extra"]
    if not isinstance(extra, dict) or {"config", "trainer"} - extra.keys():
        raise ValueError(f"{path} is a checkpoint of a learner, not of a training run")
    saved = dataclasses.asdict(from_dict(RunConfig, extra["config"]))
    mine = dataclasses.asdict(trainer.config)
    if changed := differences(saved, mine):
        raise ValueError(f"{path} belongs to a run with another config ({changed})")
    storage.restore(trainer.learner, state, path)
    trainer.load_state_dict(extra["trainer"])
