"""Several methods, each with several seeds, on the same data, network and budget."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reports import comparison_page
from ..runner import Run, Sweep, SweepWork
from ..training.checkpoint import load_run
from ..training.config import RunConfig, method_config
from ..training.options import option, to_yaml
from ..training.progress import Progress
from ..training.provenance import provenance
from ..training.run import describe
from . import costs
from .card import versus_dense
from .variants import Entry, MethodsConfig, accuracy_of


@dataclass(frozen=True, kw_only=True)
class CompareConfig(MethodsConfig):
    """comparison"""

    seeds: int | list[int] = option(1, "how many seeds, or which: 3 is the same as [0, 1, 2]")
    lr: float | dict[str, float] | None = option(
        None, "one peak learning rate for all, or {method: rate}, in place of each's tuned one"
    )
    costs: bool = option(True, "measure memory, arithmetic and time of a training step of each")
    compact: bool = option(
        False, "measure size and latency of each compact trained network beside the dense one"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds in ([], 0) or len(set(self.numbers)) < len(self.numbers):
            raise ValueError(f"seeds must be at least one, each once, got {self.seeds}")
        if isinstance(self.lr, dict) and (unknown := sorted(set(self.lr) - set(self.rules))):
            raise ValueError(
                f"lr names {', '.join(unknown)}, but rules are {', '.join(self.rules)}"
            )
        for variant in self.variants:
            self.run(variant, self.numbers[0])  # names every mistake in its settings

    @property
    def numbers(self) -> Sequence[int]:
        """The seeds."""
        return self.seeds if isinstance(self.seeds, list) else range(self.seeds)

    def run(self, variant: Entry, seed: int) -> RunConfig:
        """The run of a variant."""
        lr = self.lr.get(variant.given) if isinstance(self.lr, dict) else self.lr
        return variant.config(self, seed=seed, lr=lr)


class Comparison(SweepWork):
    """A comparison in a folder: ``METHOD-seedN`` for each run, ``results.json``, ``report.html``.

    Creating one checks everything that can be wrong before training starts, and raises ValueError
    then. Runs of the same config that are finished in the folder are not run again, unfinished ones
    go on; ``overwrite`` starts over.
    """

    def __init__(
        self, config: CompareConfig, folder: str | Path | None = None, *, overwrite: bool = False
    ) -> None:
        self.config = config
        self._costs: dict[str, Any] = {}
        self._costs_of: dict[str, Any] = {}
        self._fresh = overwrite
        runs = [  # by seed first, so that every method has a result early
            (variant, self._run(variant, seed))
            for seed in config.numbers
            for variant in config.variants
        ]
        self._variants = {run.name: variant for variant, run in runs}
        self._sweep = Sweep(
            folder,
            [run for _, run in runs],
            kind="compare",
            config=to_yaml(config),
            overwrite=overwrite,
        )
        self._sweep.check()
        self.data = self._sweep.data(runs[0][1].config)

    def _measure_costs(self, stored: dict[str, Any]) -> None:
        """Measure the costs of each method, unless the folder has them for the same methods."""
        first = self.config.numbers[0]
        configs = {
            variant.name: self.config.run(variant, first) for variant in self.config.variants
        }
        fields = {name: dataclasses.asdict(config) for name, config in configs.items()}
        self._costs_of = json.loads(json.dumps(fields))  # as it reads back from the folder
        if stored.get("costs_of") == self._costs_of:
            self._costs = stored["costs"]
            return
        reference = method_config("bp-dense", self.config, seed=0)
        self._costs = costs.measure(configs, self.data, reference=reference)

    def run(
        self, *, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """Do the runs that are not finished; return what ``results.json`` holds. ``stop`` as in
        :func:`train`."""
        top, progress = self._sweep.top, progress or Progress()
        stored = (None if self._fresh else top.results()) or {}
        with top.locked():
            if self.config.costs:
                with progress.doing("measuring what a step of each method costs"):
                    self._measure_costs(stored)
            top.start(to_yaml(self.config))
            results = self._sweep.run(progress=progress, stop=stop)
            content = self._content(results, stored)
            top.write_results(content)
            top.report_path.write_text(comparison_page(content), encoding="utf-8")
        return content

    def _run(self, variant: Entry, seed: int) -> Run:
        label = variant.label
        shown = f"{label}, seed {seed}" if self.config.seeds != 1 else label
        return Run(f"{variant.folder}-seed{seed}", self.config.run(variant, seed), label, shown)

    def _content(
        self, results: dict[str, dict[str, Any]], stored: dict[str, Any]
    ) -> dict[str, Any]:
        runs = [
            {"method": self._variants[name].name, **{key: result[key] for key in _RUN_KEYS}}
            for name, result in results.items()
        ]
        if self.config.compact:
            known = {(r["method"], r["seed"]): r.get("compact") for r in stored.get("runs", ())}
            for name, run in zip(results, runs, strict=True):
                if run["status"] == "finished":
                    run["compact"] = known.get((run["method"], run["seed"])) or versus_dense(
                        load_run(self.folder / name)
                    )
        return {
            "status": "interrupted" if self.pending else "finished",
            "config": dataclasses.asdict(self.config),
            "data": describe(self.data),
            "summary": summarise(self.config.variants, runs, self._costs),
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
    variants: Sequence[Entry], runs: list[dict[str, Any]], costs: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each variant: its accuracy and its costs. Accuracy is the mean over finished runs,
    with the sample standard deviation if there are two or more; without a finished run it is that
    of an interrupted one so far.

    Parameters and MACs are those at the end of training if a run has ended, as ranks may have been
    cut. The costs of a step are those of the first step.
    """
    rows = []
    for variant in variants:
        mine = [run for run in runs if run["method"] == variant.name]
        ended = [run for run in mine if run["status"] != "interrupted"]
        sizes = {
            key: round(statistics.mean(run[key] for run in ended))
            for key in ("parameters", "macs")
            if ended
        }
        shown = ended or mine
        rows.append(
            {
                "method": variant.name,
                "label": variant.label,
                "of": variant.method.label,
                "change": variant.change,
                "runs": len(ended),
                "complete": bool(ended),
                "accuracies": [r["accuracy"] for r in shown if r["accuracy"] is not None],
                **accuracy_of(shown),
                **costs.get(variant.name, {}),
                **sizes,
            }
        )
    return rows
