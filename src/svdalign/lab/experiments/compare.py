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
from ..reports import comparison_page, run_page
from ..training.build import build_learner, load_data, prepare_machine
from ..training.config import (
    JobConfig,
    RunConfig,
    check_settings,
    from_dict,
    method_config,
    option,
    to_yaml,
)
from ..training.progress import Progress, Silent
from ..training.record import Record, new_folder, provenance, read_json
from ..training.run import describe, train
from ..training.trainer import Trainer
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
    then. Runs that the folder holds finished, with the same config, are not run again;
    ``overwrite`` starts over.
    """

    def __init__(
        self, config: CompareConfig, folder: str | Path | None = None, *, overwrite: bool = False
    ) -> None:
        self.config = config
        self._costs: dict[str, Any] = {}
        self._costs_of: dict[str, Any] = {}
        self._runs = list(config.runs())
        prepare_machine(config)
        if folder is not None:
            self._open(Path(folder), overwrite)
        self.data = load_data(config)
        for name in config.rules:
            build_learner(config.run(name, 0), self.data)
        if folder is None:
            self._open(new_folder("runs", "compare"), overwrite)

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self._record.folder

    @property
    def pending(self) -> int:
        """How many runs are still to be done."""
        return len(self._runs) - len(self._done)

    def measure_costs(self) -> None:
        """Costs of each method, unless the folder has them for these very methods."""
        first = dict(reversed(self._runs))
        configs = {name: first[name] for name in self.config.rules}
        self._costs_of = {name: _plain(config) for name, config in configs.items()}
        stored = (None if self._fresh else read_json(self._record.results_path)) or {}
        if stored.get("costs_of") == self._costs_of:
            self._costs = stored["costs"]
            return
        reference = self.config.run("bp-dense", 0)
        self._costs = costs.measure(configs, self.data, reference=reference)

    def run(
        self, *, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """Do what is pending; return what ``results.json`` holds. ``stop`` as in :func:`train`."""
        self._record.start(to_yaml(self.config))
        results = dict(self._done)
        for name, config in self._runs:
            if (name, config.seed) in results:
                continue
            if stop():
                break
            trainer = Trainer(config, self.data, build_learner(config, self.data))
            record = self._run_record(name, config)
            label = methods.get(name).label
            result = train(
                trainer,
                record,
                name=f"{label}, seed {config.seed}" if self.config.seeds != 1 else label,
                progress=progress or Silent(),
                stop=stop,
            )
            record.report_path.write_text(run_page(result, label), encoding="utf-8")
            results[name, config.seed] = result
        return self._write(results)

    def _open(self, folder: Path, overwrite: bool) -> None:
        self._record = Record(folder, "compare")
        self._record.check()
        self._fresh = overwrite
        self._done: dict[tuple[str, int], dict[str, Any]] = {}
        for name, config in self._runs:
            record = self._run_record(name, config)
            record.check()
            result = None if overwrite else record.results()
            if result is None or result["status"] == "interrupted":
                continue
            # As they read today: a field that came since has had its default.
            there = _plain(from_dict(RunConfig, result["config"]))
            record.check_config(there, _plain(config))
            self._done[name, config.seed] = result

    def _run_record(self, name: str, config: RunConfig) -> Record:
        return Record(self.folder / f"{name}-seed{config.seed}")

    def _write(self, results: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
        complete = len(results) == len(self._runs) and all(
            result["status"] != "interrupted" for result in results.values()
        )
        runs = [
            {"method": name, **{key: result[key] for key in _RUN_KEYS}}
            for (name, _), result in results.items()
        ]
        content = {
            "status": "finished" if complete else "interrupted",
            "config": dataclasses.asdict(self.config),
            "data": describe(self.data),
            "summary": summarise(self.config.rules, runs, self._costs),
            "runs": runs,
            "costs": self._costs,
            "costs_of": self._costs_of,
            **provenance(self.config.device),
        }
        self._record.write_results(content)
        self._record.report_path.write_text(comparison_page(content), encoding="utf-8")
        return content


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
