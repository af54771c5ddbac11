"""Run experiments at a scale, resumably, and write what they measured."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ....alignment import alignment, descent
from ....engine import Learner
from ....factors import factored_layers
from ....factors.stiefel import orthogonality_error
from ...data import ImageData, sizes
from ...runner import Run, Sweep, SweepWork
from ...training.build import example_batch, prepare_machine
from ...training.config import JobConfig, MachineConfig, RunConfig
from ...training.options import fields_of, option, to_yaml
from ...training.progress import Progress
from ...training.provenance import provenance
from ...training.record import read_json, write_json
from ..profile import Profile, ProfileConfig, check_profile
from ..variants import accuracy_of
from .draw import experiment_figures, index_page
from .specs import EXPERIMENTS, Experiment, Row


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(MachineConfig):
    """reproduction"""

    scale: Literal["smoke", "cpu", "full"] = option("smoke", "size of the experiments")
    data_dir: str | None = option(None, "folder that contains the folders cifar10 and cifar100")
    image_folder: str | None = option(
        None, "folder of images, train and test with one directory a class, for table2"
    )
    seeds: int | None = option(None, "how many seeds, in place of the scale's own number", least=1)


class Reproduction(SweepWork):
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
        self._overwrite = overwrite
        self._sizes: dict[tuple[str, str], tuple[int, int]] = {}
        runs = {run.name: run for name in self.names for run in self._runs_of(name)}
        folder = folder or f"runs/reproduce-{config.scale}"
        self._sweep = Sweep(folder, runs.values(), kind="reproduce", overwrite=overwrite)
        for name in self.names:
            for at, profile in self._profiles_of(name).values():
                check_profile(at, profile, overwrite=overwrite)
        prepare_machine(JobConfig(**self._machine))

    def run(
        self, *, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, dict[str, Any]]:
        """Do the runs that are not finished; return what ``NAME.json`` holds, by experiment."""
        with self._sweep.top.locked():
            self._sweep.top.write_config(to_yaml(self.config))
            for name in self.names:
                done = self._sweep.run(self._runs_of(name), progress=progress, stop=stop)
                self._write(name, done, stop)
        return {name: self._results(name) or {} for name in self.names}

    @property
    def _machine(self) -> dict[str, Any]:
        return fields_of(MachineConfig, self.config)

    # --- runs -----------------------------------------------------------------------------------

    def _runs_of(self, name: str) -> Iterator[Run]:
        """Experiments of one group share their runs."""
        experiment, scale = EXPERIMENTS[name], self.config.scale
        group = experiment.group or name
        for seed in range(self.config.seeds or experiment.seeds[scale]):
            for key, variant in self._variants(experiment).items():
                label = variant.label_in(experiment)
                yield Run(
                    self._name(experiment.group or name, key, seed),
                    self._run_config(experiment, variant, seed),
                    label,
                    f"{group}, {label}, seed {seed}",
                    measure=_Angles if experiment.angles else None,
                )

    def _name(self, group: str, variant: str, seed: int) -> str:
        return f"runs/{group}-{variant}-seed{seed}"

    def _variants(self, experiment: Experiment) -> dict[str, Row]:
        smoke, folder = self.config.scale == "smoke", self.config.image_folder
        return {
            key: variant
            for key, variant in experiment.variants.items()
            if (variant.smoke or not smoke)
            and (variant.settings.get("data") != "folder" or folder is not None)
        }

    def _run_config(self, experiment: Experiment, variant: Row, seed: int) -> RunConfig:
        fields = {**experiment.job[self.config.scale], **variant.settings, **self._machine}
        if fields.get("data", "embedded") != "embedded":
            folder = fields["data"] == "folder"
            fields["data_dir"] = self.config.image_folder if folder else self.config.data_dir
        for limit, count in self._counts(fields.get("data", "embedded"), fields.get("data_dir")):
            if limit in fields:
                fields[limit] = min(fields[limit], count)
        return variant.config(JobConfig(**fields), seed=seed)

    def _counts(self, data: str, data_dir: str | None) -> list[tuple[str, int]]:
        """How many training and test images there are, with the option that limits each; ValueError
        for a folder without them. Empty without a folder."""
        if data_dir is None:
            return []
        if not Path(data_dir).is_dir():
            option = "--image-folder" if data == "folder" else "--data-dir"
            raise ValueError(f"{option} is not a folder: {data_dir}")
        if (data, data_dir) not in self._sizes:
            self._sizes[data, data_dir] = sizes(data, data_dir)
        return list(zip(("train_limit", "test_limit"), self._sizes[data, data_dir], strict=True))

    # --- what is written ------------------------------------------------------------------------

    def _write(
        self, name: str, done: Mapping[str, dict[str, Any]], stop: Callable[[], bool]
    ) -> None:
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
            content |= self._profiled(name, stop)
        else:
            content |= self._measured(name, done)
        write_json(self._path(name), {**content, **provenance(self.config.device)})
        for i, figure in enumerate(experiment_figures(content)):
            figure.plot.save(self.folder / f"{name}-{i + 1}")
        everything = [results for key in EXPERIMENTS if (results := self._results(key))]
        (self.folder / "index.html").write_text(index_page(everything), encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _results(self, name: str) -> dict[str, Any] | None:
        return read_json(self._path(name))

    def _measured(self, name: str, done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        experiment = EXPERIMENTS[name]
        seeds = range(self.config.seeds or experiment.seeds[self.config.scale])
        complete, rows = True, []
        for key, variant in self._variants(experiment).items():
            names = [self._name(experiment.group or name, key, seed) for seed in seeds]
            finished = [done[n] for n in names if n in done and done[n]["status"] != "interrupted"]
            complete = complete and len(finished) == len(names)
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

    def _profiles_of(self, name: str) -> dict[str, tuple[Path, ProfileConfig]]:
        """Folder and config of each profile that an experiment needs, by label."""
        costs = EXPERIMENTS[name].costs
        configs = costs[self.config.scale].items() if costs else ()
        return {
            label: (
                self.folder / "runs" / f"{name}-{i}", dataclasses.replace(config, **self._machine)
            )
            for i, (label, config) in enumerate(configs, 1)
        }  # fmt: skip

    def _profiled(self, name: str, stop: Callable[[], bool]) -> dict[str, Any]:
        profiles: dict[str, Any] = {}
        wanted = self._profiles_of(name)
        for label, (folder, config) in wanted.items():
            if stop():
                break
            results = Profile(config, folder, overwrite=self._overwrite).run(stop=stop)
            if results["status"] == "interrupted":
                break
            profiles[label] = results["methods"]
        status = "finished" if len(profiles) == len(wanted) else "interrupted"
        return {"status": status, "profiles": profiles}


class _Angles:
    """Measures the learner after each epoch, always on the same images: angles on one batch; on
    several batches, the share of steps and layers whose gradient points downhill; and the
    orthogonality error of its factors."""

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
                for name, layer in factored_layers(learner.model).items()
            },
        }


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation of what the runs of one variant reached."""
    return {
        "runs": len(results),
        **accuracy_of(results),
        "parameters": round(statistics.mean(r["parameters"] for r in results)) if results else None,
        "macs": round(statistics.mean(r["macs"] for r in results)) if results else None,
        "seconds": statistics.mean(r["train_seconds"] for r in results) if results else None,
        "commits": sorted({r["git"] for r in results if r["git"]}),
    }
