"""Fused linear layers compute what the two layers and the activation between them compute, and
hold less.

The oracle is torch's own modules with the merged weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles.saved import peak_saved_bytes
from torch import Tensor, nn

import svdalign as sva
from svdalign._parts import CHUNK
from svdalign.factors import FusedLinear
from svdalign.lab.costs import LiveTensors

IN, WIDE, OUT = 6, 24, 5
BETWEEN: dict[str, Callable[[], list[nn.Module]]] = {
    "gelu": lambda: [nn.GELU()],
    "relu in place": lambda: [nn.ReLU(inplace=True)],
    "silu, no dropout": lambda: [nn.SiLU(), nn.Dropout(0.0)],
    "tanh, hardswish": lambda: [nn.Tanh(), nn.Hardswish()],
}


def perceptron(between: str = "gelu", *, bias: bool = True, rank: int = 3) -> nn.Sequential:
    net = nn.Sequential(
        nn.Linear(IN, WIDE, bias), *BETWEEN[between](), nn.Linear(WIDE, OUT, bias)
    ).double()
    return sva.factorize(net, {"0": rank, str(len(net) - 1): rank})


def dense(net: nn.Module) -> nn.Module:
    """The same function by torch's own modules."""
    return nn.Sequential(*(m.dense() if isinstance(m, sva.SVDLinear) else m for m in net))


def same(found: Tensor | None, wanted: Tensor | None) -> None:
    assert (found is None) == (wanted is None)
    if found is not None:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("between", BETWEEN)
@settings(deadline=None, max_examples=10)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    bias=st.booleans(),
    rank=st.integers(1, 5),
    chunk=st.sampled_from([1, 100, 10**9]),
    seed=st.integers(0, 99),
)
def test_output_and_gradients_are_those_of_the_layers(
    between: str, shape: list[int], bias: bool, rank: int, chunk: int, seed: int
) -> None:
    torch.manual_seed(seed)
    net = perceptron(between, bias=bias, rank=rank)
    model = sva.fuse(net)
    assert isinstance(model[0], FusedLinear)
    assert isinstance(model[-1], FusedLinear)
    x = torch.randn(*shape, IN, dtype=torch.float64)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHUNK, "cpu", chunk)
        out, wanted = model(xs[0]), net(xs[1])
        same(out, wanted)
        same(out, dense(net)(x))
        g = torch.randn_like(wanted)
        out.backward(g)
        wanted.backward(g)
    same(xs[0].grad, xs[1].grad)
    for (name, found), (other, parameter) in zip(
        model.named_parameters(), net.named_parameters(), strict=True
    ):
        assert name == other
        same(found.grad, parameter.grad)
    same(model.eval()(x), wanted.detach())
    with torch.no_grad():
        same(model.train()(x), wanted.detach())
    same(sva.compact(model)(x), wanted.detach())


@pytest.mark.parametrize("frozen", [("0.U", "0.s"), ("0.V",), ("2.V",), ("2.U", "2.s", "2.bias")])
def test_frozen_factors_get_no_gradient_and_the_others_the_same(frozen: tuple[str, ...]) -> None:
    net = perceptron()
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    model = sva.fuse(net)
    x = torch.randn(4, 3, IN, dtype=torch.float64)
    for m in (model, net):
        m(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        same(model.get_parameter(name).grad, parameter.grad)
        assert (parameter.grad is None) == (name in frozen)


def test_any_gradient_can_be_asked_for_alone() -> None:
    net = perceptron()
    model = sva.fuse(net)
    x = torch.randn(4, 3, IN, dtype=torch.float64, requires_grad=True)
    for m in (model, net):
        m.requires_grad_(True)
    names = [name for name, _ in net.named_parameters()]
    for name in (*names, None):
        found, wanted = (
            torch.autograd.grad(m(x).square().sum(), x if name is None else m.get_parameter(name))[
                0
            ]
            for m in (model, net)
        )
        same(found, wanted)


class Taken(nn.Module):
    """A perceptron whose parts ``use`` puts together."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], between: nn.Module) -> None:
        super().__init__()
        self.first, self.between = nn.Linear(IN, WIDE), between
        self.second = nn.Linear(WIDE, OUT)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def chained(net: Any, x: Tensor) -> Tensor:
    return net.second(net.between(net.first(x)))


STAY = {
    "read twice": (
        lambda net, x: net.second(h := net.between(net.first(x))) + h.sum(-1, keepdim=True),
        nn.GELU(),
    ),
    "dropout": (chained, nn.Sequential(nn.GELU(), nn.Dropout(0.5))),
    "norm": (chained, nn.LayerNorm(WIDE)),
    "nothing between": (lambda net, x: net.second(net.first(x)), nn.GELU()),
}


@pytest.mark.parametrize("case", STAY)
@pytest.mark.filterwarnings("ignore:nothing was fused")
def test_what_cannot_be_exact_or_gains_nothing_stays_as_it_is(case: str) -> None:
    model = sva.fuse(sva.factorize(Taken(*STAY[case]), {"first": 3, "second": 3}))
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


def test_a_chain_of_layers_is_fused_from_end_to_end() -> None:
    net = nn.Sequential(
        nn.Linear(IN, WIDE), nn.ReLU(), nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, OUT)
    ).double()
    model = sva.fuse(plain := sva.factorize(net, 3, classifier=True))
    assert [len(model[i].tail) for i in (0, 2, 4)] == [1, 1, 0]
    x = torch.randn(4, 3, IN, dtype=torch.float64)
    for m in (model, plain):
        m(x).square().sum().backward()
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        same(found.grad, wanted.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_under_autocast(dtype: torch.dtype) -> None:
    net = perceptron().float()
    model = sva.fuse(net)
    x = torch.randn(8, 7, IN)
    outs = []
    for m in (model, net):
        with torch.autocast("cpu", dtype):
            outs.append(m(x))
        outs[-1].float().square().mean().backward()
    assert outs[0].dtype == outs[1].dtype == dtype
    torch.testing.assert_close(*outs, rtol=0.05, atol=0.05)
    for found, wanted in zip(model.parameters(), net.parameters(), strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        assert torch.cosine_similarity(found.grad.flatten(), wanted.grad.flatten(), 0) > 0.99


def test_neither_the_wide_activation_nor_its_gradient_is_held(monkeypatch) -> None:
    monkeypatch.setitem(CHUNK, "cpu", 1)
    net = nn.Sequential(nn.Linear(8, 256), nn.GELU(), nn.Linear(256, 8))
    plain = sva.factorize(net, {"0": 2, "2": 2})
    model = sva.fuse(plain)
    x = torch.randn(64, 16, 8)
    wide = 64 * 16 * 256 * 4
    saved = [peak_saved_bytes(lambda m=m: m(x).sum()) for m in (plain, model)]
    assert saved[0] > 2 * wide
    assert saved[1] < 0.1 * wide
    with LiveTensors([x, *model.parameters()]) as live:
        model(x).square().sum().backward()
    assert live.peak < 0.5 * wide


@pytest.mark.parametrize("horizon", [0, 1, None])
@pytest.mark.parametrize("units", ["layer", "block"])
def test_a_learner_takes_the_same_step(horizon: int | None, units: str, monkeypatch) -> None:
    monkeypatch.setitem(CHUNK, "cpu", 64)

    def block() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    net = nn.Sequential(block(), block(), nn.Flatten(), nn.Linear(24, 4)).double()
    plain = sva.factorize(net, 4)
    x, y = torch.randn(6, 3, 8, dtype=torch.float64), torch.arange(6) % 4
    found = []
    for model in (plain, sva.fuse(plain)):
        learner = sva.Learner(
            model, sva.rules.SSA(horizon=horizon) if horizon is not None else "bp", example=x,
            units=units, optimizer=lambda p: torch.optim.SGD(p, 0.1),
        )  # fmt: skip
        reports = [learner.step(x, y) for _ in range(3)]
        found.append([float(report.loss) for report in reports])
        units_found = [unit.name for unit in learner.units]
        found.append([float(loss) for loss in reports[-1].unit_losses.values()])
        found.append(units_found)
    assert found[0] == pytest.approx(found[3], rel=1e-9)
    assert found[1] == pytest.approx(found[4], rel=1e-9)
    assert found[2] == found[5]
