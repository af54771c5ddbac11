"""What a step and an inference of each method cost, measured side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...engine import Learner
from ..costs import Memory, alternate, inference_macs, parameter_count, step_macs, step_memory
from ..data import ImageData
from ..training.build import build_learner, precision
from ..training.config import JobConfig, RunConfig
from ..training.trainer import Trainer

SECONDS = 10.0  #: for the alternating steps of all methods together; at least three rounds


@dataclass(frozen=True)
class Step:
    """One training step, over and over, on one batch."""

    learner: Learner
    config: JobConfig
    x: Tensor
    y: Tensor

    def __call__(self) -> None:
        with precision(self.config):
            self.learner.step(self.x, self.y)

    def memory(self) -> Memory:
        """Bytes of a step that is not the first."""
        learner = self.learner
        if not learner.steps:
            self()  # the optimizer's state exists from now on
        return step_memory(
            self, [learner.model, learner.feedback], learner.optimizer, [self.x, self.y]
        )


def measure(
    configs: Mapping[str, RunConfig], data: ImageData, *, reference: RunConfig
) -> dict[str, dict[str, Any]]:
    """Costs of each of ``configs``, by name: parameters, MACs of one image and of a training step,
    bytes at the peak of a step by kind, seconds of a step, and their ratio to the seconds of
    ``reference``.

    All learners step in turns on the same batch and are discarded afterwards.
    """
    learners = {name: build_learner(config, data) for name, config in configs.items()}
    same = next((name for name, config in configs.items() if config == reference), None)
    if same is None:
        learners["reference"] = build_learner(reference, data)
    steps = {}
    for name, learner in learners.items():
        config = configs.get(name, reference)
        x, y = next(Trainer(config, data, learner).batches())
        steps[name] = Step(learner, config, x, y)
    costs = {}
    for name in configs:
        model = learners[name].model
        costs[name] = {
            "parameters": parameter_count(model),
            "macs": inference_macs(model, steps[name].x),
            "step_macs": step_macs(steps[name]),
            "memory": steps[name].memory().as_dict(),
        }
    times = alternate(steps, rounds=15, seconds=SECONDS)
    for name in configs:
        costs[name]["step_seconds"] = times[name].median
        costs[name]["step_ratio"] = times[name].ratio(times[same or "reference"])
    return costs
