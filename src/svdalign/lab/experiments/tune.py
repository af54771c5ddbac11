"""The learning rate of each method, found with the same effort for all on held-out images."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..runner import Run, Sweep, SweepWork
from ..training.config import JobConfig
from ..training.options import fields_of, option, to_yaml
from ..training.progress import Progress
from ..training.provenance import provenance
from .search import at_edge, search
from .variants import Entry, MethodsConfig


@dataclass(frozen=True, kw_only=True)
class TuneConfig(MethodsConfig):
    """search"""

    rates: list[float] = option([5e-3, 1e-2, 2e-2], "learning rates to begin with")
    tries: int = option(5, "how many rates each method tries in all")
    seeds: int = option(1, "runs at each rate", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation is None:
            raise ValueError("validation must say how many images to hold out, got null")
        if len(set(self.rates)) < 2 or min(self.rates) <= 0:
            raise ValueError(f"rates must be at least two positive numbers, got {self.rates}")
        least = max(3, len(set(self.rates)))
        if self.tries < least:
            raise ValueError(f"tries must be at least {least}, got {self.tries}")
        if fixed := [variant.name for variant in self.variants if "lr" in variant.settings]:
            raise ValueError(f"lr is searched, but settings or changes give it: {'; '.join(fixed)}")
        for variant in self.variants:
            self.runs(variant, self.rates[0])  # names every mistake in its settings

    def runs(self, variant: Entry, rate: float) -> list[Run]:
        """The runs of a variant at a rate, a seed each."""
        label = f"{variant.label}, lr {rate:g}"
        return [
            Run(
                f"{variant.folder}-{rate:g}-seed{seed}",
                variant.config(self, seed=seed, lr=rate),
                label,
                f"{label}, seed {seed}" if self.seeds > 1 else label,
            )
            for seed in range(self.seeds)
        ]


class _StoppedError(Exception):
    """The search was interrupted."""


class Tuning(SweepWork):
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
            run
            for variant in config.variants
            for rate in config.rates
            for run in config.runs(variant, rate)
        ]
        self._sweep = Sweep(folder, runs, kind="tune", config=to_yaml(config), overwrite=overwrite)
        self._sweep.check()

    @property
    def pending(self) -> int:
        """How many runs the search still takes."""
        planned = len(self.config.variants) * self.config.tries * self.config.seeds
        return planned - len(self._sweep.runs) + self._sweep.pending

    def run(
        self, *, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """Search; return what ``results.json`` holds: accuracies by method and rate."""
        config, top = self.config, self._sweep.top
        content: dict[str, Any] = {
            "status": "finished",
            "job": fields_of(JobConfig, config),
            "settings": {v.name: dict(v.settings) for v in config.variants if v.settings},
            "seeds": config.seeds,
            "labels": {variant.name: variant.label for variant in config.variants},
            "accuracy": {},
            "at_edge": [],
            **provenance(config.device),
        }
        with top.locked():
            top.write_config(to_yaml(config))
            for variant in config.variants:
                measure = partial(self._measure, variant, progress, stop)
                try:
                    found = search(measure, config.rates, config.tries)
                except _StoppedError:
                    content["status"] = "interrupted"
                    break
                content["accuracy"][variant.name] = {f"{rate:g}": found[rate] for rate in found}
                content["at_edge"] += [variant.name] * at_edge(found)
                top.write_results(content)
            top.write_results(content)
        return content

    def _measure(
        self,
        variant: Entry,
        progress: Progress | None,
        stop: Callable[[], bool],
        rate: float,
    ) -> float:
        """Mean accuracy on the held-out images; a run that diverged counts as 0."""
        runs = self.config.runs(variant, rate)
        self._sweep.add(runs)
        results = self._sweep.run(runs, progress=progress, stop=stop)
        ended = [r for r in results.values() if r["status"] != "interrupted"]
        if len(ended) < len(runs):
            raise _StoppedError
        return statistics.mean(0.0 if r["status"] == "diverged" else r["accuracy"] for r in ended)
