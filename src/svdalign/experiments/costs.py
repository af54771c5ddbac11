"""What a step and an inference of each method cost, measured side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..data import ImageData
from ..engine import Learner
from ..metrics import alternate, inference_macs, parameter_count, step_memory
from ..training.build import build_learner, precision
from ..training.config import RunConfig
from ..training.trainer import Trainer

__all__ = ["measure"]

SECONDS = 10.0  #: for the alternating steps of all methods together; at least three rounds


def measure(
    configs: Mapping[str, RunConfig], data: ImageData, *, reference: RunConfig
) -> dict[str, dict[str, Any]]:
    """Costs by name of ``configs``: parameters, MACs of one image, bytes of a training step at its
    peak and what they are, seconds of a step, and their ratio to those of ``reference``.

    All learners take their steps in turns on the same batch. They are thrown away afterwards.
    """
    learners = {name: build_learner(config, data) for name, config in configs.items()}
    same = next((name for name, config in configs.items() if config == reference), None)
    if same is None:
        learners["reference"] = build_learner(reference, data)
    steps = {}
    for name, learner in learners.items():
        config = configs.get(name, reference)
        x, y = next(Trainer(config, data, learner).batches())
        steps[name] = _step(learner, config, x, y)
        steps[name]()  # the optimizer's state exists from now on
    costs = {}
    for name in configs:
        learner = learners[name]
        memory = step_memory(
            steps[name], [learner.model, learner.feedback], learner.optimizer, [x, y]
        )
        costs[name] = {
            "parameters": parameter_count(learner.model),
            "macs": inference_macs(learner.model, x),
            "memory": memory.as_dict(),
        }
    times = alternate(steps, rounds=15, seconds=SECONDS)
    for name in configs:
        costs[name]["step_seconds"] = times[name].median
        costs[name]["step_ratio"] = times[name].ratio(times[same or "reference"])
    return costs


def _step(learner: Learner, config: RunConfig, x: Tensor, y: Tensor) -> Callable[[], None]:
    def step() -> None:
        with precision(config):
            learner.step(x, y)

    return step
