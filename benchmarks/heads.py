"""Auxiliary heads of recent local learning methods, on this engine.

Name one in the ``changes`` of a comparison, ``trainer: benchmarks.heads:NAME``, and run it in the
folder that contains ``benchmarks``. For networks that are a ``torch.nn.Sequential`` of
convolutions, fused:

- ``auglocal``: a unit's head is a block like the one that follows the unit, trained with it.
  Source: Ma et al., *Scaling Supervised Local Learning with Augmented Auxiliary Networks* (2024),
  at a depth of one block.
- ``moving``: the head's block is a moving average of the one that follows, plus a bias that is
  trained. Source: Su et al., *Momentum Auxiliary Network for Supervised Local Learning* (2024).
- ``infopro``: two more convolutions must reconstruct the image from the unit's map, at the map's
  resolution. Source: Wang et al., *Revisiting Locally Supervised Learning* (2021).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdalign.engine import Learner
from svdalign.factors.fused import FusedConv2d
from svdalign.feedback import Feedback
from svdalign.lab.data import ImageData
from svdalign.lab.training import RunConfig, Trainer, build_learner, build_model, make_rule
from svdalign.rules import SSA, Rule, Supervision, UnitSpec
from svdalign.rules.base import task_loss

MOMENTUM = 0.99  #: of the moving averages; networks here take some hundred steps


class _ThroughABlock(nn.Module):
    """A head: a block, then a linear readout of its map."""

    def __init__(self, block: FusedConv2d, matrix: Feedback, moving: bool) -> None:
        super().__init__()
        self.block, self.matrix, self.moving = copy.deepcopy(block), matrix, moving
        if moving:
            self.block.requires_grad_(False)
            self.bias = nn.Parameter(torch.zeros(block.out_channels, 1, 1))

    def forward(self, h: Tensor) -> Tensor:
        h = self.block(h)
        return h + self.bias if self.moving else h

    @torch.no_grad()
    def follow(self, block: FusedConv2d) -> None:
        for mine, theirs in zip(self.block.parameters(), block.parameters(), strict=True):
            mine.lerp_(theirs, 1 - MOMENTUM)


class HeadSSA(SSA):
    """SSA at horizon 0 with a block like the next one as each unit's head."""

    moving: ClassVar[bool] = False
    model: ClassVar[nn.Sequential]  #: the model of the run that is being built

    def feedback(self, unit: UnitSpec, generator: torch.Generator) -> Any:
        following = _block_after(self.model, unit.name)
        if following is None:
            return super().feedback(unit, generator)
        read = self._of_the_block(unit, following)
        return _ThroughABlock(following, super().feedback(read, generator), self.moving)

    def loss(self, unit: UnitSpec, feedback: Any, h: Tensor, supervision: Supervision) -> Tensor:
        if not isinstance(feedback, _ThroughABlock):
            return super().loss(unit, feedback, h, supervision)
        assert self.alpha == 0, "similarity beside such a head was not tried"
        map = feedback(h)
        read = dataclasses.replace(unit, features_shape=tuple(map.shape))
        pooled = read.pool(map, self.grid)
        return task_loss(self.error, feedback.matrix, pooled, supervision)

    @staticmethod
    @torch.no_grad()
    def _of_the_block(unit: UnitSpec, block: FusedConv2d) -> UnitSpec:
        trial = copy.deepcopy(block)
        shape = tuple(trial(torch.zeros(unit.features_shape)).shape)
        return dataclasses.replace(unit, features_shape=shape)


class MovingHeadSSA(HeadSSA):
    moving = True


class InfoProSSA(SSA):
    """SSA at horizon 0 with a decoder of the image beside each unit's readout."""

    weight: ClassVar[float] = 1.0
    image: ClassVar[Tensor]  #: the batch, noted as the model is called

    def feedback(self, unit: UnitSpec, generator: torch.Generator) -> Any:
        matrix = super().feedback(unit, generator)
        if len(unit.features_shape) == 4 and unit.features_shape[2] > 1:
            C = unit.features_shape[1]
            matrix.decoder = nn.Sequential(
                nn.Conv2d(C, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 3, 3, padding=1)
            )
        return matrix

    def loss(self, unit: UnitSpec, feedback: Any, h: Tensor, supervision: Supervision) -> Tensor:
        loss = super().loss(unit, feedback, h, supervision)
        if not hasattr(feedback, "decoder"):
            return loss
        image = F.adaptive_avg_pool2d(self.image, h.shape[2:])
        return loss + self.weight * F.mse_loss(feedback.decoder(h), image)


def _block_after(model: nn.Sequential, name: str) -> FusedConv2d | None:
    """The convolution that follows the module ``name``, unless all that follow are linear."""
    later = list(model)[int(name) + 1 :]
    return next((module for module in later if isinstance(module, FusedConv2d)), None)


def _trainer(cls: type[SSA]) -> Callable[[RunConfig, ImageData], Trainer]:
    def make(config: RunConfig, data: ImageData) -> Trainer:
        model = build_model(config, data)
        assert isinstance(model, nn.Sequential), "these heads are for a Sequential"
        base: Rule = make_rule(config)
        rule = cls(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
        if issubclass(cls, HeadSSA):
            cls.model = model
        if issubclass(cls, InfoProSSA):
            model.register_forward_pre_hook(lambda _, args: setattr(cls, "image", args[0]))
        learner = build_learner(config, data, model, rule=rule)
        if cls is MovingHeadSSA:
            _keep_moving(learner)
        return Trainer(config, data, learner)

    return make


def _keep_moving(learner: Learner) -> None:
    """After each step every head's block moves towards the block that it averages."""

    def follow(*_: object) -> None:
        for unit in learner.units[:-1]:
            head, block = learner.feedback_of(unit), _block_after(learner.model, unit.name)
            if isinstance(head, _ThroughABlock) and block is not None:
                head.follow(block)

    learner.optimizer.register_step_post_hook(follow)


auglocal = _trainer(HeadSSA)
moving = _trainer(MovingHeadSSA)
infopro = _trainer(InfoProSSA)
