"""What a step costs, in counts that do not depend on the machine: bytes, operations, stalls."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

import svdalign as sva
from svdalign import _parts
from svdalign._operations import Operations
from svdalign._parts import CHUNK
from svdalign.lab import models
from svdalign.lab.costs import pretending, step_memory

B, N, SIDE, RANK = 16, 32, 16, 4
METHODS = [("ssa", 0), ("ssa", 1), ("ssa", 2), ("dfa", 0), ("bp", None)]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


class Counted(Operations):
    """Counts operations and notes the largest tensor that one of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.largest = 0, 0

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        self.count += 1
        sizes = (t.untyped_storage().nbytes() for t in tree_iter(result) if isinstance(t, Tensor))
        self.largest = max(self.largest, *sizes, 0)
        return result


def chain() -> nn.Module:
    """Fused units of N channels at full resolution; the last one is pooled, to be read whole."""
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(N if i else 3, N, 3, padding=1, bias=False), nn.BatchNorm2d(N)]
        layers += [nn.ReLU()]
    net = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(N * SIDE * SIDE // 4, 4))
    return sva.fuse(sva.factorize(net, {f"{3 * i}": RANK for i in range(4)}, "channel"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("rule", "horizon"), [m for m in METHODS if m[0] != "dfa"])
def test_no_map_of_full_width_is_ever_made(
    rule: str, horizon: int | None, channels_last: bool, monkeypatch
) -> None:
    """Neither an output of N channels nor its gradient, forwards or backwards."""
    monkeypatch.setitem(CHUNK, "cpu", 1)
    model, x = chain(), torch.randn(B, 3, SIDE, SIDE)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    learner = sva.Learner(model, rule, horizon=horizon, units="layer", optimizer=sgd, example=x)
    with Counted() as seen:
        learner.step(x, torch.arange(B) % 4)
    full = B * N * SIDE * SIDE * 4
    matrices = max(p.nbytes for p in (*model.parameters(), *learner.feedback.parameters()))
    assert seen.largest <= max(full // 4, matrices)  # a quarter: the pooled output
    assert seen.largest < full // 2


@functools.cache
def on_meta(net: str, rank: float | None, image_size: int) -> nn.Module:
    """A network of half its width, for the sake of the decompositions; to be copied."""
    model = models.build(net, num_classes=10, image_size=image_size, width=0.5)
    if rank is not None:
        model = sva.fuse(sva.factorize(model, rank, "channel"))
    return model.to("meta")


def peak(net: str, rule: str, horizon: int | None, rank: float | None, **options: Any) -> int:
    """Bytes alive at the peak of a step at batch 128, worked out."""
    model = copy.deepcopy(on_meta(net, rank, 32)).to(memory_format=torch.channels_last)
    with pretending():
        x = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
        y = torch.zeros(128, dtype=torch.int64)
        learner = sva.Learner(
            model, rule, horizon=horizon, example=x[:2], **options,
            optimizer=lambda p: torch.optim.AdamW(p, 1e-3),
        )  # fmt: skip
        learner.step(x, y)
        memory = step_memory(
            lambda: learner.step(x, y), [model, learner.feedback], learner.optimizer, [x, y]
        )
    return memory.peak


def test_peaks_of_vgg13_are_in_order() -> None:
    """Of half of it; the whole is in ``benchmarks``."""
    dense, factored = peak("vgg13", "bp", None, None), peak("vgg13", "bp", None, 0.25)
    local = [peak("vgg13", "ssa", horizon, 0.25) for horizon in (0, 1, 2)]
    assert local[0] < 0.18 * dense
    assert local[0] < 0.8 * factored
    assert local[0] < local[1] < factored < 0.25 * dense
    assert local[2] < 1.1 * factored


def test_teaching_signals_of_residual_blocks_are_not_written() -> None:
    """With them a step at horizon 0 would hold 6 maps of the first stage, at horizon 1 more than 8;
    of what is left one is of the stage's input, which the call of the stage holds."""
    dense = peak("resnet20", "bp", None, None)
    first = 4 * 128 * 8 * 32 * 32
    assert peak("resnet20", "ssa", 0, 0.25) < 5.7 * first < 0.25 * dense
    assert peak("resnet20", "ssa", 1, 0.25) < 7.3 * first


def test_a_large_gradient_is_computed_twice_rather_than_held(monkeypatch) -> None:
    monkeypatch.setattr(_parts, "HELD", 0)
    assert peak("vgg13", "ssa", 0, 0.25) < 0.16 * peak("vgg13", "bp", None, None)


def test_a_step_makes_a_bounded_number_of_operations() -> None:
    """What small networks spend their time on."""

    def operations(rule: str, horizon: int | None, rank: float | None) -> int:
        model = models.build("smallconv", num_classes=10, image_size=16)
        if rank is not None:
            model = sva.fuse(sva.factorize(model, rank, "channel"))
        x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
        learner = sva.Learner(model, rule, horizon=horizon, optimizer=sgd, example=x)
        learner.step(x, y)
        with Counted() as seen:
            learner.step(x, y)
        return seen.count

    assert operations("bp", None, 0.5) < 6.5 * operations("bp", None, None)
    assert operations("ssa", 0, 0.5) < 2.5 * operations("bp", None, 0.5)


@pytest.mark.parametrize("net", ["smallconv", "resnet20"])
@pytest.mark.parametrize(("rule", "horizon"), METHODS)
def test_a_step_reads_no_value_back(net: str, rule: str, horizon: int | None) -> None:
    """On the meta device, where there are no values, whatever waits for one raises an error: what
    would stall a GPU."""
    model = copy.deepcopy(on_meta(net, 0.5, 8))
    x, y = torch.randn(6, 3, 8, 8, device="meta"), torch.zeros(6, dtype=torch.int64, device="meta")
    with pretending():  # what is checked at the start and of the first batch may read values
        learner = sva.Learner(model, rule, horizon=horizon, optimizer=sgd, example=x)
        learner.step(x, y)
    learner.step(x, y)
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
