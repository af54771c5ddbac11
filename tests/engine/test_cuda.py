"""On a CUDA device: the same gradients, and no step that waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import svdalign as sva
from svdalign.factors import factored_layers
from svdalign.factors.fuse import fuse_where_possible
from svdalign.lab import models
from svdalign.lab.costs import step_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

METHODS = [("ssa", 0), ("ssa", 2), ("dfa", 0), ("fa", None), ("bp", None)]


def network(name: str, *, fused: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = sva.factorize(models.build(name, num_classes=10, image_size=32, width=0.5), 0.5)
    return fuse_where_possible(model) if fused else model


def batch(device: str, dtype: torch.dtype = torch.float32, size: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x.to(device), (torch.arange(size) % 10).to(device)


def learner(model: nn.Module, x: Tensor, rule: str, horizon: int | None) -> sva.Learner:
    return sva.Learner(
        model,
        rule,
        horizon=horizon,
        optimizer=lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
        example=x,
    )


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("net", ["smallconv", "resnet20", "vit_s16"])
@pytest.mark.parametrize(("rule", "horizon"), METHODS)
def test_a_step_does_not_wait(net: str, rule: str, horizon: int | None, precision: str) -> None:
    x, y = batch("cuda")
    model = network(net, fused=rule != "fa").cuda()
    local = learner(model, x, rule, horizon)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        local.step(x, y)  # what is checked of the first batch may read values
        with waiting_is_an_error():
            report = local.step(x, y)
    assert torch.isfinite(report.loss)


def test_what_waits_is_an_error_above() -> None:
    with waiting_is_an_error(), pytest.raises(RuntimeError):
        torch.ones((), device="cuda").item()


@pytest.mark.parametrize("net", ["smallconv", "resnet20", "vit_s16"])
@pytest.mark.parametrize(("rule", "horizon"), METHODS)
def test_gradients_are_those_of_the_cpu(net: str, rule: str, horizon: int | None) -> None:
    found = []
    for device in ("cpu", "cuda"):
        x, y = batch(device, torch.float64, 8)
        model = network(net, fused=rule != "fa").to(device, torch.float64)
        found.append(learner(model, x, rule, horizon).gradients(x, y))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name].cpu(), gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_cuts_retraction_and_files(optimizer: str, tmp_path: Path) -> None:
    x, y = batch("cuda")

    def made() -> sva.Learner:
        model = network("smallconv").cuda()

        def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            if optimizer == "muon":
                return sva.Muon(parameters, model, 0.02)
            return torch.optim.AdamW(parameters, 1e-2, fused=True)

        return sva.Learner(model, "ssa", optimizer=make, example=x)

    local = made()
    first = local.step(x, y).loss
    assert sva.reduce_rank(local.model, local.optimizer, energy=0.8)
    losses = [local.step(x, y).loss for _ in range(10)]
    assert losses[-1] < first
    for name, layer in factored_layers(local.model).items():
        eye = torch.eye(layer.rank, device="cuda")
        torch.testing.assert_close(layer.U.mT @ layer.U, eye, rtol=0, atol=1e-4, msg=name)
    sva.save(local, tmp_path / "learner.safetensors")
    other = made()
    sva.load(tmp_path / "learner.safetensors", into=other)
    torch.testing.assert_close(other.step(x, y).loss, local.step(x, y).loss)
    model = local.model.eval()
    torch.testing.assert_close(sva.compact(model)(x), model(x), rtol=1e-3, atol=1e-3)


def test_local_learning_holds_less() -> None:
    """As the allocator counts it."""

    def peak(rule: str, horizon: int | None) -> int:
        x, y = batch("cuda", size=256)
        local = learner(network("smallconv").cuda(), x, rule, horizon)
        local.step(x, y)
        held = [local.model, local.feedback]
        return step_memory(lambda: local.step(x, y), held, local.optimizer, [x, y]).peak

    assert peak("ssa", 0) < 0.9 * peak("bp", None)
