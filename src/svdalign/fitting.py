"""Which settings of a learner fit into a memory, and what a step takes with each."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ._copying import copied
from ._memory import step_memory
from .engine import Learner
from .rules import Rule
from .task import Loss

_MIB = 2**20

#: From the settings most like backpropagation to those that take the least memory.
_SETTINGS: tuple[tuple[str, int | None, bool], ...] = (
    ("block", None, False), ("block", 2, False), ("block", 1, False), ("balanced", 0, False),
    ("balanced-3", 0, False), ("block", 0, False), ("balanced", 0, True), ("block", 0, True),
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """``units``, ``horizon`` and ``recompute`` of a :class:`svdalign.Learner`; of a step with them
    the bytes alive at its ``peak`` and its ``seconds``, as measured; how many units there are."""

    units: str
    horizon: int | None
    recompute: bool
    count: int
    peak: int
    seconds: float


@dataclass(frozen=True)
class Choices:
    """The settings that were measured, and the bytes that there are for a step (None: any)."""

    settings: tuple[Setting, ...]
    memory: int | None

    @property
    def fitting(self) -> tuple[Setting, ...]:
        """Those that fit, the ones that learn most like backpropagation first."""
        return tuple(s for s in self.settings if self.memory is None or s.peak <= self.memory)

    def __str__(self) -> str:
        lines = ["units        horizon  recompute  units  peak, MiB  ms a step  fits"]
        for s in self.settings:
            horizon = "None" if s.horizon is None else str(s.horizon)
            lines.append(
                f"{s.units:12} {horizon:>7}  {'yes' if s.recompute else 'no':>9}  {s.count:>5}  "
                f"{s.peak / _MIB:>9.1f}  {1e3 * s.seconds:>9.1f}  "
                f"{'yes' if s in self.fitting else 'no':>4}"
            )
        return "\n".join(lines)


def plan(
    model: nn.Module,
    example: Any,
    memory: int | str | None = None,
    *,
    y: Tensor | None = None,
    rule: str | Rule = "ssa",
    loss: Loss | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = torch.optim.AdamW,
) -> Choices:
    """Measure which settings of a learner keep a training step of ``model`` within ``memory``.

    Three steps are taken with each setting on a copy of ``model``; settings whose units the model
    does not have are left out. What is alive at the peak
    (parameters, gradients, optimizer state, batch, activations) does not depend on the machine, the
    time does. Where memory is a GPU's it is read off torch's allocator.

    Args:
        model: the module to train, as it will be given to the learner.
        example: a batch of inputs as large as in training.
        memory: the most that a step may take: bytes, or text such as ``"64MiB"`` or ``"2 GB"``;
            None for any.
        y: the targets of ``example``; by default class 0 for each sample.
        rule: as for :class:`svdalign.Learner`.
        loss: likewise.
        optimizer: likewise.

    Returns:
        The settings with their bytes and seconds; print it to see them as a table.

    Raises:
        TypeError, ValueError: for text that is no amount of memory, and what a learner refuses.
    """
    limit = _bytes(memory)
    if y is None:
        x = next(t for t in tree_leaves(example) if isinstance(t, Tensor) and t.ndim)
        y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    found, seen = list[Setting](), set[object]()
    for units, horizon, recompute in _SETTINGS:
        try:
            learner = Learner(
                copied(model), rule, units=units, horizon=horizon, recompute=recompute, loss=loss,
                example=example, optimizer=optimizer,
            )  # fmt: skip
        except ValueError:
            if not found:  # not even backpropagation
                raise
            continue
        names = tuple(unit.name for unit in learner.units) if horizon is not None else None
        if (names, horizon, recompute) not in seen:
            seen.add((names, horizon, recompute))
            peak, seconds = _costs(learner, example, y)
            found.append(Setting(units, horizon, recompute, len(names or "1"), peak, seconds))
    return Choices(tuple(found), limit)


def _costs(learner: Learner, x: Any, y: Tensor) -> tuple[int, float]:
    """Bytes at the peak of a step that is not the first, and seconds of one."""
    learner.step(x, y)  # the optimizer's state exists from now on
    batch = [t for t in (*tree_leaves(x), y) if isinstance(t, Tensor)]
    modules = [learner.model, learner.feedback]
    peak = step_memory(lambda: learner.step(x, y), modules, learner.optimizer, batch).peak
    start = time.perf_counter()
    float(learner.step(x, y).loss)  # waits for the device
    return peak, time.perf_counter() - start


_POWERS = {"": 0, "k": 1, "m": 2, "g": 3}


def _bytes(memory: int | str | None) -> int | None:
    if memory is None or (isinstance(memory, int) and not isinstance(memory, bool)):
        return memory
    text = memory if isinstance(memory, str) else ""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)(i?)b\s*", text, re.IGNORECASE)
    if found is None:
        raise ValueError(
            f"memory must be a whole number of bytes or text such as '64MiB', got {memory!r}"
        )
    number, power, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[power.lower()])
