"""One contract for every factored layer: it is the dense layer of its merged weight."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles.kernels import matrix_of
from torch import Tensor, nn

from svdalign.factors import FactoredLayer, SVDConv2d, SVDLinear, break_even_rank

EXACT = {"rtol": 0.0, "atol": 1e-10}


@dataclass(frozen=True)
class Case:
    """A dense layer, how it is factored, and an input for it. All in double precision."""

    dense: nn.Linear | nn.Conv2d
    scheme: str
    rank: int
    x: Tensor

    def factored(self, rank: int | None = None) -> FactoredLayer:
        rank = self.rank if rank is None else rank
        if isinstance(self.dense, nn.Linear):
            return SVDLinear.from_dense(self.dense, rank)
        return SVDConv2d.from_dense(self.dense, rank, self.scheme)

    @property
    def matrix(self) -> Tensor:
        return matrix_of(self.dense.weight.detach(), self.scheme)

    def apply(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The dense layer of another weight."""
        params = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return torch.func.functional_call(self.dense, params, (x,))


@st.composite
def linear_cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    out, into = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    leading = draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    dense = nn.Linear(into, out, bias=draw(st.booleans())).double()
    rank = draw(st.integers(1, min(out, into)))
    return Case(dense, "", rank, torch.randn(*leading, into).double())


@st.composite
def conv_cases(draw: st.DrawFn, scheme: str) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(
        st.one_of(
            st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 2), st.integers(0, 2))
        )
    )
    stride = (1, 1) if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    N, C = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    size = [
        (k - 1) * d + 1 + draw(st.integers(0, 5)) for k, d in zip(kernel, dilation, strict=True)
    ]
    dense = nn.Conv2d(
        C, N, kernel, stride, padding, dilation, bias=draw(st.booleans())
    ).double()  # fmt: skip
    rank = draw(st.integers(1, min(matrix_of(dense.weight, scheme).shape)))
    return Case(dense, scheme, rank, torch.randn(2, C, *size).double())


KINDS = {
    "linear": linear_cases(),
    "spatial": conv_cases("spatial"),
    "channel": conv_cases("channel"),
}


@pytest.mark.parametrize("kind", KINDS)
# A 'same' padding of an even kernel is lopsided, of which torch warns; it is right nevertheless.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
class TestContract:
    @settings(max_examples=40)
    @given(data=st.data())
    def test_equals_the_dense_layer_of_its_merged_weight(self, kind: str, data) -> None:
        case = data.draw(KINDS[kind])
        layer = case.factored()
        expected = case.apply(layer.merged_weight(), layer.bias, case.x)
        torch.testing.assert_close(layer(case.x), expected, **EXACT)
        torch.testing.assert_close(layer.dense()(case.x), expected, **EXACT)
        assert type(layer.dense()) is type(case.dense)

    @settings(max_examples=30)
    @given(data=st.data())
    def test_gradients_are_the_tangent_of_the_dense_gradient(self, kind: str, data) -> None:
        case = data.draw(KINDS[kind])
        layer = case.factored()
        cotangent = torch.randn_like(layer(case.x))
        x = case.x.clone().requires_grad_()
        (layer(x) * cotangent).sum().backward()

        weight = layer.merged_weight().detach().requires_grad_()
        y = case.x.clone().requires_grad_()
        (case.apply(weight, layer.bias.detach() if layer.bias is not None else None, y)
         * cotangent).sum().backward()  # fmt: skip
        G = matrix_of(weight.grad, case.scheme)
        U, s, V = layer.U.detach(), layer.s.detach(), layer.V.detach()
        torch.testing.assert_close(layer.U.grad, G @ V @ torch.diag(s), **EXACT)
        torch.testing.assert_close(layer.s.grad, torch.diagonal(U.T @ G @ V), **EXACT)
        torch.testing.assert_close(layer.V.grad, G.T @ U @ torch.diag(s), **EXACT)
        torch.testing.assert_close(x.grad, y.grad, **EXACT)
        if layer.bias is not None:
            dims = (0, 2, 3) if cotangent.ndim == 4 else tuple(range(cotangent.ndim - 1))
            expected = cotangent.sum(dims) if dims else cotangent
            torch.testing.assert_close(layer.bias.grad, expected, **EXACT)

    @settings(max_examples=20)
    @given(data=st.data())
    def test_full_rank_keeps_the_function(self, kind: str, data) -> None:
        case = data.draw(KINDS[kind])
        layer = case.factored(min(case.matrix.shape))
        assert layer.rank == layer.full_rank
        torch.testing.assert_close(layer(case.x), case.dense(case.x), **EXACT)

    @settings(max_examples=20)
    @given(data=st.data())
    def test_factors_are_the_leading_singular_triplets_with_the_norm_kept(
        self, kind: str, data
    ) -> None:
        case = data.draw(KINDS[kind])
        layer, r, W = case.factored(), case.rank, case.matrix
        eye = torch.eye(r).double()
        torch.testing.assert_close(layer.U.T @ layer.U, eye, **EXACT)
        torch.testing.assert_close(layer.V.T @ layer.V, eye, **EXACT)
        merged = matrix_of(layer.merged_weight().detach(), case.scheme)
        torch.testing.assert_close(merged, (layer.U * layer.s) @ layer.V.T, **EXACT)
        torch.testing.assert_close(merged.norm(), W.norm())
        # Eckart and Young: of all matrices of rank r, up to the one scale, none is nearer.
        eigenvalues = torch.linalg.eigvalsh(W @ W.T).flip(0).clamp_min(0)
        energy = eigenvalues[:r].sum() / eigenvalues.sum()
        torch.testing.assert_close((merged * W).sum() / W.norm() ** 2, energy.sqrt())

    @settings(max_examples=10)
    @given(data=st.data())
    def test_set_factors_changes_values_and_rank_but_not_the_parameters(
        self, kind: str, data
    ) -> None:
        case = data.draw(KINDS[kind])
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

    def test_refuses_factors_that_do_not_fit_together(self, kind: str) -> None:
        layer = example(kind).factored()
        m, n = len(layer.U), len(layer.V)
        with pytest.raises(ValueError, match=r"\(m, r\), \(r,\), \(n, r\).*got"):
            layer.set_factors(torch.zeros(m, 2), torch.zeros(1), torch.zeros(n, 1))
        with pytest.raises(ValueError, match="rank 99 is more than"):
            layer.set_factors(torch.zeros(m, 99), torch.zeros(99), torch.zeros(n, 99))
        with pytest.raises(ValueError, match=r"got.*U"):
            layer.set_factors(torch.zeros(m + 1, 1), torch.zeros(1), torch.zeros(n, 1))

    def test_state_dict_round_trip(self, kind: str) -> None:
        case = example(kind)
        layer, other = case.factored(), case.factored()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.normal_()
        other.load_state_dict(layer.state_dict())
        assert set(layer.state_dict()) == {"U", "s", "V", "bias"}
        assert torch.equal(layer(case.x), other(case.x))

    def test_gradcheck(self, kind: str) -> None:
        case = example(kind)
        layer = case.factored()
        values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
        names = [name for name, _ in layer.named_parameters()]

        def function(*values: Tensor) -> Tensor:
            parameters = dict(zip(names, values, strict=True))
            return torch.func.functional_call(layer, parameters, (case.x,))

        assert torch.autograd.gradcheck(function, values)

    def test_runs_under_autocast(self, kind: str) -> None:
        case = example(kind)
        layer = case.factored().float()
        x = case.x.float()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
        y.float().sum().backward()
        assert layer.U.grad.dtype == torch.float32

    def test_repr_tells_shape_and_rank(self, kind: str) -> None:
        text = repr(example(kind).factored())
        assert "rank=2" in text
        assert "bias=True" in text


def example(kind: str) -> Case:
    torch.manual_seed(1)
    if kind == "linear":
        return Case(nn.Linear(5, 4).double(), "", 2, torch.randn(3, 5).double())
    dense = nn.Conv2d(3, 4, (3, 2), (1, 2), (1, 0), (1, 2)).double()
    return Case(dense, kind, 2, torch.randn(2, 3, 7, 8).double())


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
def test_channels_last_gives_the_same(scheme: str) -> None:
    case = example(scheme)
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


def test_output_directions_span_what_the_layer_can_reach() -> None:
    for kind in KINDS:
        layer = example(kind).factored()
        W = layer.merged_weight().detach()
        reach = W.flatten(1)  # every column is an output the kernel can make at a pixel
        basis, _ = torch.linalg.qr(layer.output_directions().detach())
        torch.testing.assert_close(basis @ (basis.T @ reach), reach, **EXACT)
