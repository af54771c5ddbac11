"""What training costs, by method: memory, arithmetic, time; on images of a given shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...export import compact
from .. import methods
from ..costs import (
    Call,
    alternate,
    epoch_seconds,
    factored_calls,
    inference_macs,
    inference_memory,
    macs_break_even,
    parameter_count,
    pretending,
    step_macs,
    time_break_even,
    time_ratios,
)
from ..data import ImageData, Split
from ..methods import HELP
from ..reports import profile_page
from ..training.build import (
    build_learner,
    build_model,
    example_batch,
    memory_format,
    prepare_machine,
)
from ..training.config import (
    JobConfig,
    MachineConfig,
    ModelConfig,
    RunConfig,
    check_settings,
    method_config,
)
from ..training.options import Options, differences, fields_of, option, to_yaml
from ..training.progress import Progress
from ..training.provenance import provenance
from ..training.record import Record, new_folder, unfinished
from .costs import Step

#: Low rank and checkpointing can be combined, so a method that claims little memory is compared
#: with both at once.
_DEFAULT = [
    *("bp-dense", "bp-dense-checkpointed", "bp", "bp-checkpointed"),
    *("dfa", "ssa", "ssa-1", "ssa-2", "ssa-checkpointed"),
]


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Options):
    """batch"""

    batch_size: int = option(128, "images a step", least=1)
    image_size: int = option(32, "height and width of the images in pixels", least=1)
    channels: int = option(3, "channels of the images", least=1)
    classes: int = option(10, "classes to tell apart", least=1)


@dataclass(frozen=True, kw_only=True)
class EpochConfig(Options):
    """epoch"""

    epoch_images: int | None = option(
        None, "predict the time of an epoch of so many images; ImageNet has 1281167", above=0
    )
    devices: list[int] = option([1, 8], "numbers of devices, each with batch_size images a step")
    device_flops: float | None = option(
        None,
        "nominal floating-point operations a second of a device; null: a step takes as long as "
        "measured here",
        above=0,
    )
    utilisation: float = option(0.35, "share of device_flops that training reaches", above=0)
    link: float = option(25e9, "bytes a second from device to device", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.devices or min(self.devices) < 1:
            raise ValueError(f"devices must be numbers of at least 1, got {self.devices}")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(BatchConfig, ModelConfig, MachineConfig, EpochConfig):
    """profile"""

    methods: list[str] = option(_DEFAULT, f"of {HELP}")
    optimizer: Literal["adamw", "sgd", "muon"] = option(
        "adamw",
        "whose state counts: two numbers a parameter for adamw, one for sgd and for the hidden "
        "weights of muon",
    )
    precision: Literal["fp32", "bf16"] = option("fp32", "of training steps; bf16 under autocast")
    settings: dict[str, Any] = option(
        {}, "{method: {field: value}}: what differs for a method, such as units or options"
    )
    estimate: bool = option(False, "work out memory and arithmetic without running anything")
    seconds: float = option(60.0, "for the timing of steps; at least three rounds")
    break_even: bool = option(
        False, "time each factored layer by rank against its dense form, for as many seconds again"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epoch_images is not None and self.estimate and self.device_flops is None:
            raise ValueError("device_flops is needed for an epoch's time where nothing is run")
        if len(set(self.methods)) < max(len(self.methods), 1):
            raise ValueError(f"methods must be at least one, each once, got {self.methods}")
        object.__setattr__(self, "settings", check_settings(self.settings, self.methods))
        if self.break_even and self.estimate:
            raise ValueError("break_even times layers, but estimate runs nothing")
        if self.estimate and self.precision != "fp32":
            raise ValueError(f"estimate works out fp32 alone, got precision {self.precision!r}")
        for name in self.methods:
            if self.run(name).fuse == "measured":  # and names every mistake in its own settings
                raise ValueError(
                    "fuse must be true or false here: arithmetic is worked out from shapes alone, "
                    "and measured kernels differ in it; svdalign compare measures them"
                )
        if self.break_even and self.factored is None:
            raise ValueError(
                "break_even needs a method with factored weights, got methods "
                f"{', '.join(self.methods)}"
            )

    @property
    def factored(self) -> str | None:
        """The first method with factored weights. All such methods train the same network."""
        return next((name for name in self.methods if self.run(name).rank is not None), None)

    def run(self, name: str) -> RunConfig:
        """The run whose training step is measured for method ``name``."""
        job = JobConfig(**fields_of(JobConfig, self))
        return method_config(name, job, seed=0, settings=self.settings.get(name))


class Profile:
    """A profile in a folder: ``config.yaml``, ``results.json``, ``report.html``.

    Creating one raises ValueError for what cannot be profiled. What the folder holds of the same
    profile is not measured again; ``overwrite`` starts over. ``say``: called with a line on the
    method that is being estimated.
    """

    def __init__(
        self,
        config: ProfileConfig,
        folder: str | Path | None = None,
        *,
        overwrite: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._say = say
        self.config = config
        prepare_machine(config.run(config.methods[0]))
        if folder is None and not overwrite:
            folder = unfinished("runs", "profile", to_yaml(config))
        stored = None
        if folder is not None:
            stored = check_profile(folder, config, overwrite=overwrite)
        self._stored = stored or {"status": "interrupted", "methods": []}
        done = self._stored["status"] == "finished"
        self._estimates = {} if done else {name: self._estimate(name) for name in config.methods}
        self._record = Record(folder or new_folder("runs", "profile"), "profile")

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self._record.folder

    @property
    def pending(self) -> int:
        """Number of methods whose memory is still to be measured."""
        return len(self.config.methods) - len(self._stored["methods"])

    def run(
        self, *, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """Measure, or estimate, every method; return what ``results.json`` holds.

        ``stop`` is asked before each method; when it returns True, the profile ends with ``status``
        ``"interrupted"``, and the same profile again goes on with the next method. Times are taken
        at the end, of all methods together.
        """
        if self._stored["status"] == "finished":
            return self._stored
        rows: list[dict[str, Any]] = list(self._stored["methods"])
        progress = progress or Progress()
        with self._record.locked():
            if not rows:
                self._record.start(to_yaml(self.config))
            while len(rows) < len(self.config.methods) and not stop():
                name = self.config.methods[len(rows)]
                with progress.doing(f"a step of {name}"):
                    rows.append(self._memory(name))
                self._record.write_results(self._content("interrupted", rows))
            if len(rows) < len(self.config.methods):
                return self._content("interrupted", rows)
            if not self.config.estimate:
                with progress.doing("steps of all methods in turns"):
                    self._add_times(rows)
            for row in rows if self.config.epoch_images is not None else ():
                row["epoch_seconds"] = self._epochs(row)
            content = self._content("finished", rows)
            self._record.write_results(content)
            self._record.report_path.write_text(profile_page(content), encoding="utf-8")
        return content

    def _content(self, status: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "status": status,
            "config": dataclasses.asdict(self.config),
            "methods": rows,
            "break_even": self._break_even() if status == "finished" else [],
            **provenance(self.config.device),
        }

    def _epochs(self, row: dict[str, Any]) -> dict[str, float]:
        """Seconds of an epoch by number of devices."""
        config = self.config
        step = row.get("step_seconds")
        if config.device_flops is not None:
            step = 2 * row["step_macs"] / (config.device_flops * config.utilisation)
        assert step is not None
        assert config.epoch_images is not None
        return {
            str(devices): epoch_seconds(
                step,
                images=config.epoch_images,
                batch_size=config.batch_size,
                devices=devices,
                gradients=4 * row["parameters"],
                link=config.link,
            )
            for devices in config.devices
        }

    def _memory(self, name: str) -> dict[str, Any]:
        """All that is measured of a method except its times."""
        row = self._estimates[name]
        if not self.config.estimate:
            if self.config.precision == "fp32":
                row["estimated_memory"] = row["memory"]
            row["memory"] = self._step(name, self.config.device).memory().as_dict()
        return row

    def _estimate(self, name: str) -> dict[str, Any]:
        number = self.config.methods.index(name) + 1
        self._say(f"working out a step of {name}, {number} of {len(self.config.methods)}")
        with pretending():  # in single precision: there is no autocast without numbers
            step = self._step(name, "meta")
            macs = step_macs(step)
            memory = step.memory()
            return {
                "method": name,
                "label": methods.get(name).label,
                "parameters": parameter_count(step.learner.model),
                "macs": inference_macs(step.learner.model, step.x),
                "step_macs": macs,
                "memory": memory.as_dict(),
                "inference_memory": inference_memory(compact(step.learner.model), step.x[:1]),
            }

    def _add_times(self, rows: list[dict[str, Any]]) -> None:
        names = dict.fromkeys(["bp-dense", *self.config.methods])
        steps = {name: self._step(name, self.config.device) for name in names}
        models = {name: compact(step.learner.model) for name, step in steps.items()}
        image = steps["bp-dense"].x[:1]
        inference = {name: partial(_infer, model, image) for name, model in models.items()}
        seconds = self.config.seconds
        self._say(f"timing steps, for about {seconds:.0f} s")
        times = alternate(steps, rounds=15, warmup=1, seconds=0.8 * seconds)
        latencies = alternate(inference, rounds=51, warmup=5, seconds=0.2 * seconds)
        for row in rows:
            for key, measured in (("step", times), ("latency", latencies)):
                mine, dense = measured[row["method"]], measured["bp-dense"]
                row[f"{key}_seconds"], row[f"{key}_ratio"] = mine.median, mine.ratio(dense)

    def _break_even(self) -> list[dict[str, Any]]:
        """For each factored layer, the largest rank that costs no more than the dense layer."""
        if self.config.factored is None:
            return []
        # A layer against its dense form, so without what would be fused with it.
        config = dataclasses.replace(self.config.run(self.config.factored), fuse=False)
        with pretending():
            elsewhere, data = dataclasses.replace(config, device="meta"), self._data("meta")
            x = example_batch(elsewhere, data, config.batch_size)
            calls = factored_calls(build_model(elsewhere, data), x)
        rows = []
        for name, call in calls.items():
            row = {
                "layer": name,
                "input": list(call.x),
                "rank": call.layer.rank,
                "full_rank": call.layer.full_rank,
                "macs": macs_break_even(call.layer, call.x, call.y),
            }
            if self.config.break_even:
                row |= _break_even_times(call, config, self.config.seconds / len(calls))
            rows.append(row)
        return rows

    def _step(self, name: str, device: str) -> Step:
        config, data = dataclasses.replace(self.config.run(name), device=device), self._data(device)
        if device == "meta":
            config = dataclasses.replace(config, precision="fp32")
        x = example_batch(config, data, config.batch_size)
        return Step(build_learner(config, data), config, x, data.train.labels)

    def _data(self, device: str) -> ImageData:
        """A batch of noise."""
        config = self.config
        shape = (config.batch_size, config.channels, config.image_size, config.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        split = Split(images, torch.arange(config.batch_size, device=device) % config.classes)
        half = (0.5,) * config.channels
        return ImageData("noise", split, split, tuple(map(str, range(config.classes))), half, half)


def check_profile(
    folder: str | Path, config: ProfileConfig, *, overwrite: bool = False
) -> dict[str, Any] | None:
    """The results of this same profile in ``folder``, complete or not; None if there are none.

    Raises ValueError for a folder of something else, unless a profile in it is to be overwritten.
    """
    record = Record(folder, "profile")
    record.check()
    record.check_free()
    if overwrite or not record.config_path.exists():
        return None
    if changed := differences(record.config(), dataclasses.asdict(config)):
        raise ValueError(
            f"{folder} holds another profile ({changed}); give another --out, or --overwrite"
        )
    return record.results()


def _break_even_times(call: Call, config: RunConfig, seconds: float) -> dict[str, Any]:
    x = torch.randn(call.x, device=config.device)
    if x.ndim == 4:
        x = x.to(memory_format=memory_format(config))
    x.requires_grad_(call.input_gradient)
    forward = time_ratios(call.layer, x, training=False, seconds=seconds / 3)
    training = time_ratios(call.layer, x, training=True, seconds=2 * seconds / 3)
    return {
        "forward": time_break_even(forward),
        "training": time_break_even(training),
        "ratios": [{"rank": r, "forward": forward[r], "training": training[r]} for r in forward],
    }


@torch.no_grad()
def _infer(model: nn.Module, image: Tensor) -> None:
    model(image)
