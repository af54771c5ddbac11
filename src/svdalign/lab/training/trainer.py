"""One training run. :class:`Trainer` holds all of its state, so that it can stop and continue at
any step."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...engine import Learner
from ...factors import RankCut, factored_layers, reduce_rank
from ...factors._choice import kernels_of
from ...factors.fuse import set_kernels
from ...factors.rank import parameter_budget
from ...factors.rediagonalize import spectrum
from ...storage import ranks
from .._named import import_maker
from ..costs import parameter_count
from ..data import ImageData, batches, num_batches
from .averaging import Lookahead
from .build import (
    augmentation,
    build_learner,
    evaluate,
    evaluate_views,
    example_batch,
    memory_format,
    precision,
    use_measured_kernels,
)
from .config import RunConfig
from .processes import Alone, Together
from .progress import Progress
from .same_data import fingerprint
from .schedule import learning_rate_factor

_DIVERGED = 1e4  #: a loss so many times that of a guess is divergence

_STATE = ("epoch", "batch", "seconds", "epoch_seconds", "history")
_SUMS = ("loss_sum", "accuracy_sum")  #: of this process's share of the batches of an epoch


_SAMPLES = 9  #: so many of a layer's singular values are kept for each epoch


@dataclass(frozen=True)
class Running:
    """Means over the epoch so far; NaN before its first step."""

    loss: float
    accuracy: float


class Trainer:
    """Trains ``learner`` on ``data`` as ``config`` says.

    Its state is ``epoch`` (epochs done), ``batch`` (batches done of the next), the learner, the
    sums over the epoch so far, ``history`` (a row an epoch) and ``seconds`` of training. The order
    of the data is a function of (seed, epoch, batch) and the learning rate one of the step, so they
    need no state of their own. ``team``: the processes that train it, see :mod:`processes`.
    ``measure``: called at the end of each epoch; returns entries for its row, and leaves the
    learner as it was.
    """

    def __init__(
        self,
        config: RunConfig,
        data: ImageData,
        learner: Learner,
        *,
        measure: Callable[[Learner], dict[str, Any]] | None = None,
    ) -> None:
        self.config = config
        self.data = data
        self.learner = learner
        self.measure = measure
        self.team = Alone(learner)
        self.epoch = 0
        self.batch = 0
        self.seconds = 0.0
        self.epoch_seconds = 0.0
        self.diverged = False
        self.history: list[dict[str, Any]] = []
        device = data.train.device
        self.loss_sum = torch.zeros((), device=device)
        self.accuracy_sum = torch.zeros((), device=device)
        self._parts: dict[str, Tensor] = {}  # of a checkpoint's sums, all processes' own
        # All batches have one size: the rest of an epoch is dropped, other images each time.
        self._drop_last = len(data.train) > config.batch_size
        self.steps_per_epoch = num_batches(data.train, config.batch_size, drop_last=self._drop_last)
        if config.rank_parameters is not None:  # refused now if it cannot be reached
            try:
                parameter_budget(learner.model, config.rank_parameters)
            except ValueError as error:
                raise ValueError(f"rank_{error}") from None
        self.lookahead: Lookahead | None = None
        self._cut_ranks(0)  # a checkpoint that is loaded after this brings ranks of its own
        if config.lookahead is not None:
            self.lookahead = Lookahead(learner.model, config.lookahead)

    @cached_property
    def data_fingerprint(self) -> dict[str, Any]:
        """What its checkpoints recognise the data by."""
        return fingerprint(self.data)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def global_step(self) -> int:
        """Steps done."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def images_per_second(self) -> float:
        """Training speed over the epoch so far."""
        size = min(self.config.batch_size, len(self.data.train))
        return self.batch * size / self.epoch_seconds if self.batch else 0.0

    def running(self) -> Running:
        """Training loss and accuracy of the epoch so far. Waits for the device."""
        if not self.batch:
            return Running(math.nan, math.nan)
        return Running(self.loss_sum.item() / self.batch, self.accuracy_sum.item() / self.batch)

    def run(
        self,
        *,
        name: str = "",
        progress: Progress | None = None,
        on_step: Callable[[], None] = lambda: None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> str:
        """Train to the end; after every step ``on_step`` is told and ``stop`` asked.

        Returns ``"finished"``, ``"interrupted"`` if ``stop`` said so, or ``"diverged"`` if an
        epoch left weights that are not finite, or if its mean loss is not finite or more than
        ``_DIVERGED`` times that of a guess.
        """
        progress = progress or Progress()
        progress.start(name, self)
        status = "finished"
        while status == "finished" and self.epoch < self.config.epochs:
            for x, y in self.batches():
                self.step(x, y)
                progress.step(self)
                on_step()
                if stop():
                    status = "interrupted"
                    break
            if self.batch == self.steps_per_epoch:
                row = self.finish_epoch()
                on_epoch(row)
                progress.epoch(self, row)
                if self.diverged:
                    status = "diverged"
        if self.epoch == self.config.epochs and status == "interrupted":
            status = "finished"
        progress.end(self, status)
        return status

    def join(self) -> None:
        """Train from here on with the other processes, as ``config.parallel`` says."""
        x = example_batch(self.config, self.data, self.config.batch_size)
        y = self.data.train.labels[: len(x)]
        self.team = Together(self.config, self.learner, (x, y))
        self._take_parts()

    def _take_parts(self) -> None:
        for name, parts in self._parts.items():
            setattr(self, name, self.team.own(parts))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches that are left of the present epoch, or this process's part of
        them. Without values where activations come from another process."""
        if self.team.part is None:
            labels = self.data.train.labels[: self.config.batch_size]
            images = torch.zeros((), device=labels.device)
            images = images.expand(len(labels), *self.data.train.shape)
            return itertools.repeat((images, labels), self.steps_per_epoch - self.batch)
        return batches(
            self.data.train,
            self.config.batch_size,
            mean=self.data.mean,
            std=self.data.std,
            shuffle=True,
            seed=self.config.seed,
            epoch=self.epoch,
            start=self.batch,
            augment=augmentation(self.config, self.data),
            drop_last=self._drop_last,
            memory_format=memory_format(self.config),
            part=self.team.part,
        )

    def step(self, x: Tensor, y: Tensor) -> None:
        """One update at the learning rate of this step. Waits for nothing on the device."""
        started = time.perf_counter()
        self._set_learning_rate()
        with precision(self.config):
            report = self.team.step(x, y)
        if self.lookahead is not None:
            done = self.global_step + 1
            if self.lookahead.update(self.learner.model, done, self.total_steps):
                self.learner.retract()
        self.loss_sum += report.loss
        if report.accuracy is not None:
            self.accuracy_sum += report.accuracy
        self.batch += 1
        self.epoch_seconds += time.perf_counter() - started

    def finish_epoch(self) -> dict[str, Any]:
        """Close the epoch: cut ranks if it is time to, unless the run has diverged, and evaluate.
        Returns a row of ``history``."""
        for name in _SUMS:
            setattr(self, name, self.team.parts(getattr(self, name)).mean())
        with self.team.whole():
            return self._finish_epoch()

    def _finish_epoch(self) -> dict[str, Any]:
        running, speed = self.running(), self.images_per_second
        rate = self.learner.optimizer.param_groups[0]["lr"]
        self.seconds += self.epoch_seconds
        weights = self.learner.model.parameters()
        finite = all(bool(p.isfinite().all()) for p in weights)
        guess = math.log(max(self.data.num_classes, 2))  # loss of equal probabilities
        self.diverged = not (finite and running.loss <= _DIVERGED * guess)
        kept = {} if self.diverged else self._cut_ranks(self.epoch + 1)
        model, config = self.learner.model, self.config
        test_loss, test_accuracy = evaluate(model, self.data, config, self.team)
        row = {
            "epoch": self.epoch + 1,
            "loss": running.loss,
            "train_accuracy": running.accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "lr": rate,
            "seconds": self.epoch_seconds,
            "images_per_second": speed,
            "ranks": ranks(self.learner.model),
            "kept_energy": kept,
            "spectra": spectra(self.learner.model) if finite else {},
        }
        if config.tta and self.epoch + 1 == config.epochs:
            row["tta_loss"], row["tta_accuracy"] = evaluate_views(
                model, self.data, config, self.team
            )
        if self.measure is not None:
            row |= self.measure(self.learner)
        self.history.append(row)
        self.epoch += 1
        self.batch = 0
        self.epoch_seconds = 0.0
        self.loss_sum.zero_()
        self.accuracy_sum.zero_()
        return row

    def state_dict(self) -> dict[str, Any]:
        """All of the trainer's own state, beside the learner's."""
        average = {} if self.lookahead is None else {"average": self.lookahead.average}
        kernels = {"kernels": kernels_of(self.learner.model)}
        # Summed up at each checkpoint, they would depend on when that was.
        sums = {name: self.team.parts(getattr(self, name)) for name in _SUMS}
        return {name: getattr(self, name) for name in _STATE} | sums | average | kernels

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        device = self.loss_sum.device
        for name in _STATE:
            setattr(self, name, state[name])
        self._parts = {name: state[name].to(device) for name in _SUMS}
        self._take_parts()
        if self.lookahead is not None:
            self.lookahead.average = {n: v.to(device) for n, v in state["average"].items()}
        set_kernels(self.learner.model, state.get("kernels", {}))  # not in checkpoints of 0.1.0

    def _cut_ranks(self, epoch: int) -> dict[str, float]:
        """Cut the factored layers if the config says so after ``epoch`` epochs. Returns, for each
        that was cut, the share of its energy that was kept."""
        if not self.config.cuts_rank_after(epoch):
            return {}
        cuts = self._reduce_rank(self._limits(epoch))
        use_measured_kernels(self.config, self.data, self.learner.model)
        if self.lookahead is not None:
            self.lookahead.restart(self.learner.model)
        return {cut.name: cut.energy for cut in cuts if cut.after < cut.before}

    def _reduce_rank(self, limits: dict[str, Any]) -> tuple[RankCut, ...]:
        return reduce_rank(self.learner.model, self.learner.optimizer, **limits)

    def _limits(self, epoch: int) -> dict[str, Any]:
        """What the cut after ``epoch`` epochs leaves, as arguments of :func:`reduce_rank`."""
        config, model = self.config, self.learner.model
        if config.rank_parameters is None:
            return {
                "energy": config.rank_energy,
                "ratio": config.rank_ratio,
                "min_rank": config.rank_min,
            }
        wanted = parameter_budget(model, config.rank_parameters)
        now = parameter_count(model)
        share = min(1.0, wanted / now) ** (1 / (config.cuts_left_after(epoch) + 1))
        return {"parameters": max(wanted, int(now * share)), "min_rank": config.rank_min}

    def _set_learning_rate(self) -> None:
        rate = self.config.rate * learning_rate_factor(
            self.config.schedule, self.global_step, self.total_steps, self.config.warmup
        )
        for group in self.learner.optimizer.param_groups:  # a group may scale the rate
            group["lr"] = rate * group.get("lr_scale", 1.0)


def build_trainer(config: RunConfig, data: ImageData) -> Trainer:
    """The trainer that the config describes, ready for its first step.

    Raises ValueError for what cannot be built.
    """
    if config.trainer is None:
        return Trainer(config, data, build_learner(config, data))
    trainer = import_maker(config.trainer, "config", "data")(config=config, data=data)
    if not isinstance(trainer, Trainer):
        raise ValueError(
            f"trainer {config.trainer} must make a svdalign.lab.training.Trainer, "
            f"got {type(trainer).__name__}"
        )
    return trainer


def spectra(model: nn.Module) -> dict[str, list[float]]:
    """Singular values of each factored layer, by its name, from largest to smallest: at most
    :data:`_SAMPLES`, evenly spread, to three digits."""
    found = {}
    for name, layer in factored_layers(model).items():
        values = spectrum(layer)
        chosen = torch.linspace(0, len(values) - 1, min(_SAMPLES, len(values))).round().long()
        found[name] = [float(f"{value:.3g}") for value in values[chosen.to(values.device)]]
    return found
