"""Loggers send the numbers of a run to a tool such as TensorBoard, beside ``metrics.jsonl``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from .._named import import_maker
from .record import finite


class Logger(Protocol):
    """Made as ``Logger(folder, name, config)`` when a run starts or goes on, with the run's folder,
    its name, and its config as plain values. It gets every epoch; those before a resume again."""

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """The :func:`numbers` after ``epoch`` epochs, counted from 1."""

    def close(self, status: str) -> None:
        """The run is ``"finished"``, ``"diverged"``, ``"interrupted"`` or has ``"failed"``."""


class _Nowhere:
    """Logs nothing."""

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None: ...
    def close(self, status: str) -> None: ...


class _TensorBoard:
    """Writes to ``tensorboard/`` in the run's folder: ``tensorboard --logdir RUNS``."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hides what an earlier process wrote here: all epochs are written again.
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=0)
        rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
        self._writer.add_text("config", f"| {name} | |\n| --- | --- |\n{rows}")

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, epoch)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.add_text("status", status)
        self._writer.close()


class _WeightsAndBiases:
    """A run of the project ``svdalign``, or what ``WANDB_PROJECT`` says; its other variables, such
    as ``WANDB_MODE=offline``, hold as well. A run that goes on after a kill is a new one there."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "svdalign")
        self._run = wandb.init(project=project, name=name, dir=str(folder), config=dict(config))

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=epoch)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=int(status != "finished"))


#: By name: the package that has to be installed, and what is made.
LOGGERS: dict[str, tuple[str, Callable[[Path, str, Mapping[str, Any]], Logger]]] = {
    "tensorboard": ("tensorboard", _TensorBoard),
    "wandb": ("wandb", _WeightsAndBiases),
}


def check_logger(name: str | None) -> None:
    """ValueError where ``name`` is no logger, or one whose package is not installed."""
    if name is None:
        return
    if ":" in name:
        import_maker(name)
    elif name not in LOGGERS:
        raise ValueError(
            f"logger must be {', '.join(LOGGERS)} or package.module:Class, got {name!r}"
        )
    elif find_spec(LOGGERS[name][0]) is None:
        raise ValueError(f"logger {name} is not installed: pip install 'svdalign[loggers]'")


def make_logger(logger: str | None, folder: Path, name: str, config: Mapping[str, Any]) -> Logger:
    """The logger of that name, or ``package.module:Class``, for a run."""
    if logger is None:
        return _Nowhere()
    kind = import_maker(logger) if ":" in logger else LOGGERS[logger][1]
    made: Logger = kind(folder, name, config)
    return made


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a row of ``history`` that are finite, those of layers as ``ranks/LAYER``."""
    found: dict[str, float] = {}
    for key, value in finite(row).items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, int | float) and key != "epoch":
            found[key] = value
    return found
