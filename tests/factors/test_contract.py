"""One contract for every registered layer type: it is the dense layer of its merged weight, and all
that the library does with factored layers can be done with it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles.layers import KINDS
from torch import Tensor, nn

import svdalign as sva
from svdalign import export, rules
from svdalign.engine.layout import layout_of
from svdalign.factors import FactoredLayer, SVDConv2d, break_even_rank
from svdalign.factors.layers import REGISTERED, SCHEMES
from svdalign.factors.registry import factored_type
from svdalign.lab.costs import inference_macs, pretending

EXACT = {"rtol": 0.0, "atol": 1e-10}


def test_every_registered_type_is_under_contract() -> None:
    assert set(REGISTERED) == set(KINDS)


@dataclass(frozen=True)
class Case:
    """A dense layer, how it is factored, and an input for it. All in double precision."""

    kind: str
    dense: nn.Module
    scheme: str
    rank: int
    x: Tensor

    def factored(self, rank: int | None = None) -> FactoredLayer:
        rank = self.rank if rank is None else rank
        return REGISTERED[self.kind].from_dense(self.dense, rank, self.scheme)

    def matrix_of(self, weight: Tensor) -> Tensor:
        return KINDS[self.kind].matrix(weight.detach(), self.scheme)

    @property
    def matrix(self) -> Tensor:
        return self.matrix_of(self.dense.weight)

    def apply(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The dense layer of another weight."""
        params = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return torch.func.functional_call(self.dense, params, (x,))


def draw(data: st.DataObject, kind: tuple[str, str]) -> Case:
    name, scheme = kind
    dense, x = data.draw(KINDS[name].cases)
    full = min(KINDS[name].matrix(dense.weight.detach(), scheme).shape)
    return Case(name, dense, scheme, data.draw(st.integers(1, full)), x)


def example(kind: tuple[str, str], seed: int = 1) -> Case:
    """A layer 3 to 4 channels wide, of rank 2."""
    name, scheme = kind
    torch.manual_seed(seed)
    dense = KINDS[name].example().double()
    axes = dense.weight.ndim - 2
    x = torch.randn(4, 3, *(7, 8, 6)[:axes]) if axes else torch.randn(4, 3)
    return Case(name, dense, scheme, 2, x.double())


class Net(nn.Module):
    """A layer after which every position is a sample's answer: (B, 4) to 3 classes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        return self.head(h.flatten(2).mean(2) if h.ndim > 2 else h)


def learner_of(case: Case, rule: str | rules.Rule = "ssa", rank: int = 2) -> sva.Learner:
    model = sva.factorize(Net(case.dense), {"layer": rank}, case.scheme)
    return sva.Learner(
        model, rule, units="layer", optimizer=lambda p: torch.optim.Adam(p, 0.05), example=case.x
    )


def schemes(name: str) -> tuple[str, ...]:
    """Those that differ."""
    return SCHEMES if KINDS[name].example().weight.ndim > 2 else ("channel",)


LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    "kind", [(name, scheme) for name in KINDS for scheme in schemes(name)], ids=str
)
# A 'same' padding of an even kernel is lopsided, of which torch warns; it is right nevertheless.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
class TestContract:
    @settings(max_examples=13)
    @given(data=st.data())
    def test_equals_the_dense_layer_of_its_merged_weight(self, kind: tuple[str, str], data) -> None:
        case = draw(data, kind)
        layer = case.factored()
        expected = case.apply(layer.merged_weight(), layer.bias, case.x)
        torch.testing.assert_close(layer(case.x), expected, **EXACT)
        torch.testing.assert_close(layer.dense()(case.x), expected, **EXACT)
        assert type(layer.dense()) is type(case.dense)

    @settings(max_examples=10)
    @given(data=st.data())
    def test_gradients_are_the_tangent_of_the_dense_gradient(
        self, kind: tuple[str, str], data
    ) -> None:
        case = draw(data, kind)
        layer = case.factored()
        cotangent = torch.randn_like(layer(case.x))
        x = case.x.clone().requires_grad_()
        (layer(x) * cotangent).sum().backward()

        weight = layer.merged_weight().detach().requires_grad_()
        y = case.x.clone().requires_grad_()
        (case.apply(weight, layer.bias.detach() if layer.bias is not None else None, y)
         * cotangent).sum().backward()  # fmt: skip
        G = case.matrix_of(weight.grad)
        U, s, V = layer.U.detach(), layer.s.detach(), layer.V.detach()
        torch.testing.assert_close(layer.U.grad, G @ V @ torch.diag(s), **EXACT)
        torch.testing.assert_close(layer.s.grad, torch.diagonal(U.T @ G @ V), **EXACT)
        torch.testing.assert_close(layer.V.grad, G.T @ U @ torch.diag(s), **EXACT)
        torch.testing.assert_close(x.grad, y.grad, **EXACT)
        if layer.bias is not None:
            channels = cotangent.ndim - 1 if type(layer).channels_last else 1
            dims = [d for d in range(cotangent.ndim) if d != channels]
            torch.testing.assert_close(layer.bias.grad, cotangent.sum(dims), **EXACT)

    @settings(max_examples=6)
    @given(data=st.data())
    def test_full_rank_keeps_the_function(self, kind: tuple[str, str], data) -> None:
        case = draw(data, kind)
        layer = case.factored(min(case.matrix.shape))
        assert layer.rank == layer.full_rank
        torch.testing.assert_close(layer(case.x), case.dense(case.x), **EXACT)

    @settings(max_examples=6)
    @given(data=st.data())
    def test_factors_are_the_leading_singular_triplets_with_the_norm_kept(
        self, kind: tuple[str, str], data
    ) -> None:
        case = draw(data, kind)
        layer, r, W = case.factored(), case.rank, case.matrix
        eye = torch.eye(r).double()
        torch.testing.assert_close(layer.U.T @ layer.U, eye, **EXACT)
        torch.testing.assert_close(layer.V.T @ layer.V, eye, **EXACT)
        merged = case.matrix_of(layer.merged_weight())
        torch.testing.assert_close(merged, (layer.U * layer.s) @ layer.V.T, **EXACT)
        torch.testing.assert_close(merged.norm(), W.norm())
        # Eckart and Young: of all matrices of rank r, up to the one scale, none is nearer.
        eigenvalues = torch.linalg.eigvalsh(W @ W.T).flip(0).clamp_min(0)
        energy = eigenvalues[:r].sum() / eigenvalues.sum()
        torch.testing.assert_close((merged * W).sum() / W.norm() ** 2, energy.sqrt())

    @settings(max_examples=5)
    @given(data=st.data())
    def test_set_factors_changes_values_and_rank_but_not_the_parameters(
        self, kind: tuple[str, str], data
    ) -> None:
        case = draw(data, kind)
        layer = case.factored(min(case.matrix.shape))
        before = dict(layer.named_parameters())
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        smaller = case.factored(1)
        layer(case.x).sum().backward()
        layer.set_factors(smaller.U, smaller.s, smaller.V)
        assert layer.rank == 1
        for name, parameter in layer.named_parameters():
            assert parameter is before[name]
        assert layer.U.grad is None
        torch.testing.assert_close(layer(case.x), smaller(case.x), **EXACT)
        layer(case.x).sum().backward()
        optimizer.step()  # steps the new values
        assert layer.U.shape == smaller.U.shape

    def test_refuses_factors_that_do_not_fit_together(self, kind: tuple[str, str]) -> None:
        layer = example(kind).factored()
        m, n = len(layer.U), len(layer.V)
        with pytest.raises(ValueError, match=r"\(m, r\), \(r,\), \(n, r\).*got"):
            layer.set_factors(torch.zeros(m, 2), torch.zeros(1), torch.zeros(n, 1))
        with pytest.raises(ValueError, match="rank 99 is more than"):
            layer.set_factors(torch.zeros(m, 99), torch.zeros(99), torch.zeros(n, 99))
        with pytest.raises(ValueError, match=r"got.*U"):
            layer.set_factors(torch.zeros(m + 1, 1), torch.zeros(1), torch.zeros(n, 1))

    def test_state_dict_round_trip(self, kind: tuple[str, str]) -> None:
        case = example(kind)
        layer, other = case.factored(), case.factored()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.normal_()
        other.load_state_dict(layer.state_dict())
        assert set(layer.state_dict()) == {"U", "s", "V", "bias"}
        assert torch.equal(layer(case.x), other(case.x))

    def test_gradcheck(self, kind: tuple[str, str]) -> None:
        case = example(kind)
        layer = case.factored()
        values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
        names = [name for name, _ in layer.named_parameters()]
        weights = torch.randn_like(layer(case.x))

        def function(*values: Tensor) -> Tensor:
            parameters = dict(zip(names, values, strict=True))
            return (weights * torch.func.functional_call(layer, parameters, (case.x,))).sum()

        assert torch.autograd.gradcheck(function, values)

    def test_runs_under_autocast(self, kind: tuple[str, str]) -> None:
        case = example(kind)
        layer = case.factored().float()
        x = case.x.float()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
        y.float().sum().backward()
        assert layer.U.grad.dtype == torch.float32

    def test_repr_tells_shape_and_rank(self, kind: tuple[str, str]) -> None:
        text = repr(example(kind).factored())
        assert "rank=2" in text
        assert "bias=True" in text

    @settings(max_examples=6)
    @given(data=st.data())
    def test_plain_modules_compute_the_same(self, kind: tuple[str, str], data) -> None:
        case = draw(data, kind)
        layer = case.factored()
        for plain in (layer.single(), nn.Sequential(*layer.pair()), layer.plain()):
            assert all(type(m).__module__.startswith("torch.nn.") for m in plain.modules())
            torch.testing.assert_close(plain(case.x), layer(case.x), **EXACT)

    @settings(max_examples=6)
    @given(data=st.data())
    def test_multiply_accumulates_are_those_counted(self, kind: tuple[str, str], data) -> None:
        case = draw(data, kind)
        layer = case.factored()
        dense = layer.single()
        of_direction, of_dense = layer.macs(case.x.shape, dense(case.x).shape)
        counted = inference_macs(nn.Sequential(*layer.pair()), case.x)
        assert counted * of_dense == inference_macs(dense, case.x) * layer.rank * of_direction

    @settings(max_examples=5)
    @given(data=st.data())
    def test_output_directions_span_what_the_layer_can_reach(
        self, kind: tuple[str, str], data
    ) -> None:
        case = draw(data, kind)
        layer = case.factored()
        x = torch.randn(50, *case.x.shape[1:]).double()
        h = layer(x) - layer(torch.zeros_like(x))
        reach = h.movedim(-1 if type(layer).channels_last else 1, 0).flatten(1)
        basis, _ = torch.linalg.qr(layer.output_directions().detach())
        torch.testing.assert_close(basis @ (basis.T @ reach), reach, rtol=0, atol=1e-8)

    def test_factorize_reports_it_and_a_cut_is_of_least_error(self, kind: tuple[str, str]) -> None:
        case = example(kind)
        model = sva.factorize(Net(case.dense), {"layer": 3}, case.scheme)
        assert type(model.layer) is REGISTERED[case.kind] is factored_type(case.dense)
        before = case.matrix_of(model.layer.merged_weight())
        (row, _) = model.factorization
        assert (row.rank, row.kind, row.full_rank) == (
            3,
            type(case.dense).__name__,
            3 if 3 in case.matrix.shape else min(case.matrix.shape),
        )
        sva.reduce_rank(model, rank=1)
        after = case.matrix_of(model.layer.merged_weight())
        dropped = torch.linalg.svdvals(before)[1:].square().sum()
        torch.testing.assert_close((before - after).square().sum(), dropped)
        assert [row.rank for row in model.factorization] == [1, None]

    def test_it_learns_on_the_manifold_is_saved_and_goes_on(
        self, kind: tuple[str, str], tmp_path: Path
    ) -> None:
        case = example(kind)
        learner = learner_of(case)
        losses = [learner.step(case.x, LABELS).loss for _ in range(15)]
        assert losses[-1] < losses[0]
        layer = learner.model.layer
        eye = torch.eye(2).double()
        torch.testing.assert_close(layer.U.T @ layer.U, eye, **EXACT)
        torch.testing.assert_close(layer.V.T @ layer.V, eye, **EXACT)
        sva.reduce_rank(learner.model, learner.optimizer, rank=1)
        sva.save(learner, tmp_path / "run.safetensors")
        other = learner_of(case)
        sva.load(tmp_path / "run.safetensors", into=other)
        for one in (learner, other):
            one.step(case.x, LABELS)
        for name, value in learner.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[name]), name

    def test_a_compact_model_is_written_and_read(
        self, kind: tuple[str, str], tmp_path: Path
    ) -> None:
        case = example(kind)
        model = sva.factorize(Net(case.dense), {"layer": 2}, case.scheme)
        small = sva.compact(model)
        assert not any(isinstance(m, FactoredLayer) for m in small.modules())
        torch.testing.assert_close(small(case.x), model(case.x), **EXACT)
        loaded = export.write_safetensors(small, case.x, tmp_path / "model.safetensors")
        torch.testing.assert_close(loaded(case.x), model(case.x), **EXACT)

    @pytest.mark.parametrize("rule", ["fa", "sign-symmetric"])
    @pytest.mark.parametrize("factored", [True, False])
    def test_errors_go_back_through_other_weights(
        self, kind: tuple[str, str], rule: str, factored: bool
    ) -> None:
        """To the input as the mirror's transposed map takes them, to the weights exactly."""
        case = example(kind)
        layer, found = case.factored() if factored else case.dense, rules.get(rule)
        model = nn.Sequential(layer)
        transport = found.transport(model, torch.Generator().manual_seed(0))
        (mirror,) = transport.children()
        x = case.x.clone().requires_grad_()
        with found.transporting(model, transport):
            h = model(x)
        cotangent = torch.randn_like(h)
        got = torch.autograd.grad(h, [x, *layer.parameters()], cotangent)

        exact = torch.autograd.grad(layer(x), [x, *layer.parameters()], cotangent)
        for ours, theirs in zip(got[1:], exact[1:], strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
        feedback = mirror.weight.detach()
        back = torch.autograd.grad(case.apply(feedback, None, x), x, cotangent)[0]
        torch.testing.assert_close(got[0], back, **EXACT)
        assert not torch.allclose(got[0], exact[0])
        if rule == "sign-symmetric":
            W = layer.weight.detach()
            torch.testing.assert_close(feedback, W.sign() * W.abs().mean(), **EXACT)

    @pytest.mark.parametrize("rule", ["ssa", "bp"])
    def test_a_step_waits_for_no_value(self, kind: tuple[str, str], rule: str) -> None:
        """On the meta device, where reading a value is an error."""
        case = example(kind)
        model = sva.factorize(Net(case.dense), {"layer": 2}, case.scheme).to("meta")
        x, y = case.x.to("meta"), LABELS.to("meta")
        with pretending():  # what is checked at the start and of the first batch may read values
            learner = sva.Learner(
                model, rule, units="layer", optimizer=lambda p: torch.optim.SGD(p, 0.05), example=x
            )
            learner.step(x, y)
        assert learner.step(x, y).loss.is_meta

    def test_channels_stand_where_the_layer_says(self, kind: tuple[str, str]) -> None:
        case = example(kind)
        if case.x.ndim == 2:
            pytest.skip("one axis beside the batch's")
        for layer in (case.dense, case.factored()):
            h = layer(case.x)
            layout = layout_of("0", tuple(h.shape), (4, 3), [("0", layer, tuple(h.shape))])
            shape = layout.shape(tuple(h.shape))
            assert shape[2 if len(shape) == 3 else 1] == 4


CONV2D = "torch.nn.modules.conv.Conv2d"


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
def test_channels_last_gives_the_same(scheme: str) -> None:
    case = example((CONV2D, scheme))
    layer = case.factored()
    y = layer.to(memory_format=torch.channels_last)(
        case.x.to(memory_format=torch.channels_last)
    )  # fmt: skip
    torch.testing.assert_close(y, case.factored()(case.x), **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, "groups=2.*only groups=1"),
        ({"padding_mode": "reflect"}, "padding_mode='reflect'.*only padding_mode='zeros'"),
    ],
)
def test_refuses_a_convolution_that_is_no_single_zero_padded_matrix(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        SVDConv2d.from_dense(nn.Conv2d(4, 4, 3, padding=1, **options), 2)


def test_refuses_an_unknown_scheme() -> None:
    with pytest.raises(ValueError, match=r"scheme.*spatial.*channel.*got 'tucker'"):
        SVDConv2d.from_dense(nn.Conv2d(4, 4, 3), 2, "tucker")


@given(m=st.integers(1, 200), n=st.integers(1, 200))
def test_break_even_rank_is_the_last_that_saves(m: int, n: int) -> None:
    r = break_even_rank(m, n)
    assert r == max(k for k in range(m * n + 1) if k * (m + n + 1) < m * n)


# --- the merged weight is read, not written -------------------------------------------------------


def _augmented(w: Tensor) -> None:
    w *= 2


WRITES = {
    "clamp_": lambda w: w.clamp_(-0.1, 0.1),
    "data": lambda w: w.data.clamp_(-0.1, 0.1),
    "view": lambda w: w.detach().transpose(0, 1)[1:].mul_(2),
    "item": lambda w: w.__setitem__(0, 1.0),
    "augmented": _augmented,
    "out": lambda w: torch.mul(torch.ones_like(w), 2, out=w),
    "init": lambda w: nn.init.kaiming_normal_(w),
    "init of a view": lambda w: nn.init.constant_(w[0], 1.0),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "chunk": lambda w: w.chunk(2)[1].zero_(),
    "set data": lambda w: setattr(w, "data", torch.zeros_like(w)),
    "set grad": lambda w: setattr(w, "grad", torch.zeros_like(w)),
    "freeze": lambda w: setattr(w, "requires_grad", False),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_writing_to_the_merged_weight_is_refused(write, mode) -> None:
    layer = example((CONV2D, "channel")).factored()
    before = layer.matrix().detach()
    with mode(), pytest.raises(RuntimeError, match=r"cannot be written to.*factors U, s and V"):
        write(layer.weight)
    assert torch.equal(layer.matrix(), before)


@pytest.mark.parametrize("value", [torch.zeros(2, 2), nn.Parameter(torch.zeros(2, 2)), None])
def test_assigning_the_weight_is_refused(value) -> None:
    layer = example((CONV2D, "channel")).factored()
    with pytest.raises(AttributeError, match=r"cannot be written to.*factors U, s and V"):
        layer.weight = value


def test_what_is_computed_from_the_merged_weight_is_an_ordinary_tensor() -> None:
    layer = example((CONV2D, "channel")).factored()
    W = layer.merged_weight().detach()
    assert type(layer.weight + 1) is type(layer.weight.detach().clone()) is Tensor
    other = torch.zeros_like(W)
    other.copy_(layer.weight.detach())
    assert torch.equal(other, W)
    assert torch.equal(copy.deepcopy(layer.weight.detach()), W)
    assert type(nn.Parameter(layer.weight.detach().clone())) is nn.Parameter
    assert layer.weight.shape == W.shape
    assert layer.weight.dtype == W.dtype


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.tanh(self.a(x)), self.a.weight.t())


def test_gradients_reach_the_factors_through_the_merged_weight() -> None:
    model, x = sva.factorize(Tied().double(), {"a": 3}), torch.randn(4, 6).double()
    names = [name for name, _ in model.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in model.parameters())

    def function(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, values)
    by_autograd = torch.autograd.grad(function(*values).sum(), values)
    by_func = torch.func.grad(lambda values: function(*values).sum())(values)
    for a, b in zip(by_autograd, by_func, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
