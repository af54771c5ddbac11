"""Checkpoints of runs: all that a trainer needs to continue exactly where it stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import storage
from .build import load_data, prepare_machine
from .config import RunConfig
from .options import from_dict
from .record import MOVABLE, Record, check_resumable
from .same_data import check_same_data
from .trainer import Trainer, build_trainer


def load_run(folder: str | Path) -> Trainer:
    """The trainer of the run in ``folder``, as its last checkpoint has it, with its data.

    Raises ValueError or FileNotFoundError for a folder without a run that has a checkpoint.
    """
    record = Record(folder)
    config = from_dict(RunConfig, record.config())
    if not record.checkpoint_path.exists():
        raise ValueError(f"the run in {folder} has no checkpoint yet")
    prepare_machine(config)
    trainer = build_trainer(config, load_data(config))
    load_checkpoint(trainer, record.checkpoint_path)
    return trainer


def resumed(folder: str | Path, changes: Mapping[str, Any]) -> RunConfig:
    """The config with which the run in ``folder`` goes on: its own, with ``changes``.

    Raises ValueError where there is no run, or for changes that would make it another run.
    """
    there = from_dict(RunConfig, Record(folder).config())
    if wrong := sorted(set(changes) - MOVABLE - {"epochs"}):
        raise ValueError(
            f"--resume goes on with the run's own options; only {', '.join(sorted(MOVABLE))} and "
            f"epochs can be given beside it, got {', '.join(wrong)}"
        )
    here = dataclasses.replace(there, **changes)
    if here.epochs < there.epochs:
        raise ValueError(f"epochs may only grow: the run takes {there.epochs}, got {here.epochs}")
    return here


def save_checkpoint(trainer: Trainer, path: str | Path) -> None:
    """Write ``trainer`` to ``path``, all or nothing; :func:`svdalign.load` reads it too."""
    extra = {
        "config": dataclasses.asdict(trainer.config),
        "data": trainer.data_fingerprint,
        "trainer": trainer.state_dict(),
    }
    trainer.team.save(Path(path), extra)


def load_checkpoint(trainer: Trainer, path: str | Path) -> None:
    """Make ``trainer``, just built from the same config, go on where the saved one stopped.

    Raises FileNotFoundError, and ValueError for a file that is truncated, foreign, of a newer
    format, of another config or of other data; ``trainer`` is then left as it was.
    """
    state = storage.load(path)
    extra = state["extra"]
    if not isinstance(extra, dict) or {"config", "trainer"} - extra.keys():
        raise ValueError(f"{path} is a checkpoint of a learner, not of a training run")
    try:
        check_resumable(from_dict(RunConfig, extra["config"]), trainer.config)
    except ValueError as error:
        raise ValueError(f"{path} belongs to a run with another config: {error}") from None
    try:
        if "data" in extra:  # not in checkpoints of 0.1.0
            check_same_data(extra["data"], trainer.data_fingerprint)
    except ValueError as error:
        raise ValueError(
            f"{path} belongs to a run on other data: {error}; if they were moved, give --data-dir "
            "the folder that they are in now"
        ) from None
    storage.restore(trainer.learner, state, path)
    trainer.load_state_dict(extra["trainer"])
