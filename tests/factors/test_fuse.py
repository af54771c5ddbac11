"""Fused convolutions compute what the convolution and the modules after it compute, and hold less.

The oracle is the dense convolution of the merged weight followed by torch's own modules.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles.saved import peak_saved_bytes
from tests.zoo.nets import NETS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import svdalign as sva
from svdalign import _parts, rules
from svdalign._parts import CHUNK
from svdalign.factors import FusedConv2d, SVDConv2d
from svdalign.factors._choice import Cost
from svdalign.factors.fused import KERNELS, Kernel
from svdalign.lab import models
from svdalign.lab.costs import LiveTensors, storage_bytes

TAILS: dict[str, Callable[[int], list[nn.Module]]] = {
    "norm": lambda n: [nn.BatchNorm2d(n)],
    "norm, relu": lambda n: [nn.BatchNorm2d(n), nn.ReLU()],
    "norm, relu in place, pool": lambda n: [
        nn.BatchNorm2d(n), nn.ReLU(inplace=True), nn.MaxPool2d(2)
    ],
    "overlapping pool": lambda n: [nn.BatchNorm2d(n), nn.ReLU(), nn.MaxPool2d(3, 2, 1)],
    "relu": lambda n: [nn.ReLU()],
    "gelu, mean": lambda n: [nn.GELU(), nn.AvgPool2d(2)],
    "norm, silu, group norm": lambda n: [nn.BatchNorm2d(n), nn.SiLU(), nn.GroupNorm(2, n)],
    "prelu": lambda n: [nn.BatchNorm2d(n), nn.PReLU(n)],
    "plain norm": lambda n: [nn.BatchNorm2d(n, affine=False, momentum=None), nn.ReLU()],
    "norm of the batch alone": lambda n: [nn.BatchNorm2d(n, track_running_stats=False), nn.ReLU()],
}  # fmt: skip


def chain(
    tail: str, scheme: str, *, bias: bool = True, stride: int = 1, rank: int = 3
) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, stride, 1, bias=bias), *TAILS[tail](6), nn.Conv2d(6, 3, 1)
    )
    model = sva.factorize(net.double(), {"0": rank}, scheme)
    for module in model.modules():  # not the neutral values that norms start with
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def same(found: Tensor | None, wanted: Tensor | None) -> None:
    assert (found is None) == (wanted is None)
    if found is not None:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("tail", TAILS)
@settings(deadline=None, max_examples=8)
@given(
    size=st.integers(4, 9),
    batch=st.integers(2, 5),
    stride=st.integers(1, 2),
    bias=st.booleans(),
    rank=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_output_gradients_and_statistics_are_those_of_the_chain(
    tail, channels_last, size, batch, stride, bias, rank, seed
) -> None:
    torch.manual_seed(seed)
    net = chain(tail, "channel", bias=bias, stride=stride, rank=rank)
    model = sva.fuse(net)
    assert isinstance(model[0], FusedConv2d)
    x = torch.randn(batch, 2, size, size, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    out, wanted = model(xs[0]), net(xs[1])
    same(out, wanted)
    g = torch.randn_like(wanted)
    out.backward(g)
    wanted.backward(g)
    same(xs[0].grad, xs[1].grad)
    tails = len(net) - 2

    def place(name: str) -> str:
        index, _, rest = name.partition(".")
        return f"0.tail.{int(index) - 1}.{rest}" if 0 < int(index) <= tails else name

    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert len(parameters) == len(dict(net.named_parameters()))
    for name, parameter in net.named_parameters():
        same(parameters[place(name)].grad, parameter.grad)
    for name, buffer in net.named_buffers():
        same(buffers[place(name)], buffer)
    model.eval()
    net.eval()
    same(model(x), net(x))
    with torch.no_grad():
        model.train()
        net.train()
        same(model(x), net(x))


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
@pytest.mark.parametrize("tail", ["norm, relu", "norm, relu in place, pool", "gelu, mean"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_computes_the_same(kernel: Kernel, tail: str, scheme: str) -> None:
    torch.manual_seed(0)
    net = chain(tail, scheme, stride=2)
    layer = FusedConv2d(copy.deepcopy(net[0]), list(copy.deepcopy(net[1:-1])))
    if scheme == "spatial" and tail.startswith("norm") and kernel == "fused":
        return  # which fuse does not make
    layer.kernel = kernel
    x = torch.randn(4, 2, 9, 8, dtype=torch.float64)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    found, wanted = layer(xs[0]), net[:-1](xs[1])
    same(found, wanted)
    g = torch.randn_like(wanted)
    found.backward(g)
    wanted.backward(g)
    same(xs[0].grad, xs[1].grad)
    for name in ("U", "s", "V", "bias"):
        same(getattr(layer, name).grad, getattr(net[0], name).grad)
    for ours, theirs in zip(layer.tail.buffers(), net[1:-1].buffers(), strict=True):
        same(ours, theirs)


class TestChoiceOfKernels:
    """With costs made up, by the number of a layer's output channels."""

    COSTS: ClassVar[dict[int, dict[Kernel, Cost]]] = {
        6: {"fused": Cost(2.0, 10), "factored": Cost(1.0, 30), "merged": Cost(1.5, 20)},
        8: {"fused": Cost(2.0, 10), "factored": Cost(3.0, 10), "merged": Cost(1.96, 10)},
        10: {"fused": Cost(9.0, 10), "factored": Cost(9.0, 10), "merged": Cost(1.0, 1010)},
    }

    def fused(self, monkeypatch, **options) -> list[str]:
        def cost(layer: FusedConv2d, kernel: Kernel, x: Tensor) -> Cost:
            self.measured.append((layer.out_channels, kernel, tuple(x.shape)))
            return self.COSTS[layer.out_channels][kernel]

        self.measured: list[tuple[int, str, tuple[int, ...]]] = []
        monkeypatch.setattr("svdalign.factors._choice._cost", cost)
        monkeypatch.setattr("svdalign.factors._choice._known", self.known)
        layers = [
            m
            for c, n in ((2, 6), (6, 8), (8, 10))
            for m in (nn.Conv2d(c, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU())
        ]
        net = sva.factorize(nn.Sequential(*layers), {f"{i}": 2 for i in (0, 3, 6)}, "channel")
        before = copy.deepcopy(net.state_dict())
        model = sva.fuse(net, torch.randn(5, 2, 7, 7), **options)
        for name, value in model[0].tail[0].state_dict().items():
            torch.testing.assert_close(value, before[f"1.{name}"])  # the trial left no trace
        return [model[i].kernel for i in (0, 3, 6)]

    def test_the_fastest_is_taken_if_it_is_faster_by_more_than_noise(self, monkeypatch) -> None:
        self.known = {}
        assert self.fused(monkeypatch) == ["factored", "fused", "merged"]
        assert {shape for _, _, shape in self.measured} == {(5, n, 7, 7) for n in (2, 6, 8)}

    @pytest.mark.parametrize(
        ("memory", "wanted"),
        [
            (0, ["fused", "fused", "fused"]),
            (20, ["factored", "fused", "fused"]),
            (1000, ["factored", "fused", "fused"]),
            (1020, ["factored", "fused", "merged"]),
        ],
    )
    def test_memory_goes_to_what_gains_most_for_it(self, monkeypatch, memory, wanted) -> None:
        self.known = {}
        assert self.fused(monkeypatch, memory=memory) == wanted

    def test_a_layer_is_measured_once(self, monkeypatch) -> None:
        self.known = {}
        first = self.fused(monkeypatch)
        assert len(self.measured) == 9
        assert self.fused(monkeypatch) == first
        assert self.measured == []

    @pytest.mark.parametrize("memory", [-1, True, 0.5])
    def test_a_budget_that_is_none_is_refused(self, memory) -> None:
        with pytest.raises((TypeError, ValueError), match="memory must be"):
            sva.fuse(chain("relu", "channel"), torch.randn(2, 2, 6, 6).double(), memory=memory)

    def test_a_budget_needs_an_example(self) -> None:
        with pytest.raises(ValueError, match="goes with an example"):
            sva.fuse(chain("relu", "channel"), memory=100)

    def test_measured_for_real_the_function_stays_the_same(self) -> None:
        net = chain("norm, relu in place, pool", "channel")
        x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
        model = sva.fuse(net, x)
        assert model[0].kernel in KERNELS
        same(model(x), net(x))


def test_the_norms_statistics_are_those_of_the_dense_convolutions_output() -> None:
    torch.manual_seed(0)
    net = chain("norm", "channel")
    fused = sva.fuse(net)[0]
    x = 3 + torch.randn(4, 2, 6, 6, dtype=torch.float64)
    y = F.conv2d(x, net[0].merged_weight(), net[0].bias, padding=1)
    norm = copy.deepcopy(fused.tail[0])
    same(fused(x), norm(y))
    same(fused.tail[0].running_mean, 0.1 * y.mean((0, 2, 3)))
    same(fused.tail[0].running_var, 0.9 + 0.1 * y.var((0, 2, 3)))


def test_statistics_of_a_map_take_little_beside_it(monkeypatch) -> None:
    monkeypatch.setitem(CHUNK, "cpu", 1 << 16)
    x = torch.randn(64, 8, 32, 32).to(torch.bfloat16)
    layer = SVDConv2d.from_dense(nn.Conv2d(8, 64, 3), rank=32, scheme="channel")
    fused = FusedConv2d(layer, [nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(30)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), LiveTensors([x]) as live:
        fused(x)
    reduced = 64 * 32 * 30 * 30 * 2  # bytes, in half precision
    assert live.peak < storage_bytes([x, *fused.parameters()]) + 1.5 * reduced


def test_statistics_bear_a_mean_far_from_zero() -> None:
    torch.manual_seed(0)
    net = chain("norm", "channel", bias=False).float()
    model = sva.fuse(net)
    x = 100 + torch.randn(8, 2, 16, 16)
    torch.testing.assert_close(model(x), net(x), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("tail", ["norm, relu", "norm, relu in place, pool", "gelu, mean"])
@pytest.mark.parametrize("size", [1, 500, 10**9])
@pytest.mark.parametrize("held", [0, 10**9])
def test_parts_of_any_size_give_the_same(tail: str, size: int, held: int, monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(_parts, "HELD", held)
    net = chain(tail, "channel")
    monkeypatch.setitem(CHUNK, "cpu", size)
    model = sva.fuse(net)
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    for m in (model, net):
        m(x).square().sum().backward()
    same(model[0].U.grad, net[0].U.grad)
    same(model[0].V.grad, net[0].V.grad)


@pytest.mark.parametrize("tail", ["relu", "gelu, mean"])
def test_spatial_factors_fuse_without_a_norm(tail: str) -> None:
    net = chain(tail, "spatial")
    model = sva.fuse(net)
    assert isinstance(model[0], FusedConv2d)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    same(model(x), net(x))


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [3, 4, (4, 3), (3, 4)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's, of uneven padding
def test_padding_by_name(scheme: str, padding: str, kernel, dilation: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 6, kernel, padding=padding, dilation=dilation)
    for tail in ([nn.ReLU()], [nn.ReLU(), nn.MaxPool2d(2)], [nn.GELU()]):
        dense = nn.Sequential(copy.deepcopy(conv), *tail)
        net = sva.factorize(dense.double(), {"0": 3}, scheme)
        model = sva.fuse(net)
        assert isinstance(model[0], FusedConv2d)
        x = torch.randn(3, 2, 9, 10, dtype=torch.float64)
        same(model(x), net(x))
        for m in (model, net):
            m(x).square().sum().backward()
        for name in ("U", "s", "V", "bias"):
            same(getattr(model[0], name).grad, getattr(net[0], name).grad)


@pytest.mark.filterwarnings("ignore:nothing was fused")
def test_what_cannot_be_exact_stays_as_it_is() -> None:
    spatial = sva.fuse(chain("norm, relu", "spatial"))
    assert type(spatial[0]) is SVDConv2d
    dropout = sva.factorize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(), nn.Conv2d(8, 8, 3)), 2)
    assert not any(isinstance(m, FusedConv2d) for m in sva.fuse(dropout).modules())
    hooked = chain("relu", "channel")
    hooked[0].register_full_backward_hook(lambda module, into, out: None)
    assert type(sva.fuse(hooked)[0]) is SVDConv2d
    read_twice = sva.fuse(ReadTwice())
    assert not any(isinstance(m, FusedConv2d) for m in read_twice.modules())


def test_where_nothing_is_fused_a_warning_says_why() -> None:
    with pytest.warns(UserWarning, match='spatial scheme .*batch norm.*scheme="channel"'):
        sva.fuse(chain("norm, relu", "spatial"))
    with pytest.warns(UserWarning, match="no factored convolution, and .* svdalign.factorize"):
        sva.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    with pytest.warns(UserWarning, match="is followed.*by a module that it can take in"):
        sva.fuse(ReadTwice())


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = SVDConv2d.from_dense(nn.Conv2d(2, 4, 3, padding=1), 2, "channel")
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.relu(h) + h


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = SVDConv2d.from_dense(nn.Conv2d(2, 4, 3, padding=1), 2, "channel")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


def test_a_forward_that_cannot_be_traced_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be traced"):
        sva.fuse(Branching())


def test_a_single_value_per_channel_is_refused_like_torchs_norm() -> None:
    model = sva.fuse(chain("norm", "channel"))
    with pytest.raises(ValueError, match="more than one value per channel"):
        model(torch.randn(1, 2, 1, 1, dtype=torch.float64))


def test_an_empty_batch_gives_an_empty_output() -> None:
    model = sva.fuse(chain("relu", "channel"))
    assert model[0](torch.empty(0, 2, 6, 6, dtype=torch.float64)).shape == (0, 6, 6, 6)


@pytest.mark.parametrize("tail", ["norm, relu", "norm, relu in place, pool", "gelu, mean"])
def test_runs_in_inference_mode(tail: str) -> None:
    net = chain(tail, "channel")
    model = sva.fuse(net)
    with torch.inference_mode():
        x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
        same(model(x), net(x))


def test_frozen_statistics_are_used_while_training() -> None:
    net = chain("norm, relu", "channel")
    net[1].running_mean.normal_()
    net[1].eval()
    model = sva.fuse(net)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    before = model[0].tail[0].running_mean.clone()
    same(model(x), net(x))
    same(model[0].tail[0].running_mean, before)


@pytest.mark.parametrize("frozen", [("U", "s"), ("V",), ("U", "s", "V", "bias")])
def test_frozen_factors_get_no_gradient_and_the_others_the_same(frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    net = chain("norm, relu in place, pool", "channel")
    for name in frozen:
        getattr(net[0], name).requires_grad_(False)
    model = sva.fuse(net)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    for m in (model, net):
        m(x).square().sum().backward()
    for name in ("U", "s", "V", "bias"):
        same(getattr(model[0], name).grad, getattr(net[0], name).grad)


@pytest.mark.parametrize(
    "tail", ["norm, relu", "norm, relu in place, pool", "norm, silu, group norm"]
)
def test_gradients_for_the_input_alone_are_the_same(tail: str) -> None:
    """What the engine carries upstream, before weights get their gradients."""
    torch.manual_seed(0)
    net = chain(tail, "channel")
    found = []
    for m in (sva.fuse(net), net):
        torch.manual_seed(1)
        x = torch.randn(4, 2, 6, 6, dtype=torch.float64, requires_grad=True)
        z = m(x)
        g = torch.randn_like(z)
        (alone,) = torch.autograd.grad(z, x, g, retain_graph=True)
        torch.autograd.backward(z, g, inputs=[m[0].U, m[0].s, m[0].V])
        found.append((alone, m[0].U.grad, m[0].s.grad, m[0].V.grad))
    for a, b in zip(*found, strict=True):
        same(a, b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "tail", ["relu", "norm, relu", "norm, relu in place, pool", "prelu", "norm, silu, group norm"]
)
def test_any_parameter_can_be_asked_for_alone(tail: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = sva.fuse(chain(tail, "channel", bias=bias))
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        (found,) = torch.autograd.grad(model(x).square().sum(), parameter)
        same(found, wanted[name])
        parameter.grad = None
        model(x).square().sum().backward(inputs=[parameter])
        same(parameter.grad, wanted[name])


class ConvolutionGradients(TorchDispatchMode):
    """Notes which gradients convolutions compute: of input, kernel and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tail", ["relu", "norm, relu in place, pool", "norm, silu, group norm"])
def test_a_signal_alone_computes_no_weights_gradients(tail: str) -> None:
    net = chain(tail, "channel")
    if isinstance(net[1], nn.BatchNorm2d):  # a batch's statistics lead through the weights
        net[1].eval()
    fused = sva.fuse(net)[0]
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    loss = fused(2 * x).square().sum()
    with ConvolutionGradients() as seen:
        torch.autograd.grad(loss, x)
    assert seen.masks
    assert all(mask == [True, False, False] for mask in seen.masks)


@pytest.mark.parametrize("tail", ["norm, relu in place, pool", "norm, silu, group norm"])
def test_runs_under_autocast(tail: str) -> None:
    torch.manual_seed(0)
    net = chain(tail, "channel").float()
    model = sva.fuse(net)
    x = torch.randn(8, 2, 8, 8)
    grads = []
    for m in (model, net):
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(x).float().square().mean()
        loss.backward()
        grads.append(m[0].V.grad)
    assert grads[0].dtype == torch.float32
    assert F.cosine_similarity(*(g.flatten() for g in grads), dim=0) > 0.99


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", ["norm, relu in place, pool", "plain norm", "norm, relu"])
def test_a_model_in_half_precision_is_near_the_double_one(tail: str, dtype, frozen: bool) -> None:
    torch.manual_seed(0)
    half = chain(tail, "channel", rank=6).to(dtype)
    half[1].train(not frozen)
    double = copy.deepcopy(half).double()
    model = sva.fuse(half)
    x = torch.randn(8, 2, 8, 8, dtype=dtype)
    found, wanted = model(x), double(x.double())
    assert found.dtype == dtype
    size = float(wanted.detach().std())
    torch.testing.assert_close(
        found.double(), wanted, rtol=0, atol=16 * torch.finfo(dtype).eps * size
    )
    found.float().square().mean().backward()
    wanted.square().mean().backward()
    for name in ("U", "s", "V"):
        grads = [getattr(m[0], name).grad.double().flatten() for m in (model, double)]
        assert F.cosine_similarity(*grads, dim=0) > 0.99
    assert model[0].V.grad.dtype == dtype


@pytest.mark.parametrize("rule", ["ssa", "ssa-reconstruction", "dfa", "bp"])
def test_a_learner_teaches_a_model_in_half_precision(rule: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip
    model = sva.fuse(sva.factorize(net, {"0": 4}, "channel")).to(torch.bfloat16)
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.bfloat16), torch.arange(6) % 4
    learner = sva.Learner(
        model, rule, example=x, optimizer=lambda p: torch.optim.SGD(p, 0.1), retraction="qr"
    )
    before = model[0].V.detach().clone()
    assert all(learner.step(x, y).loss.isfinite() for _ in range(3))
    assert not torch.equal(model[0].V, before)
    assert model[0].V.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["smallconv", "vgg8", "resnet20"])
@pytest.mark.parametrize("rule", ["ssa", sva.rules.SSA(horizon=2), "dfa", "bp"], ids=str)
def test_a_learner_takes_the_same_step(name: str, rule: str | sva.rules.Rule) -> None:
    torch.manual_seed(0)
    net = models.build(name, num_classes=3, image_size=8, width=0.2).double()
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    plain = sva.factorize(net, 0.5, "channel")
    reports = []
    for model in (plain, sva.fuse(plain)):
        learner = sva.Learner(
            model, rule, example=x, optimizer=lambda p: torch.optim.SGD(p, 0.1), units="block"
        )
        reports.append([float(learner.step(x, y).loss) for _ in range(3)])
    assert reports[0] == pytest.approx(reports[1], rel=1e-8)


POOLS = [
    nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((1, 2)),
    nn.MaxPool2d(2, 1), nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(4),
    nn.AvgPool2d((4, 1)), nn.MaxPool2d(2, dilation=2), nn.AdaptiveAvgPool2d(2),
    nn.AdaptiveAvgPool2d(1),
]  # fmt: skip


@pytest.mark.parametrize("pool", POOLS, ids=repr)
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 4)])
def test_units_end_where_they_do_without_fusing(pool: nn.Module, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), pool, nn.Flatten(),
        nn.LazyLinear(4),
    )  # fmt: skip
    x, y = torch.randn(6, 3, *size), torch.arange(6) % 4
    net(x)
    plain = sva.factorize(net, {"0": 4}, "channel").double()
    taught = []
    for model in (plain, sva.fuse(plain)):
        learner = sva.Learner(
            model, "ssa", example=x.double(), optimizer=lambda p: torch.optim.SGD(p, 0.1)
        )
        losses = learner.step(x.double(), y).unit_losses.values()
        taught.append(([u.features[0].shape for u in learner.units], list(map(float, losses))))
    assert taught[0][0] == taught[1][0]
    assert taught[0][1] == pytest.approx(taught[1][1], rel=1e-9)


@pytest.mark.parametrize(
    "rule", [name for name in rules.available() if rules.get(name).needs_affine_layers]
)
def test_rules_that_need_each_layer_by_itself_refuse_fused_ones(rule: str) -> None:
    model = sva.fuse(chain("norm, relu", "channel"))
    with pytest.raises(ValueError, match=f"rule '{rule}' .* leave svdalign.fuse out"):
        sva.Learner(
            model, rule, example=torch.randn(2, 2, 6, 6, dtype=torch.float64),
            optimizer=lambda p: torch.optim.SGD(p, 0.1),
        )  # fmt: skip


def test_ranks_shrink_and_compact_leaves_plain_modules() -> None:
    torch.manual_seed(0)
    net = models.build("smallconv", num_classes=3, image_size=8, width=0.5)
    model = sva.fuse(sva.factorize(net, 0.5, "channel"))
    x = torch.randn(6, 3, 8, 8)
    model(x)  # statistics
    sva.reduce_rank(model, rank=0.25)
    small = sva.compact(model)
    assert not any(type(m).__module__.startswith("svdalign") for m in small.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
    model.eval()
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_step_holds_the_reduced_map_in_place_of_the_full_ones() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 4, 1),
    )  # fmt: skip
    model = sva.factorize(net, {"0": 8}, "channel")
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(32, 3, 64, 64).to(memory_format=torch.channels_last)
    full = 32 * 64 * 64 * 64 * 4  # bytes of one map of 64 channels
    fused = sva.fuse(model)
    held = peak_saved_bytes(lambda: fused(x))
    # z, 8 channels of 64; the pooled output; places of its maxima, a byte each; x; kernels.
    assert held < full * (8 / 64 + 1 / 4 + 1 / 16) + x.nbytes + 20_000
    assert peak_saved_bytes(lambda: model(x)) > 2 * full

    def peak(m: nn.Module) -> int:
        with LiveTensors([x, *m.parameters()]) as live:
            m(x).sum().backward()
        return live.peak

    assert peak(fused) < 0.35 * peak(model)


CONVOLUTIONAL = [name for name in NETS if "resnet" in name or name in ("vgg", "mobilenet-v2")]


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_any_architecture_keeps_its_function_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    plain = sva.factorize(NETS[name](), 0.3, "channel").double()
    fused = sva.fuse(plain)
    assert any(isinstance(m, FusedConv2d) for m in fused.modules())
    x = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    norms = []
    for m in (plain, fused):
        torch.manual_seed(1)  # of dropout
        m(x).square().mean().backward()
        norms.append(sorted(float(p.grad.norm()) for p in m.parameters()))
    assert norms[0] == pytest.approx(norms[1], rel=1e-8, abs=1e-12)
    same(fused.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=True), nn.MaxPool2d((3, 2), (1, 2))]
)
@pytest.mark.parametrize("width", [9, 300])
def test_places_of_maxima_in_any_window(pool: nn.MaxPool2d, width: int) -> None:
    """On a map wider than a byte can count a window's second row is more than 255 places away."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), pool)
    net = sva.factorize(dense, {"0": 2}, "channel").double()
    model = nn.Sequential(FusedConv2d(copy.deepcopy(net[0]), list(copy.deepcopy(net[1:]))))
    x = torch.randn(3, 2, 7, width, dtype=torch.float64)
    y = net(x)
    weights = torch.randn_like(y)
    for m in (model, net):
        (m(x) * weights).sum().backward()
    same(model(x), y)
    assert model[0].U.grad is not None
    same(model[0].U.grad, net[0].U.grad)
    same(model[0].V.grad, net[0].V.grad)


@pytest.mark.parametrize("horizon", [0, 2, None])
def test_how_many_samples_at_a_time_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, horizon: int | None
) -> None:
    """Maps of few and of many channels are worked on in parts of different sizes: whoever reads
    one of them in the parts of another gets the same."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in ((2, 8), (8, 12), (12, 16), (16, 16)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if b in (12, 16) else []
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)).double()
    model = sva.fuse(sva.factorize(net, 0.2, "channel")).to(memory_format=torch.channels_last)
    x, y = torch.randn(12, 2, 8, 8).double(), torch.randint(3, (12,))
    x = x.contiguous(memory_format=torch.channels_last)
    learner = sva.Learner(
        model, "ssa" if horizon is not None else "bp", horizon=horizon,
        optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x,
    )  # fmt: skip
    found = []
    for bits, held in itertools.product((24, 7, 8, 9, 10, 11, 12), (0, 1 << 24)):
        monkeypatch.setitem(CHUNK, "cpu", 1 << bits)
        monkeypatch.setattr(_parts, "HELD", held)  # of gradients that can be computed twice
        found.append(learner.gradients(x, y))
    for gradients in found[1:]:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][name], rtol=1e-9, atol=1e-11)
