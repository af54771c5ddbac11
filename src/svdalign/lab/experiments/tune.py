"""The learning rate of each method, found with the same effort for all on held-out images."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import methods
from ..methods import DEFAULT, HELP
from ..runner import Run, Sweep
from ..training.config import JobConfig, check_settings, method_config, option, to_yaml
from ..training.progress import Progress
from ..training.record import provenance
from .search import at_edge, search

__all__ = ["TuneConfig", "Tuning"]


@dataclass(frozen=True, kw_only=True)
class TuneConfig(JobConfig):
    """search"""

    rules: list[str] = option(DEFAULT, f"methods whose rates are searched, of {HELP}")
    rates: list[float] = option([5e-3, 1e-2, 2e-2], "learning rates to begin with")
    tries: int = option(5, "how many rates each method tries in all")
    seeds: int = option(1, "runs at each rate")
    settings: dict[str, Any] = option(
        {}, "{method: {field: value}}: what differs for a method, such as units or options"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise ValueError(f"rules must be at least one, each once, got {self.rules}")
        if self.validation is None:
            raise ValueError("validation must say how many images to hold out, got null")
        if len(set(self.rates)) < 2 or min(self.rates) <= 0:
            raise ValueError(f"rates must be at least two positive numbers, got {self.rates}")
        if self.tries < max(3, len(set(self.rates))):
            least = max(3, len(set(self.rates)))
            raise ValueError(f"tries must be at least {least}, got {self.tries}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        object.__setattr__(self, "settings", check_settings(self.settings, self.rules))
        for name in self.rules:
            self.runs(name, self.rates[0])  # names every mistake in a method's own settings

    def runs(self, name: str, rate: float) -> list[Run]:
        """The runs of method ``name`` at a rate, a seed each."""
        label = f"{methods.get(name).label}, lr {rate:g}"
        own = self.settings.get(name)
        return [
            Run(
                f"{name}-{rate:g}-seed{seed}",
                method_config(name, self, seed=seed, lr=rate, settings=own),
                label,
                f"{label}, seed {seed}" if self.seeds > 1 else label,
            )
            for seed in range(self.seeds)
        ]


class _StoppedError(Exception):
    """The search was interrupted."""


class Tuning:
    """A search in a folder: ``METHOD-RATE-seedN`` for each run, and ``results.json``.

    Every method gets the same number of runs. They begin with the rates that are given, go on
    beyond the best while it lies at the edge, and then beside it. The test images are not looked
    at. Creating one raises ValueError for what cannot be run. The same search again goes on.
    """

    def __init__(
        self, config: TuneConfig, folder: str | Path | None = None, *, overwrite: bool = False
    ) -> None:
        self.config = config
        runs = [
            run for name in config.rules for rate in config.rates for run in config.runs(name, rate)
        ]
        self._sweep = Sweep(folder, runs, kind="tune", config=to_yaml(config), overwrite=overwrite)
        self._sweep.check()

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self._sweep.folder

    @property
    def planned(self) -> int:
        """How many runs the search takes in all."""
        return len(self.config.rules) * self.config.tries * self.config.seeds

    def run(
        self, *, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """Search; return what ``results.json`` holds: accuracies by method and rate."""
        config, top = self.config, self._sweep.top
        content: dict[str, Any] = {
            "status": "finished",
            "job": {f.name: getattr(config, f.name) for f in dataclasses.fields(JobConfig)},
            "settings": config.settings,
            "seeds": config.seeds,
            "labels": {name: methods.get(name).label for name in config.rules},
            "accuracy": {},
            "at_edge": [],
            **provenance(config.device),
        }
        with top.locked():
            top.write_config(to_yaml(config))
            for name in config.rules:
                measure = partial(self._measure, name, progress, stop)
                try:
                    found = search(measure, config.rates, config.tries)
                except _StoppedError:
                    content["status"] = "interrupted"
                    break
                content["accuracy"][name] = {f"{rate:g}": found[rate] for rate in found}
                content["at_edge"] += [name] * at_edge(found)
                top.write_results(content)
            top.write_results(content)
        return content

    def _measure(
        self, name: str, progress: Progress | None, stop: Callable[[], bool], rate: float
    ) -> float:
        """Mean accuracy on the held-out images; a run that diverged counts as none right."""
        runs = self.config.runs(name, rate)
        self._sweep.add(runs)
        results = self._sweep.run(runs, progress=progress, stop=stop)
        ended = [r for r in results.values() if r["status"] != "interrupted"]
        if len(ended) < len(runs):
            raise _StoppedError
        return statistics.mean(0.0 if r["status"] == "diverged" else r["accuracy"] for r in ended)
