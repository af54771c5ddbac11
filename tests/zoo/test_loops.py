"""A user's own loop: accumulation, clipping, mixed precision, averaging, schedules, modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.zoo.nets import NETS, ViT
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import svdalign as sva
from svdalign.factors import FactoredLayer
from svdalign.factors.stiefel import orthogonality_error
from svdalign.rules import Rule

RULES = ["ssa", sva.rules.SSA(horizon=2), "ssa-reconstruction", "dfa", "bp"]


def net(dropout: float = 0.0, norm: bool = True) -> nn.Module:
    def normed(width: int) -> nn.Module:
        return nn.BatchNorm2d(width) if norm else nn.Identity()

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), normed(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(dropout), nn.Conv2d(8, 16, 3, padding=1), normed(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def learner(model: nn.Module, x: Tensor, rule: str | Rule = "ssa", **options: Any) -> sva.Learner:
    return sva.Learner(
        model, rule, optimizer=lambda p: torch.optim.AdamW(p, 1e-2), example=x, **options
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_accumulated_batches_are_their_mean(rule: str, fashion: tuple[Tensor, Tensor]) -> None:
    x, y = fashion
    local = learner(sva.factorize(net(norm=False)), x, rule)
    parts = [local.gradients(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)]
    for i in (0, 16, 32):
        local.backward(x[i : i + 16], y[i : i + 16], scale=lambda loss: loss / 3)
    for name, p in local.model.named_parameters():
        torch.testing.assert_close(p.grad, sum(g[name] for g in parts) / 3, rtol=1e-4, atol=1e-6)


def test_step_is_backward_and_update(fashion: tuple[Tensor, Tensor]) -> None:
    x, y = fashion
    models = [sva.factorize(net())]
    models.append(sva.factorize(net()))
    models[1].load_state_dict(models[0].state_dict())
    a, b = (learner(m, x) for m in models)
    for _ in range(3):
        a.step(x, y)
        b.optimizer.zero_grad()
        b.backward(x, y)
        b.update()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_clipping_the_global_norm(fashion: tuple[Tensor, Tensor]) -> None:
    x, y = fashion
    local = learner(sva.factorize(net()), x)
    free = local.gradients(x, y)
    local.backward(x, y)
    norm = nn.utils.clip_grad_norm_(local.model.parameters(), 0.1)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in free.values()]).norm())
    clipped = torch.cat([p.grad.flatten() for p in local.model.parameters()])
    assert clipped.norm() <= 0.1 + 1e-6
    local.update()


# --- mixed precision ------------------------------------------------------------------------------


def precision(device: str, dtype: torch.dtype) -> Any:
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    marks = [pytest.mark.gpu, absent] if device == "cuda" else []
    return pytest.param(device, dtype, marks=marks, id=f"{device}-{dtype}")


BFLOAT16 = [precision("cpu", torch.bfloat16), precision("cuda", torch.bfloat16)]
FLOAT16 = [precision("cpu", torch.float16), precision("cuda", torch.float16)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BFLOAT16)
def test_autocast_gives_the_gradients_roughly(
    rule: str, device: str, dtype: torch.dtype, fashion: tuple[Tensor, Tensor]
) -> None:
    x, y = (t.to(device) for t in fashion)
    local = learner(sva.factorize(net(norm=False)).to(device), x, rule)
    exact = local.gradients(x, y)
    with torch.autocast(device, dtype):
        rough = local.gradients(x, y)
    assert rough.keys() == exact.keys()
    for name, gradient in exact.items():
        assert rough[name].dtype == torch.float32
        off = (rough[name] - gradient).norm() / gradient.norm().clamp_min(1e-3)
        assert off < 0.25, name


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BFLOAT16)
def test_autocast_around_whole_steps_learns_and_keeps_weights_exact(
    rule: str, device: str, dtype: torch.dtype, fashion: tuple[Tensor, Tensor]
) -> None:
    """Within one autocast, whose cache of low-precision weights must not outlive an update; and the
    retraction is not rounded to bfloat16."""
    x, y = (t.to(device) for t in fashion)
    local = learner(sva.factorize(net()).to(device), x, rule)
    with torch.autocast(device, dtype):
        losses = [local.step(x, y).loss for _ in range(12)]
    assert losses[-1] < 0.85 * losses[0]
    for module in local.model.modules():
        if isinstance(module, FactoredLayer):
            assert orthogonality_error(module.U) < 1e-4
            assert orthogonality_error(module.V) < 1e-4


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), FLOAT16)
def test_grad_scaler_keeps_small_gradients(
    rule: str, device: str, dtype: torch.dtype, fashion: tuple[Tensor, Tensor]
) -> None:
    """With losses so small that float16 rounds their gradients away, scaling brings them back."""
    x, y = (t.to(device) for t in fashion)
    small = lambda z, y: 1e-6 * F.cross_entropy(z, y)  # noqa: E731
    torch.manual_seed(1)
    model = sva.factorize(net(norm=False)).to(device)
    plain = sva.rules.get(rule)  # its task term alone: the others are not small
    plain = replace(plain, alpha=0.0, beta=0.0) if hasattr(plain, "alpha") else plain
    local = learner(model, x, plain, loss=small)
    exact = local.gradients(x, y)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**20)
    before = {n: p.detach().clone() for n, p in local.model.named_parameters()}
    local.optimizer.zero_grad()
    with torch.autocast(device, dtype):
        report = local.backward(x, y, scale=scaler.scale)
    assert report.loss < 1e-5, "what is reported is not scaled"
    scaler.unscale_(local.optimizer)
    for name, p in local.model.named_parameters():
        off = (p.grad - exact[name]).norm() / exact[name].norm().clamp_min(1e-9)
        assert off < 0.25, name
    scaler.step(local.optimizer)
    scaler.update()
    local.after_update()
    assert all(not torch.equal(p, before[n]) for n, p in local.model.named_parameters())


@pytest.mark.parametrize("rule", ["ssa-reconstruction", "dfa"])
def test_the_first_pass_leaves_autocast_no_weights_without_grad(
    rule: str, fashion: tuple[Tensor, Tensor]
) -> None:
    """The pass that finds the output's error runs without grad; autocast caches the copies of
    weights it makes, and such copies would cut the second pass off from the weights."""
    x, y = fashion
    local = learner(sva.factorize(net()), x, rule)
    with torch.autocast("cpu", torch.bfloat16):
        grads = local.gradients(x, y)
    assert grads.keys() == {n for n, _ in local.model.named_parameters()}


# --- two passes -----------------------------------------------------------------------------------


def test_dropout_and_batch_norm_see_one_pass(fashion: tuple[Tensor, Tensor]) -> None:
    """``error="output"`` runs the network twice: same masks, statistics counted once."""
    x, y = fashion
    model = sva.factorize(net(dropout=0.5))
    masks: list[Tensor] = []
    model[4].register_forward_hook(lambda m, a, out: masks.append(out.detach() != 0))
    local = learner(model, x, "ssa-reconstruction")
    masks.clear()
    torch.manual_seed(5)
    local.backward(x, y)
    assert len(masks) == 2
    assert torch.equal(masks[0], masks[1])
    after = torch.get_rng_state()
    assert model[1].num_batches_tracked == 1
    plain = sva.factorize(net(dropout=0.5))
    plain.load_state_dict(model.state_dict())
    plain[1].reset_running_stats()
    torch.manual_seed(5)
    with torch.no_grad():
        plain(x)
    assert torch.equal(after, torch.get_rng_state())
    torch.testing.assert_close(plain[1].running_mean, model[1].running_mean)


def test_evaluation_in_between_changes_nothing(fashion: tuple[Tensor, Tensor]) -> None:
    x, y = fashion
    models = [sva.factorize(net()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    a, b = (learner(m, x) for m in models)
    for _ in range(2):
        a.step(x, y)
        b.step(x, y)
        models[1].eval()
        with torch.no_grad():
            models[1](x)
        models[1].train()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_model_in_evaluation_mode_learns_with_fixed_statistics(
    fashion: tuple[Tensor, Tensor],
) -> None:
    x, y = fashion
    model = sva.factorize(net(dropout=0.5)).eval()
    before = model[1].running_mean.clone()
    learner(model, x).step(x, y)
    assert torch.equal(model[1].running_mean, before)
    assert not model.training


# --- around the optimizer -------------------------------------------------------------------------


def test_average_of_weights(fashion: tuple[Tensor, Tensor]) -> None:
    x, y = fashion
    model = sva.factorize(net())
    local = learner(model, x)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    first = model[0].s.detach().clone()
    local.step(x, y)
    average.update_parameters(model)
    torch.testing.assert_close(average.module[0].s, (first + model[0].s) / 2)
    with torch.no_grad():
        assert average(x).shape == (len(x), 10)


def test_parameter_groups_and_schedules(fashion: tuple[Tensor, Tensor]) -> None:
    x, y = fashion
    model = sva.factorize(net())

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        own = {id(p) for p in model.parameters()}
        matrices = [p for p in parameters if p.ndim > 1 and id(p) in own]
        vectors = [p for p in parameters if p.ndim < 2 and id(p) in own]
        feedback = [p for p in parameters if id(p) not in own]
        return torch.optim.SGD(
            [
                {"params": matrices, "lr": 0.1},
                {"params": vectors, "lr": 0.0},
                {"params": feedback, "lr": 0.2},
            ]
        )

    local = sva.Learner(model, optimizer=optimizer, example=x)
    schedule = torch.optim.lr_scheduler.StepLR(local.optimizer, 1, 0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    local.step(x, y)
    schedule.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (p.ndim < 2), name
    assert [g["lr"] for g in local.optimizer.param_groups] == [0.05, 0.0, 0.1]


# --- compiled -------------------------------------------------------------------------------------


@contextmanager
def kept_buffers() -> Iterator[None]:
    """A compiled unit whose graph is used again, as a horizon above 0 does, has to keep it."""
    from torch._functorch import config

    before, config.donated_buffer = config.donated_buffer, False
    try:
        yield
    finally:
        config.donated_buffer = before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", ["ssa", "fa"])
def test_compiled_units_give_the_same_gradients(rule: str, fashion: tuple[Tensor, Tensor]) -> None:
    """Learning compiles the units, looking for them does not: the hooks in them would be traced,
    and the code be of no use afterwards."""
    x, y = fashion[0][:16], fashion[1][:16]
    model = sva.factorize(ViT(16, 2))
    plain = learner(model, x, rule).gradients(x, y)
    compiled: list[Any] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    with kept_buffers():
        for block in model.blocks:
            block.compile(backend=backend)
        local = learner(model, x, rule)
        assert not compiled
        gradients = local.gradients(x, y)
    assert compiled
    assert gradients.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["cifar-resnet", "vit", "mobilenet-v2", "torch-encoder"])
def test_architectures_under_autocast(name: str, fashion: tuple[Tensor, Tensor]) -> None:
    x, y = fashion[0][:32], fashion[1][:32]
    local = learner(sva.factorize(NETS[name]()), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(local.step(x, y).loss)
    assert all(torch.isfinite(p.grad).all() for p in local.model.parameters())
