"""Train, and write what was measured into the run's folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..costs import inference_macs, parameter_count
from ..data import ImageData
from .build import example_batch
from .checkpoint import save_checkpoint
from .config import RunConfig
from .loggers import make_logger, numbers
from .options import to_yaml
from .progress import Progress
from .provenance import provenance
from .record import Record
from .trainer import Trainer


def train(
    trainer: Trainer,
    record: Record,
    *,
    name: str = "",
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    resume: bool = False,
) -> dict[str, Any]:
    """Run ``trainer`` to its end and leave a run folder; return what its ``results.json`` holds.

    ``stop`` is called after every step. When it returns True the run ends with ``status``
    ``"interrupted"`` and the results so far. ``name`` stands for the run in ``progress``.
    A checkpoint is written after every epoch, every ``checkpoint_seconds`` within one, and when the
    run is interrupted. ``resume``: ``trainer`` comes from the folder's checkpoint
    (:func:`load_checkpoint`). The config's ``logger`` is told every epoch as well. Of several
    processes the first one alone writes.
    """
    started = time.time()
    name = name or trainer.config.rule
    keeps = trainer.team.rank == 0
    if keeps and resume:
        record.restart(trainer.history, to_yaml(absolute(trainer.config)))
    elif keeps:
        record.start(to_yaml(absolute(trainer.config)))
    if not resume:
        torch.manual_seed(trainer.config.seed)  # for random layers such as dropout
    logger = make_logger(
        trainer.config.logger if keeps else None,
        record.folder,
        name,
        dataclasses.asdict(trainer.config),
    )
    saved, stopping = time.monotonic(), False

    def log(row: dict[str, Any]) -> None:
        logger.log(row["epoch"], numbers(row))

    def save() -> None:
        nonlocal saved
        save_checkpoint(trainer, record.checkpoint_path)
        saved = time.monotonic()

    def on_step() -> None:
        nonlocal stopping
        due = time.monotonic() - saved >= trainer.config.checkpoint_seconds
        stopping, due = trainer.team.agree(stop(), due)
        if due:
            save()

    def on_epoch(row: dict[str, Any]) -> None:
        if keeps:
            record.append_metrics(row)
            record.write_unreadable(trainer.data.unreadable)
        if not trainer.diverged:  # a run that diverged keeps its last good checkpoint
            save()
        log(row)

    status = "failed"
    try:
        for row in trainer.history:
            log(row)
        status = trainer.run(
            name=name,
            progress=progress,
            on_step=on_step,
            on_epoch=on_epoch,
            stop=lambda: stopping,
        )
    finally:
        logger.close(status)
    if status == "interrupted":
        save()
    with trainer.team.whole():
        results = _summary(trainer, status, time.time() - started)
    if keeps:
        record.write_unreadable(trainer.data.unreadable)
        record.write_results(results)
    return results


def absolute(config: RunConfig) -> RunConfig:
    """The config with an absolute path to the data, so that it is valid in every folder."""
    where = config.data_dir and str(Path(config.data_dir).absolute())
    return dataclasses.replace(config, data_dir=where)


def describe(data: ImageData) -> dict[str, Any]:
    """The description of the data in results. ``train_of``, ``test_of``: how many images the data
    set has, of which these were taken."""
    train_of, test_of = data.whole or (len(data.train), len(data.test))
    return {
        "name": data.name,
        "train": len(data.train),
        "test": len(data.test),
        "train_of": train_of,
        "test_of": test_of,
        "classes": data.num_classes,
        "shape": list(data.train.shape),
    }


def _summary(trainer: Trainer, status: str, wall_seconds: float) -> dict[str, Any]:
    """The results of a run, and everything that is needed to repeat it."""
    config, model = trainer.config, trainer.learner.model
    unfinished = None
    if trainer.batch:
        running = trainer.running()
        unfinished = {
            "steps": trainer.batch,
            "loss": running.loss,
            "train_accuracy": running.accuracy,
        }
    return {
        "status": status,
        "accuracy": trainer.history[-1]["test_accuracy"] if trainer.history else None,
        "seed": config.seed,
        "data": describe(trainer.data),
        "config": dataclasses.asdict(config),
        "history": trainer.history,
        "unfinished_epoch": unfinished,
        "unreadable_images": len(trainer.data.unreadable),
        "parameters": parameter_count(model),
        "macs": inference_macs(model, example_batch(config, trainer.data)),
        "train_seconds": trainer.seconds + trainer.epoch_seconds,
        "wall_seconds": wall_seconds,
        **provenance(config.device),
    }
