"""Run experiments at a scale, resumably, and write what they measured."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ....alignment import alignment, descent
from ....engine import Learner
from ....factors import FactoredLayer
from ....factors.stiefel import orthogonality_error
from ...data import ImageData, sizes
from ...training.build import build_learner, example_batch, load_data, prepare_machine
from ...training.checkpoint import load_checkpoint
from ...training.config import (
    DataConfig,
    JobConfig,
    MachineConfig,
    RunConfig,
    from_dict,
    method_config,
    option,
    to_yaml,
)
from ...training.progress import Progress, Silent
from ...training.record import Record, provenance, read_json, write_json
from ...training.run import train
from ...training.trainer import Trainer
from ..profile import Profile
from .draw import experiment_figures, index_page
from .specs import EXPERIMENTS, Experiment, Variant

__all__ = ["ReproduceConfig", "Reproduction"]


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(MachineConfig):
    """reproduction"""

    scale: Literal["smoke", "cpu", "full"] = option("smoke", "how much of it")
    data_dir: str | None = option(None, "folder with those of cifar10 and cifar100 in it")
    image_folder: str | None = option(
        None, "folder of images, train and test with one directory a class, for table2"
    )
    seeds: int | None = option(None, "how many seeds, in place of the scale's own number")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")


@dataclass(frozen=True)
class _Run:
    """``key``: (experiment's group, variant, seed); experiments of one group share it."""

    key: tuple[str, str, int]
    label: str
    config: RunConfig
    angles: bool


class Reproduction:
    """Experiments in a folder: ``config.yaml``, ``runs/GROUP-VARIANT-seedN`` for each training run,
    and for each experiment ``NAME.json``, and its figures as SVG and PNG; ``index.html`` shows all
    there are.

    Creating one raises ValueError for what cannot be run and for a folder of something else.
    Finished runs of the same config are not run again, unfinished ones go on from their
    checkpoints. ``overwrite`` starts over.
    """

    def __init__(
        self,
        names: list[str],
        config: ReproduceConfig,
        folder: str | Path | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        if unknown := sorted(set(names) - {*EXPERIMENTS, "all"}):
            raise ValueError(
                f"unknown experiment {', '.join(unknown)}; there are all, {', '.join(EXPERIMENTS)}"
            )
        self.names = list(EXPERIMENTS) if "all" in names else list(dict.fromkeys(names))
        self.config = config
        self.folder = Path(folder or f"runs/reproduce-{config.scale}")
        self._overwrite = overwrite
        self._top = Record(self.folder, "reproduce")
        if not self._is_unmarked():
            self._top.check()
        self._data: dict[str, ImageData] = {}
        self._sizes: dict[tuple[str, str], tuple[int, int]] = {}
        self._runs = {run.key: run for name in self.names for run in self._runs_of(name)}
        self._done: dict[tuple[str, str, int], dict[str, Any]] = {}
        for run in self._runs.values():
            prepare_machine(run.config)
            self._look_up(run)

    @property
    def pending(self) -> int:
        """How many training runs are still to be done."""
        return len(self._runs) - len(self._done)

    def run(
        self, *, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, dict[str, Any]]:
        """Do what is pending; return by experiment what its ``NAME.json`` holds."""
        self._top.write_config(to_yaml(self.config))
        for name in self.names:
            for run in self._runs_of(name):
                if run.key not in self._done and not stop():
                    self._train(run, progress or Silent(), stop)
            self._write(name, stop)
        return {name: self._results(name) or {} for name in self.names}

    def _is_unmarked(self) -> bool:
        """Whether the folder is a reproduction from before such folders were marked: it has the
        results of an experiment, or nothing yet but runs of some."""
        if self._top.config_path.exists() or not self.folder.is_dir():
            return False
        if any((self._results(name) or {}).get("experiment") == name for name in EXPERIMENTS):
            return True
        runs = self.folder / "runs"
        return list(self.folder.iterdir()) == [runs] and all(
            run.name.startswith(tuple(f"{e.group or name}-" for name, e in EXPERIMENTS.items()))
            for run in runs.iterdir()
        )

    # --- runs -----------------------------------------------------------------------------------

    def _runs_of(self, name: str) -> Iterator[_Run]:
        experiment, scale = EXPERIMENTS[name], self.config.scale
        for seed in range(self.config.seeds or experiment.seeds[scale]):
            for key, variant in self._variants(experiment).items():
                config = self._run_config(experiment, variant, seed)
                group = experiment.group or name
                yield _Run((group, key, seed), variant.label(experiment), config, experiment.angles)

    def _variants(self, experiment: Experiment) -> dict[str, Variant]:
        smoke, folder = self.config.scale == "smoke", self.config.image_folder
        return {
            key: variant
            for key, variant in experiment.variants.items()
            if (variant.smoke or not smoke)
            and (variant.changes.get("data") != "folder" or folder is not None)
        }

    def _run_config(self, experiment: Experiment, variant: Variant, seed: int) -> RunConfig:
        machine = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(MachineConfig)}
        fields = {**experiment.job[self.config.scale], **variant.changes, **machine}
        if fields.get("data", "embedded") != "embedded":
            folder = fields["data"] == "folder"
            fields["data_dir"] = self.config.image_folder if folder else self.config.data_dir
        for limit, count in self._counts(fields.get("data", "embedded"), fields.get("data_dir")):
            if limit in fields:
                fields[limit] = min(fields[limit], count)
        return method_config(variant.method, JobConfig(**fields), seed=seed)

    def _counts(self, data: str, data_dir: str | None) -> list[tuple[str, int]]:
        """How many images there are, by the limit that may ask for more; ValueError for a folder
        that is not what it should be. Nothing is known of what is still to be downloaded."""
        if data_dir is None:
            return []
        if not Path(data_dir).is_dir():
            option = "--image-folder" if data == "folder" else "--data-dir"
            raise ValueError(f"{option} is not a folder: {data_dir}")
        if (data, data_dir) not in self._sizes:
            self._sizes[data, data_dir] = sizes(data, data_dir)
        return list(zip(("train_limit", "test_limit"), self._sizes[data, data_dir], strict=True))

    def _record(self, run: _Run) -> Record:
        group, variant, seed = run.key
        return Record(self.folder / "runs" / f"{group}-{variant}-seed{seed}")

    def _look_up(self, run: _Run) -> None:
        """Note the run as done if it is; ValueError if its folder holds another one."""
        record = self._record(run)
        record.check()
        if self._overwrite or not record.config_path.exists():
            return
        results = record.results()
        finished = results is not None and results["status"] != "interrupted"
        # What is finished may have run elsewhere; a checkpoint goes on as the run it is of.
        free = _ELSEWHERE if finished else set()
        there, here = (
            {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
            for config in (from_dict(RunConfig, record.config()), run.config)
        )
        record.check_config(there, here)
        if results is not None and finished:
            self._done[run.key] = results

    def _train(self, run: _Run, progress: Progress, stop: Callable[[], bool]) -> None:
        data, record = self._load(run.config), self._record(run)
        measure = _Angles(run.config, data) if run.angles else None
        trainer = Trainer(run.config, data, build_learner(run.config, data), measure=measure)
        resume = record.checkpoint_path.exists() and not self._overwrite
        if resume:
            load_checkpoint(trainer, record.checkpoint_path)
        group, _, seed = run.key
        self._done[run.key] = train(
            trainer,
            record,
            name=f"{group}, {run.label}, seed {seed}",
            progress=progress,
            stop=stop,
            resume=resume,
        )

    def _load(self, config: RunConfig) -> ImageData:
        """The data of a run; the last two sets are kept."""
        key = json.dumps([getattr(config, f.name) for f in dataclasses.fields(DataConfig)])
        if key not in self._data:
            if len(self._data) > 1:
                del self._data[next(iter(self._data))]
            self._data[key] = load_data(config)
        return self._data[key]

    # --- what is written ------------------------------------------------------------------------

    def _write(self, name: str, stop: Callable[[], bool]) -> None:
        experiment = EXPERIMENTS[name]
        content: dict[str, Any] = {
            "experiment": name,
            "scale": self.config.scale,
            "title": experiment.title,
            "shows": experiment.shows,
            "drawing": experiment.drawing,
            "axes": dict(experiment.axes),
            "config": dataclasses.asdict(self.config),
        }
        if experiment.costs:
            content |= self._profiles(name, experiment.costs[self.config.scale], stop)
        else:
            content |= self._measured(name)
        write_json(self._path(name), {**content, **provenance(self.config.device)})
        for i, figure in enumerate(experiment_figures(content)):
            figure.plot.save(self.folder / f"{name}-{i + 1}")
        everything = [results for key in EXPERIMENTS if (results := self._results(key))]
        (self.folder / "index.html").write_text(index_page(everything), encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _results(self, name: str) -> dict[str, Any] | None:
        return read_json(self._path(name))

    def _measured(self, name: str) -> dict[str, Any]:
        runs = list(self._runs_of(name))
        done = {run.key: self._done[run.key] for run in runs if run.key in self._done}
        complete = len(done) == len(runs) and all(
            result["status"] != "interrupted" for result in done.values()
        )
        rows = []
        for key, variant in self._variants(EXPERIMENTS[name]).items():
            mine = [result for (_, which, _), result in done.items() if which == key]
            finished = [result for result in mine if result["status"] != "interrupted"]
            rows.append(
                {
                    "variant": key,
                    "label": variant.method.label,
                    "setting": variant.setting,
                    "curve": variant.curve,
                    "x": variant.x,
                    "y": variant.y,
                    **_summary(finished),
                    "histories": [result["history"] for result in finished],
                    "config": finished[0]["config"] if finished else None,
                }
            )
        return {"status": "finished" if complete else "interrupted", "rows": rows}

    def _profiles(self, name: str, configs: Any, stop: Callable[[], bool]) -> dict[str, Any]:
        machine = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(MachineConfig)}
        profiles: dict[str, Any] = {}
        for i, (label, config) in enumerate(configs.items()):
            folder = self.folder / "runs" / f"{name}-{i + 1}"
            wanted = dataclasses.replace(config, **machine)
            results = None if self._overwrite else Record(folder, "profile").results()
            if results is None or results["config"] != dataclasses.asdict(wanted):
                if stop():
                    break
                results = Profile(wanted, folder, overwrite=True).run()
            profiles[label] = results["methods"]
        status = "finished" if len(profiles) == len(configs) else "interrupted"
        return {"status": status, "profiles": profiles}


_ELSEWHERE = {f.name for f in dataclasses.fields(MachineConfig)} | {"data_dir"}


class _Angles:
    """Measures the learner on the same images after each epoch: angles on one batch, the share of
    steps and layers that go downhill on several; and how far its factors are off orthonormal."""

    def __init__(
        self, config: RunConfig, data: ImageData, size: int = 128, batches: int = 4
    ) -> None:
        total = len(data.train)
        size = min(size, total)
        # Each batch is spread over the training images, which are sorted by class in some sets.
        step = total // size
        count = min(batches, step)
        self.batches = [
            self._batch(config, data, slice(i * step // count, None, step), size)
            for i in range(count)
        ]

    def _batch(
        self, config: RunConfig, data: ImageData, chosen: slice, size: int
    ) -> tuple[Tensor, Tensor]:
        split = data.train.take(np.arange(len(data.train))[chosen][:size])
        x = example_batch(config, dataclasses.replace(data, train=split), size)
        return x, split.labels

    def __call__(self, learner: Learner) -> dict[str, Any]:
        found = alignment(learner.model, learner, *self.batches[0])
        downhill = descent(learner, self.batches)
        return {
            "alignment": {
                "layers": {layer.name: layer.tangent_angle for layer in found.layers},
                "factors": {layer.name: layer.factor_angle for layer in found.layers},
                "norm_ratios": {layer.name: layer.norm_ratio for layer in found.layers},
                "units": {unit.name: unit.feedback_angle for unit in found.units},
                "cosine": found.cosine,
                "descent_share": downhill.steps,
                "layer_descent_share": downhill.layers,
            },
            "orthogonality": {
                name: max(float(orthogonality_error(X.detach())) for X in (layer.U, layer.V))
                for name, layer in learner.model.named_modules()
                if isinstance(layer, FactoredLayer)
            },
        }


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation of what the runs of one variant reached."""
    accuracies = [r["accuracy"] for r in results if r["accuracy"] is not None]
    return {
        "runs": len(results),
        "accuracy": statistics.mean(accuracies) if accuracies else None,
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "parameters": round(statistics.mean(r["parameters"] for r in results)) if results else None,
        "macs": round(statistics.mean(r["macs"] for r in results)) if results else None,
        "seconds": statistics.mean(r["train_seconds"] for r in results) if results else None,
        "commits": sorted({r["git"] for r in results if r["git"]}),
    }
