"""Training runs in folders: the one way in which every command and every sweep trains.

A sweep is a list of runs and a folder. What is finished is not run again, what was interrupted or
killed goes on from its checkpoint, and nothing is replaced unless it is asked for
(:meth:`svdalign.lab.training.Record.state`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine import Learner
from .data import ImageData
from .reports import run_page
from .training.build import load_data, prepare_machine
from .training.checkpoint import load_checkpoint
from .training.config import DataConfig, RunConfig
from .training.options import fields_of
from .training.processes import tell
from .training.progress import Progress
from .training.record import Record, new_folder, unfinished
from .training.run import train
from .training.trainer import build_trainer

_NONE = {"status": "interrupted"}
_Measure = Callable[[Learner], dict[str, Any]]


def follow(config: RunConfig, *, stop: Callable[[], bool] = lambda: False) -> str:
    """Train together with the first process, which keeps the run's folder (:class:`Sweep`). Returns
    how the run ended."""
    news = tell()
    if news is None:  # it has refused the run, and said why
        return "refused"
    record, state = Record(news[0]), news[1]
    prepare_machine(config)
    trainer = build_trainer(config, load_data(config))
    if state == "resume":
        load_checkpoint(trainer, record.checkpoint_path)
    trainer.join()
    results = train(trainer, record, stop=stop, resume=state == "resume")
    return str(results["status"])


@dataclass(frozen=True)
class Run:
    """One training run.

    ``name``: its folder within the sweep's, "" for that itself. ``label``: the title of its report.
    ``shown``: its name in the display of progress, ``label`` unless given. ``measure``: called with
    config and data, returns the function that measures the learner after each epoch.
    """

    name: str
    config: RunConfig
    label: str
    shown: str = ""
    measure: Callable[[RunConfig, ImageData], _Measure] | None = None


class Sweep:
    """Runs in a folder. Creating one only reads the folder.

    ``folder``: None for ``runs/KIND-NNN``: the latest that was begun with ``config`` and is not
    finished, or else a new one, made when it is first needed. ``kind``: which command the folder
    belongs to; "train" for a single run. ``config``: the command's config as YAML. ``results``: the
    results of each run, by its name. ``overwrite``: start all runs over. ``longer``: an existing
    run may be given more epochs than it was started with.
    Raises ValueError for a folder that holds something else, for another run where one of these
    belongs, and for a run that another process is busy with.
    """

    def __init__(
        self,
        folder: str | Path | None,
        runs: Iterable[Run],
        *,
        kind: str = "train",
        config: str | None = None,
        overwrite: bool = False,
        longer: bool = False,
    ) -> None:
        if folder is None and config is not None and not overwrite:
            folder = unfinished("runs", kind, config)
        self._folder = None if folder is None else Path(folder)
        self._kind = kind
        self.runs: list[Run] = []
        self.results: dict[str, dict[str, Any]] = {}
        self._overwrite = overwrite
        self._longer = longer
        self._data: dict[str, ImageData] = {}
        if folder is not None:
            self.top.check()
            self.top.check_free()
        self.add(runs)

    def add(self, runs: Iterable[Run]) -> None:
        """Take in more runs; those that are there already are left out."""
        known = {run.name for run in self.runs}
        for run in runs:
            if run.name in known:
                continue
            self.runs.append(run)
            if self._folder is None:
                continue
            record = self.record(run)
            record.check_free()
            if record.state(run.config, overwrite=self._overwrite, longer=self._longer) == "done":
                self.results[run.name] = record.results() or {}

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        if self._folder is None:
            self._folder = new_folder("runs", self._kind)
        return self._folder

    @property
    def top(self) -> Record:
        """The sweep's own files."""
        return Record(self.folder, self._kind)

    @property
    def pending(self) -> int:
        """How many runs are not finished."""
        return sum(self._is_pending(run) for run in self.runs)

    def record(self, run: Run) -> Record:
        """The folder of one run."""
        return Record(self.folder / run.name)

    def check(self) -> None:
        """Build what the runs need, to find all mistakes before any training; raises ValueError. Of
        runs that differ only in the seed it builds one, and every one that goes on from a
        checkpoint."""
        seen: list[RunConfig] = []
        for run in self.runs:
            alike = dataclasses.replace(run.config, seed=0)
            goes_on = self._folder is not None and self.record(run).checkpoint_path.exists()
            if self._is_pending(run) and (goes_on or alike not in seen):
                seen.append(alike)
                prepare_machine(run.config)
                trainer = build_trainer(run.config, self.data(run.config))
                if goes_on and not self._overwrite:
                    load_checkpoint(trainer, self.record(run).checkpoint_path)

    def data(self, config: RunConfig) -> ImageData:
        """The data of a run; the last two data sets stay in memory."""
        key = json.dumps([*fields_of(DataConfig, config).values(), config.device])
        if key not in self._data:
            if len(self._data) > 1:
                del self._data[next(iter(self._data))]
            self._data[key] = load_data(config)
        return self._data[key]

    def run(
        self,
        runs: Iterable[Run] | None = None,
        *,
        progress: Progress | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, dict[str, Any]]:
        """Do those of ``runs`` (by default all) that are not finished, until ``stop`` returns True.
        Returns the results that there are, by name."""
        runs = self.runs if runs is None else list(runs)
        for run in runs:
            if self._is_pending(run):
                if stop():
                    break
                self.results[run.name] = self._train(run, progress or Progress(), stop)
        return {run.name: self.results[run.name] for run in runs if run.name in self.results}

    def _is_pending(self, run: Run) -> bool:
        return bool(self.results.get(run.name, _NONE)["status"] == "interrupted")

    def _train(self, run: Run, progress: Progress, stop: Callable[[], bool]) -> dict[str, Any]:
        record, config = self.record(run), run.config
        prepare_machine(config)
        data = self.data(config)
        with record.locked():  # from here on nobody else changes what is in the folder
            fresh = self._overwrite and run.name not in self.results
            state = record.state(config, overwrite=fresh, longer=self._longer)
            if state == "done":
                return record.results() or {}
            trainer = build_trainer(config, data)
            if run.measure is not None:
                trainer.measure = run.measure(config, data)
            if state == "resume":
                load_checkpoint(trainer, record.checkpoint_path)
            if config.parallel is not None:
                tell((record.folder, state))
                trainer.join()
            results = train(
                trainer,
                record,
                name=run.shown or run.label,
                progress=progress,
                stop=stop,
                resume=state == "resume",
            )
            record.report_path.write_text(run_page(results, run.label), encoding="utf-8")
        return results


class SweepWork:
    """Base class of the work of commands that do a sweep."""

    _sweep: Sweep

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self._sweep.folder

    @property
    def pending(self) -> int:
        """How many runs are still to be done."""
        return self._sweep.pending
