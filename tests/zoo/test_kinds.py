"""Kinds of models x targets x losses x rules: what backpropagation trains every rule trains, with
the same loss; what it does not is refused in words of this library. And what holds by definition
for every kind of model: gradients that units hand on, state, random numbers, resuming, shipping."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles.nets import RunningMean
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils.checkpoint import checkpoint

import svdalign as sva
from svdalign._copying import copied
from svdalign.engine.forward import forward
from svdalign.rules import Rule

QUIET = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
LIBRARY = Path(sva.__file__).parent
B, C, N = 6, 4, 5  # samples, classes, places along an axis
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}

# --- models: what makes one, its input, and how its output is laid out ---------------------------


class Run(nn.Module):
    """Modules by name, and how they are run."""

    def __init__(self, run: Callable[[Any, Any], Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def mlp(change: Callable[[nn.Module], Any] = lambda layer: None, *tail: nn.Module) -> nn.Module:
    net = nn.Sequential(
        nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, C), *tail
    )
    for layer in (net[0], net[2]):
        change(layer)
    return net


def frozen(*at: int) -> nn.Module:
    net = mlp()
    for i in at:
        net[i].requires_grad_(False)
    return net


def scripted() -> nn.Module:
    part = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
    return nn.Sequential(nn.Linear(8, 12), torch.jit.script(part), nn.Linear(12, C))


def convnet(axes: int) -> nn.Module:
    conv, norm = CONV[axes], NORM[axes]
    return nn.Sequential(
        conv(2, 8, 3, padding=1), norm(8), nn.ReLU(inplace=True),
        conv(8, 12, 3, 2, 1), norm(12), nn.SiLU(), POOL[axes](1), nn.Flatten(), nn.Linear(12, C),
    )  # fmt: skip


def by_place(axes: int) -> nn.Module:
    conv = CONV[axes]
    return nn.Sequential(conv(2, 8, 3, 1, 1), nn.ReLU(), conv(8, 8, 3, 1, 1), conv(8, C, 1))


def experts(net: Any, x: Tensor) -> Tensor:
    h, out = F.relu(net.first(x)), torch.zeros(len(x), 12, dtype=x.dtype)
    for i, expert in enumerate(net.experts):
        mine = torch.arange(len(x)) % 2 == i
        out[mine] = expert(h[mine])
    return net.last(out)


def recurrent(kind: type[nn.RNNBase], run: Callable[[Any, Any], Any], **options: Any) -> nn.Module:
    return Run(
        lambda net, x: run(net, net.rnn(net.table(x))[0]), table=nn.Embedding(20, 10),
        rnn=kind(10, 12, batch_first=True, **options),
        last=nn.Linear(24 if options.get("bidirectional") else 12, C),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class State:
    h: Tensor
    sum: Tensor


def stateful(net: Any, x: Tensor) -> Tensor:
    """Blocks that take and return a dataclass."""
    state = State(net.first(x), torch.zeros(len(x), 12, dtype=x.dtype))
    for block in net.blocks:
        h = block(state.h)
        state = net.join(State(h, state.sum + h))
    return net.last(state.sum)


def wavenet(net: Any, x: Tensor) -> Tensor:
    """Each block returns what goes on and what is read at the end; nothing reads where it goes on
    to from the last."""
    h, read = net.first(x), []
    for block in net.blocks:
        h, skip = block(h)
        read.append(skip)
    return net.last(torch.stack(read).sum(0).relu())


def gated(block: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    made = block.wave(h).tanh() * block.gate(h).sigmoid()
    return h + block.on(made), block.skip(made)


def unet(net: Any, x: Tensor) -> Tensor:
    fine = net.down(x).relu()
    coarse = net.middle(F.max_pool2d(fine, 2)).relu()
    return net.last(net.join(torch.cat([net.up(coarse), fine], 1)).relu())


def recomputed(net: Any, x: Tensor) -> Tensor:
    h = net.first(x)
    for block in net.blocks:
        h = h + checkpoint(block, h, use_reentrant=False)
    return net.last(h)


def cells(net: Any, x: Tensor) -> Tensor:
    """A loop over the first axis, which is time."""
    h = c = x.new_zeros(B, 12)
    for now in x:
        h, c = net.cell(now, (h, c))
    return net.last(h)


def two_heads(net: Any, x: Tensor) -> dict[str, Tensor]:
    h = net.body(x)
    return {"aux": net.aux(h), "logits": net.last(h)}


def block(width: int = 12) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def blocks(run: Callable[[Any, Any], Any], **more: nn.Module) -> nn.Module:
    return Run(
        run, first=nn.Linear(8, 12), blocks=nn.ModuleList(block() for _ in range(2)),
        last=nn.Linear(12, C), **more,
    )  # fmt: skip


vectors, ids = partial(torch.randn, B, 8), partial(torch.randint, 20, (B, N))
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "mlp": (mlp, vectors, "sample"),
    "weight norm": (partial(mlp, parametrizations.weight_norm), vectors, "sample"),
    "old weight norm": (partial(mlp, weight_norm), vectors, "sample"),
    "orthogonal": (partial(mlp, parametrizations.orthogonal), vectors, "sample"),
    "spectral norm": (partial(mlp, parametrizations.spectral_norm), vectors, "sample"),
    "pruned": (partial(mlp, lambda m: prune.l1_unstructured(m, "weight", 0.3)), vectors, "sample"),
    "flat": (lambda: nn.Sequential(mlp(), nn.Linear(C, 1), nn.Flatten(0)), vectors, "number"),
    "first frozen": (partial(frozen, 0), vectors, "sample"),
    "last frozen": (partial(frozen, 4), vectors, "sample"),
    "scripted part": (scripted, vectors, "sample"),
    "named input": (mlp, lambda: {"input": torch.randn(B, 8)}, "sample"),
    "several outputs": (
        lambda: Run(lambda n, x: {"aux": n.net(x)[:, :2], "logits": n.net(x)}, net=mlp()),
        vectors, "sample",
    ),
    "branches": (
        lambda: Run(
            lambda n, x: n.last(torch.cat([n.left(x).relu(), n.right(x).tanh()], 1)),
            left=nn.Linear(8, 6), right=nn.Linear(8, 6), last=nn.Linear(12, C),
        ), vectors, "sample",
    ),
    "one layer three times": (
        lambda: Run(
            lambda n, x: n.last(n.same(n.same(n.same(n.first(x)).tanh()).tanh()).tanh()),
            first=nn.Linear(8, 12), same=nn.Linear(12, 12), last=nn.Linear(12, C),
        ), vectors, "sample",
    ),
    "experts": (
        lambda: Run(
            experts, first=nn.Linear(8, 12), last=nn.Linear(12, C),
            experts=nn.ModuleList(nn.Linear(12, 12) for _ in range(2)),
        ), vectors, "sample",
    ),
    "bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(20, 12), nn.Linear(12, 12), nn.Linear(12, C)),
        ids, "sample",
    ),
    "lstm": (
        lambda: recurrent(nn.LSTM, lambda n, h: n.last(h[:, -1]), bidirectional=True),
        ids, "sample",
    ),
    "gru of tokens": (lambda: recurrent(nn.GRU, lambda n, h: n.last(h)), ids, "last"),
    "last state": (
        lambda: Run(
            lambda n, x: n.last(n.rnn(n.table(x))[1][0][-1]), table=nn.Embedding(20, 10),
            rnn=nn.LSTM(10, 12, 2, batch_first=True), last=nn.Linear(12, C),
        ), ids, "sample",
    ),
    "cells": (
        lambda: Run(cells, cell=nn.LSTMCell(8, 12), last=nn.Linear(12, C)),
        partial(torch.randn, 3, B, 8), "sample",
    ),
    "statistics of its own": (
        lambda: nn.Sequential(
            nn.Linear(8, 12), RunningMean(12), nn.ReLU(), block(), nn.Linear(12, C)
        ),
        vectors, "sample",
    ),
    "dataclasses": (
        lambda: blocks(
            stateful, join=Run(lambda n, s: State(n.a(s.h), s.sum), a=nn.Linear(12, 12))
        ),
        vectors, "sample",
    ),
    "two heads": (
        lambda: Run(two_heads, body=block(8), aux=nn.Linear(8, 3), last=nn.Linear(8, C)),
        vectors, "sample",
    ),
    "checkpointed": (lambda: blocks(recomputed), vectors, "sample"),
    "dropout": (lambda: mlp(lambda m: None, nn.Dropout(0.2), nn.Linear(C, C)), vectors, "sample"),
    "skips": (
        lambda: Run(
            wavenet, first=nn.Conv1d(2, 8, 1), last=nn.Conv1d(8, C, 1),
            blocks=nn.ModuleList(
                Run(
                    gated, wave=nn.Conv1d(8, 8, 3, padding=1), gate=nn.Conv1d(8, 8, 3, padding=1),
                    on=nn.Conv1d(8, 8, 1), skip=nn.Conv1d(8, 8, 1),
                ) for _ in range(2)
            ),
        ), partial(torch.randn, B, 2, N), "second",
    ),
    "u-net": (
        lambda: Run(
            unet, down=nn.Conv2d(2, 8, 3, padding=1), middle=nn.Conv2d(8, 12, 3, padding=1),
            up=nn.ConvTranspose2d(12, 8, 2, stride=2), join=nn.Conv2d(16, 8, 3, padding=1),
            last=nn.Conv2d(8, C, 1),
        ), partial(torch.randn, B, 2, 6, 6), "second",
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3, groups=2), nn.InstanceNorm2d(8, affine=True), nn.Hardswish(),
            nn.Conv2d(8, 8, 2, dilation=2, groups=8), nn.Conv2d(8, 12, 1), nn.Flatten(),
            nn.RMSNorm(12), nn.Linear(12, C),
        ), partial(torch.randn, B, 2, N, N), "sample",
    ),
    "transformer": (
        lambda: nn.Sequential(
            nn.Embedding(20, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, C),
        ), ids, "last",
    ),
    "maps, channels last": (mlp, partial(torch.randn, B, N, 3, 8), "last"),
    **{
        f"{form}, {axes} axes": (partial(make, axes), partial(torch.randn, B, 2, *[N] * axes), end)
        for form, make, end in (("convolutions", convnet, "sample"), ("places", by_place, "second"))
        for axes in CONV
    },
}  # fmt: skip

# --- targets and losses ---------------------------------------------------------------------------

CLASSES: dict[str, Any] = {
    "indices": lambda i, p: i,
    "int32": lambda i, p: i.int(),
    "floats": lambda i, p: i.float(),
    "ignored": lambda i, p: i.masked_fill(torch.arange(i.numel()).view(i.shape) % 3 == 0, -100),
    "minus one": lambda i, p: i.masked_fill(i == 0, -1),
    "out of range": lambda i, p: i + 1,
    "probabilities": lambda i, p: p,
    "double": lambda i, p: p.double(),
    "one-hot of integers": lambda i, p: (p == p.amax(1, keepdim=True)).long(),
    "too few": lambda i, p: i[:-1],
    "one axis more": lambda i, p: i[..., None],
}
OF_CLASSES: dict[str, Any] = {
    "default": lambda: None,
    "smoothed": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "weighted": lambda: nn.CrossEntropyLoss(torch.arange(1.0, C + 1)),
    "summed": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "vector": lambda: nn.CrossEntropyLoss(reduction="none"),
    "nll": lambda: lambda z, y: F.nll_loss(z.log_softmax(1), y),
}
NUMBERS: dict[str, Any] = {
    "numbers": torch.randn,
    "labels": lambda *shape: torch.rand(shape).gt(0.5).float(),
    "bools": lambda *shape: torch.rand(shape).gt(0.5),
    "double": lambda *shape: torch.randn(shape).double(),
    "too few": lambda n, *shape: torch.randn(n - 1, *shape),
}
OF_NUMBERS: dict[str, Any] = {
    "squares": lambda: F.mse_loss,
    "binary": lambda: F.binary_cross_entropy_with_logits,
    "huber": nn.HuberLoss,
    "vector": lambda: nn.MSELoss(reduction="none"),
    "detached": lambda: lambda z, y: F.mse_loss(z, y).detach(),
}


def last(loss: Any) -> Any:
    """``loss`` of outputs whose classes come last."""

    def turned(z: Tensor, y: Tensor) -> Tensor:
        y = y.movedim(-1, 1) if y.ndim == z.ndim else y
        return (loss or F.cross_entropy)(z.movedim(-1, 1), y)

    return turned


def case(draw: Callable[[Any], Any]) -> tuple[str, str, str, nn.Module, Any, Tensor, Any]:
    name = draw(st.sampled_from(list(MODELS)))
    make, inputs, end = MODELS[name]
    torch.manual_seed(draw(st.integers(0, 3)))
    model, x = make(), inputs()
    shape = forward(model, x).shape
    if end != "number" and draw(st.booleans()):
        kind, of = draw(st.sampled_from(list(CLASSES))), draw(st.sampled_from(list(OF_CLASSES)))
        axis = len(shape) - 1 if end == "last" else 1
        places = [n for i, n in enumerate(shape) if i != axis]
        probabilities = torch.rand(places[0], C, *places[1:]).softmax(1)
        y, loss = CLASSES[kind](torch.randint(0, C, places), probabilities), OF_CLASSES[of]()
        if end == "last":
            loss = last(loss)
            y = y.movedim(1, -1) if y.ndim == len(shape) and y.shape[1] == C else y
    else:
        kind, of = draw(st.sampled_from(list(NUMBERS))), draw(st.sampled_from(list(OF_NUMBERS)))
        y, loss = NUMBERS[kind](*shape), OF_NUMBERS[of]()
    return name, kind, of, model, x, y, loss


def autograd(model: nn.Module, x: Any, y: Tensor, loss: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of plain torch."""
    torch.manual_seed(5)
    model = copied(model)
    value = (loss or F.cross_entropy)(forward(model, x), y)
    value.backward()
    return value.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@QUIET
@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(data=st.data(), rule=st.sampled_from(sva.rules.available()), rank=st.booleans())
def test_right_or_refused(data: st.DataObject, rule: str, rank: bool) -> None:
    name, kind, of, model, x, y, loss = case(data.draw)
    if rank and name != "scripted part":
        with contextlib.suppress(ValueError):  # nothing in it can be factored
            model = sva.factorize(model, 0.5)
    note = f"{name} / {kind} / {of} / {rule}"
    try:
        wanted, gradients = autograd(model, x, y, loss)
    except (RuntimeError, IndexError, ValueError, TypeError):
        gradients = {}
    try:
        learner = sva.Learner(
            model, rule, example=x, loss=loss, optimizer=lambda p: torch.optim.SGD(p, 1e-3)
        )
        torch.manual_seed(5)
        found = learner.gradients(x, y)
        torch.manual_seed(5)
        report = learner.step(x, y)
    except (ValueError, TypeError) as error:
        raised_by = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        assert raised_by.is_relative_to(LIBRARY), f"{note}: {error}"  # noqa: PT017
        assert not gradients, f"{note}: refused, though it can be trained: {error}"  # noqa: PT017
        return
    assert gradients, f"{note}: accepted, though it cannot be trained"
    torch.testing.assert_close(
        report.loss, wanted, rtol=1e-4, atol=1e-5, msg=note, check_dtype=False
    )
    assert found.keys() == gradients.keys(), note
    for parameter, gradient in gradients.items():
        assert found[parameter].isfinite().all(), f"{note}: {parameter}"
        if rule == "bp":
            torch.testing.assert_close(
                found[parameter], gradient, rtol=1e-3, atol=1e-5, msg=f"{note}: {parameter}"
            )


# --- what holds by definition --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HandsOn(Rule):
    """Units learn nothing by themselves: what reaches them was handed on by later units."""

    name: str = "hands-on"
    horizon: int | None = 99

    def loss(self, unit: Any, feedback: Any, h: Tensor, supervision: Any) -> Tensor:
        return 0 * h.sum()


def job(name: str) -> tuple[nn.Module, Any, Tensor]:
    """A factored model in double precision where it can be, its input, and numbers to learn."""
    make, inputs, _ = MODELS[name]
    torch.manual_seed(1)
    model = make().double()
    with contextlib.suppress(ValueError):
        model = sva.factorize(model)
    x = inputs()
    for value in [x] if isinstance(x, Tensor) else x.values():
        if value.is_floating_point():
            value.data = value.data.double()
    return model, x, torch.randn_like(forward(copied(model), x))


def learner_of(model: nn.Module, x: Any, rule: Any, **options: Any) -> sva.Learner:
    return sva.Learner(
        model, rule, example=x, loss=F.mse_loss, **options,
        optimizer=lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    )  # fmt: skip


JOBS = pytest.mark.parametrize("name", [name for name in MODELS if name != "scripted part"])


@JOBS
@QUIET
@pytest.mark.parametrize("recompute", [False, True])
def test_what_units_hand_on_is_the_gradient(name: str, recompute: bool) -> None:
    """With a horizon over all units, and no trace but statistics, as of plain torch: no other
    parameter, mode, buffer or random number."""
    model, x, y = job(name)
    torch.manual_seed(5)
    plain = copied(model)
    F.mse_loss(forward(plain, x), y).backward()
    drawn = torch.get_rng_state()
    kept = [(n, p, p.requires_grad) for n, p in model.named_parameters()]
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    learner = learner_of(model, x, HandsOn(), recompute=recompute)
    assert torch.equal(torch.get_rng_state(), before)
    learner.backward(x, y)
    assert torch.equal(torch.get_rng_state(), drawn)
    wanted = dict(plain.named_parameters())
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[n].grad, rtol=1e-8, atol=1e-11, msg=n)
    buffers = dict(plain.named_buffers())
    for n, b in model.named_buffers():
        assert torch.equal(b, buffers[n]), n
    learner.update()
    now = [(n, p, p.requires_grad) for n, p in model.named_parameters()]
    assert all(
        a[0] == b[0] and a[1] is b[1] and a[2] == b[2] for a, b in zip(kept, now, strict=True)
    )
    assert [module.training for module in model.modules()] == modes


@JOBS
@QUIET
def test_a_run_goes_on_bit_for_bit_and_ships_what_it_learned(name: str, tmp_path: Path) -> None:
    model, x, y = job(name)
    again = copied(model)
    first = learner_of(model, x, "ssa")
    first.step(x, y)
    sva.save(first, tmp_path / "k.safetensors")
    first.step(x, y)
    second = learner_of(again, x, "ssa")
    sva.load(tmp_path / "k.safetensors", into=second)
    second.step(x, y)
    for (n, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), n
    model.eval()
    with torch.no_grad():
        small = sva.compact(model)
        torch.testing.assert_close(forward(small, x), forward(model, x), rtol=1e-9, atol=1e-9)
    assert not any(type(m).__module__.startswith("svdalign") for m in small.modules())
