"""What a user sees while training: a live display on a terminal, one line an epoch elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from .config import evaluated_on

if TYPE_CHECKING:
    from .trainer import Trainer

#: Seconds between two readings of the running loss, each of which waits for the device.
_REFRESH_SECONDS = 0.25


class Progress:
    """Base class: it is called at each run's start, steps, epochs and end, and shows nothing. A
    context manager."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, name: str, trainer: Trainer) -> None:
        """Called when a run begins or goes on."""

    def step(self, trainer: Trainer) -> None:
        """Called after each step."""

    def epoch(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Called after each epoch with its row of ``history``."""

    def end(self, trainer: Trainer, status: str) -> None:
        """It has ended."""

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """While active, says that ``what`` is being done."""
        yield


class PlainProgress(Progress):
    """One line an epoch. ``runs``: how many runs there will be, for the time left."""

    def __init__(self, console: Console, runs: int = 1) -> None:
        self._print = console.print
        self._width = 0
        self._runs_left = runs
        self._name = ""
        self._started = time.perf_counter()
        self._steps = 0

    def start(self, name: str, trainer: Trainer) -> None:
        self._name = name
        self._runs_left -= 1

    def step(self, trainer: Trainer) -> None:
        self._steps += 1

    def epoch(self, trainer: Trainer, row: dict[str, Any]) -> None:
        total = trainer.total_steps
        left = total - trainer.global_step + self._runs_left * total
        seconds = (time.perf_counter() - self._started) / max(self._steps, 1) * left
        self._print(
            f"{self._name}  epoch {row['epoch']}/{trainer.config.epochs}  "
            f"{_measured(trainer, row)}  {row['images_per_second']:,.0f} images/s  "
            f"{_clock(seconds)} left",
            highlight=False,
            soft_wrap=True,
        )

    def end(self, trainer: Trainer, status: str) -> None:
        if status != "finished":
            self._print(f"{self._name}  {status} after {trainer.global_step} steps", soft_wrap=True)


class LiveProgress(Progress):
    """A bar for the run with its running loss, accuracy and speed, and one for all ``runs``."""

    def __init__(self, console: Console, runs: int = 1) -> None:
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=None),
            bars.TextColumn("{task.fields[note]}"),
            bars.TimeRemainingColumn(),
            console=console,
            speed_estimate_period=60.0,
            auto_refresh=False,
            expand=True,
        )
        self._runs = runs
        self._all: bars.TaskID | None = None
        self._run: bars.TaskID | None = None
        self._steps = 0
        self._shown = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        task = self._bars.add_task(what, total=None, note="")
        self._bars.refresh()
        try:
            yield
        finally:
            self._bars.remove_task(task)

    def start(self, name: str, trainer: Trainer) -> None:
        total = trainer.total_steps
        if self._all is None and self._runs > 1:
            self._all = self._bars.add_task("all runs", total=total * self._runs, note="")
        self._run = self._bars.add_task(name, total=total, completed=trainer.global_step, note="")
        self._name = name

    def step(self, trainer: Trainer) -> None:
        self._steps += 1
        now = time.perf_counter()
        if now - self._shown >= _REFRESH_SECONDS:
            self._shown = now
            self._update(trainer)

    def epoch(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self._update(trainer, _measured(trainer, row))

    def end(self, trainer: Trainer, status: str) -> None:
        if self._run is not None:
            self._bars.remove_task(self._run)
        history = trainer.history
        last = _measured(trainer, history[-1]) if history else "nothing measured yet"
        mark = ("✓", "green") if status == "finished" else (status, "yellow")
        line = Text.assemble(mark, f" {self._name}  {last}  {_clock(trainer.seconds)}")
        self._bars.print(line, highlight=False)

    def _update(self, trainer: Trainer, note: str | None = None) -> None:
        if note is None:
            running = trainer.running()
            note = (
                f"epoch {trainer.epoch + 1}/{trainer.config.epochs}  loss {running.loss:.3f}  "
                f"accuracy {running.accuracy:.1%}  {trainer.images_per_second:,.0f} images/s"
            )
        assert self._run is not None
        if self._all is not None:
            self._bars.update(self._all, completed=self._steps)
        self._bars.update(self._run, completed=trainer.global_step, note=note, refresh=True)


def progress_for(console: Console, runs: int = 1) -> LiveProgress | PlainProgress:
    """Live on a terminal, plain lines anywhere else."""
    return (LiveProgress if console.is_terminal else PlainProgress)(console, runs)


def _measured(trainer: Trainer, row: dict[str, Any]) -> str:
    train, test = row["train_accuracy"], row["test_accuracy"]
    images = evaluated_on(trainer.config.validation)
    return f"loss {row['loss']:.3f}  train {train:.1%}  {images} {test:.1%}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
