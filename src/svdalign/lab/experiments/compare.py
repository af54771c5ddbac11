"""Several methods, each with several seeds, on the same data, network and budget."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import methods
from ..methods import DEFAULT, HELP
from ..reports import comparison_page
from ..runner import Run, Sweep
from ..training.config import (
    JobConfig,
    RunConfig,
    check_settings,
    method_config,
    option,
    to_yaml,
)
from ..training.progress import Progress
from ..training.record import provenance
from ..training.run import describe
from . import costs

__all__ = ["CompareConfig", "Comparison", "summarise"]


@dataclass(frozen=True, kw_only=True)
class CompareConfig(JobConfig):
    """comparison"""

    rules: list[str] = option(DEFAULT, f"methods to compare, of {HELP}")
    seeds: int | list[int] = option(1, "how many seeds, or which: 3 is the same as [0, 1, 2]")
    lr: float | dict[str, float] | None = option(
        None, "one peak learning rate for all, or {method: rate}, in place of each's tuned one"
    )
    settings: dict[str, Any] = option(
        {}, "{method: {field: value}}: what else differs for a method, such as units or options"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rules", "seeds"):
            values = getattr(self, name)
            if values in ([], 0) or (isinstance(values, list) and len(set(values)) < len(values)):
                raise ValueError(f"{name} must be at least one, each once, got {values}")
        if isinstance(self.lr, dict) and (unknown := sorted(set(self.lr) - set(self.rules))):
            raise ValueError(
                f"lr names {', '.join(unknown)}, but rules are {', '.join(self.rules)}"
            )
        object.__setattr__(self, "settings", check_settings(self.settings, self.rules))
        list(self.runs())  # names every mistake in a method's own settings

    def runs(self) -> Iterator[tuple[str, RunConfig]]:
        """(method, config of its run), seed by seed, so that every method has its first early."""
        for seed in self.seeds if isinstance(self.seeds, list) else range(self.seeds):
            for name in self.rules:
                yield name, self.run(name, seed)

    def run(self, name: str, seed: int) -> RunConfig:
        """The run of method ``name``."""
        lr = self.lr.get(name) if isinstance(self.lr, dict) else self.lr
        return method_config(name, self, seed=seed, lr=lr, settings=self.settings.get(name))


class Comparison:
    """A comparison in a folder: ``METHOD-seedN`` for each run, ``results.json``, ``report.html``.

    Creating one checks everything that can be wrong before training starts, and raises ValueError
    then. Runs that the folder holds finished, with the same config, are not run again, unfinished
    ones go on; ``overwrite`` starts over.
    """

    def __init__(
        self, config: CompareConfig, folder: str | Path | None = None, *, overwrite: bool = False
    ) -> None:
        self.config = config
        self._costs: dict[str, Any] = {}
        self._costs_of: dict[str, Any] = {}
        self._fresh = overwrite
        self._runs = {f"{name}-seed{run.seed}": (name, run) for name, run in config.runs()}
        self._sweep = Sweep(
            folder, self._listed(), kind="compare", config=to_yaml(config), overwrite=overwrite
        )
        self._sweep.check()
        self._first = next(iter(config.runs()))[1]
        self.data = self._sweep.data(self._first)

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self._sweep.folder

    @property
    def pending(self) -> int:
        """How many runs are still to be done."""
        return self._sweep.pending

    def measure_costs(self) -> None:
        """Costs of each method, unless the folder has them for these very methods."""
        configs = {name: self.config.run(name, self._first.seed) for name in self.config.rules}
        self._costs_of = {name: _plain(config) for name, config in configs.items()}
        stored = (None if self._fresh else self._sweep.top.results()) or {}
        if stored.get("costs_of") == self._costs_of:
            self._costs = stored["costs"]
            return
        reference = self.config.run("bp-dense", 0)
        self._costs = costs.measure(configs, self.data, reference=reference)

    def run(
        self, *, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """Do what is pending; return what ``results.json`` holds. ``stop`` as in :func:`train`."""
        top = self._sweep.top
        with top.locked():
            top.start(to_yaml(self.config))
            content = self._content(self._sweep.run(progress=progress, stop=stop))
            top.write_results(content)
            top.report_path.write_text(comparison_page(content), encoding="utf-8")
        return content

    def _listed(self) -> Iterator[Run]:
        for key, (name, config) in self._runs.items():
            label = methods.get(name).label
            shown = f"{label}, seed {config.seed}" if self.config.seeds != 1 else label
            yield Run(key, config, label, shown)

    def _content(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        runs = [
            {"method": self._runs[name][0], **{key: result[key] for key in _RUN_KEYS}}
            for name, result in results.items()
        ]
        return {
            "status": "interrupted" if self.pending else "finished",
            "config": dataclasses.asdict(self.config),
            "data": describe(self.data),
            "summary": summarise(self.config.rules, runs, self._costs),
            "runs": runs,
            "costs": self._costs,
            "costs_of": self._costs_of,
            **provenance(self.config.device),
        }


_RUN_KEYS = (
    *("seed", "status", "accuracy", "history", "unfinished_epoch", "config", "wall_seconds"),
    *("parameters", "macs", "git"),
)  #: what is kept of a run


def summarise(
    names: list[str], runs: list[dict[str, Any]], costs: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row a method: accuracy over its complete runs (mean, and standard deviation of the sample
    from two on), or of an interrupted one so far where there is no complete one, and its costs.

    Parameters and MACs are those that training ends with, where a run has ended: ranks may have
    been cut; what a step costs is that of the first.
    """
    rows = []
    for name in names:
        mine = [run for run in runs if run["method"] == name]
        ended = [run for run in mine if run["status"] != "interrupted"]
        sizes = {
            key: round(statistics.mean(run[key] for run in ended))
            for key in ("parameters", "macs")
            if ended
        }
        whole = [run["accuracy"] for run in ended]
        part = [run["accuracy"] for run in mine if run["status"] == "interrupted"]
        accuracies = [a for a in (whole or part) if a is not None]
        rows.append(
            {
                "method": name,
                "label": methods.get(name).label,
                "runs": len(whole),
                "complete": bool(whole),
                "accuracy": statistics.mean(accuracies) if accuracies else None,
                "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                **costs.get(name, {}),
                **sizes,
            }
        )
    return rows


def _plain(config: RunConfig) -> dict[str, Any]:
    """The config as it reads back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]
