"""Loss terms against loops over their definitions; gradients against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles import losses as oracle
from torch import Tensor

from svdalign import losses
from svdalign.lab.costs import LiveTensors

seeds = st.integers(0, 2**20)
small = st.integers(1, 7)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def orthonormal(m: int, r: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(m, r, seed=seed)).Q


def one_hot(batch: int, classes: int) -> Tensor:
    return torch.eye(classes).double()[torch.arange(batch) % classes]


class TestOrthogonality:
    @settings(max_examples=25)
    @given(m=small, r=small, seed=seeds)
    def test_is_the_sum_of_the_gram_defects(self, m: int, r: int, seed: int) -> None:
        U, V = randn(m, r, seed=seed), randn(m + 1, r, seed=seed + 1)
        found = float(losses.orthogonality_penalty(U, V))
        assert found == pytest.approx(oracle.orthogonality(U.numpy(), V.numpy()))

    def test_is_zero_on_the_manifold(self) -> None:
        assert float(losses.orthogonality_penalty(orthonormal(6, 3))) < 1e-28

    def test_gradient(self) -> None:
        inputs = (randn(5, 3).requires_grad_(), randn(4, 2, seed=1).requires_grad_())
        assert torch.autograd.gradcheck(losses.orthogonality_penalty, inputs)


class TestShare:
    @settings(max_examples=40)
    @given(N=st.integers(2, 8), data=st.data(), seed=seeds)
    def test_is_the_feedbacks_part_outside_the_output_space(self, N: int, data, seed) -> None:
        q = data.draw(st.integers(1, N))
        f = data.draw(st.integers(1, 2 * N))
        output, feedback = randn(N, q, seed=seed), randn(N, f, seed=seed + 1)
        found = float(losses.subspace_share(output, feedback))
        assert found == pytest.approx(oracle.share(output.numpy(), feedback.numpy()), abs=1e-9)
        assert -1e-12 <= found <= 1 + 1e-12

    @settings(max_examples=25)
    @given(seed=seeds)
    def test_of_orthonormal_factors_is_the_designs_formula(self, seed) -> None:
        U, Q = orthonormal(8, 3, seed), orthonormal(8, 4, seed + 1)
        expected = 1 - float((U.T @ Q).square().sum()) / 4
        assert float(losses.subspace_share(U, Q)) == pytest.approx(expected)

    def test_is_zero_where_the_output_space_contains_the_feedback(self) -> None:
        U = orthonormal(8, 4)
        assert float(losses.subspace_share(U, U @ randn(4, 2))) == pytest.approx(0.0, abs=1e-12)
        assert float(losses.subspace_share(randn(3, 5), randn(3, 2))) == 0.0

    def test_is_one_where_they_are_orthogonal(self) -> None:
        Q = orthonormal(8, 6)
        assert float(losses.subspace_share(Q[:, :3], Q[:, 3:])) == pytest.approx(1.0)

    def test_does_not_depend_on_the_basis(self) -> None:
        U, Q = randn(8, 3), randn(8, 4, seed=1)
        found = losses.subspace_share(U @ randn(3, 3, seed=2), Q @ randn(4, 4, seed=3))
        torch.testing.assert_close(found, losses.subspace_share(U, Q))

    @pytest.mark.parametrize("f", [2, 5, 9])
    def test_gradient(self, f: int) -> None:
        feedback = randn(6, f, seed=1)
        output = randn(6, 3).requires_grad_()
        assert torch.autograd.gradcheck(lambda U: losses.subspace_share(U, feedback), output)

    @pytest.mark.parametrize("f", [2, 9])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_known_to_its_rounding(self, f: int, dtype: torch.dtype) -> None:
        output, feedback = randn(6, 3).to(dtype).requires_grad_(), randn(6, f, seed=1).to(dtype)
        found = losses.subspace_share(output, feedback)
        assert found.dtype == dtype
        wanted = oracle.share(output.detach().double().numpy(), feedback.double().numpy())
        assert float(found.detach()) == pytest.approx(wanted, abs=torch.finfo(dtype).eps)
        (grad,) = torch.autograd.grad(found, output)
        assert grad.isfinite().all()

    def test_descent_turns_the_output_space_to_the_feedback(self) -> None:
        Q = orthonormal(8, 6)
        U, directions = Q[:, :3].clone().requires_grad_(), Q[:, 3:] + 0.3 * Q[:, :3]
        before = losses.subspace_share(U, directions)
        (grad,) = torch.autograd.grad(before, U)
        assert losses.subspace_share(U - 0.1 * grad, directions) < before


def blank_batches(*shape: int) -> dict[str, torch.Tensor]:
    """A batch whose sample 1 has no direction of its own."""
    batches = {}
    for name, value in (("zero", 0.0), ("constant", 5.1), ("tiny", None)):
        h = randn(*shape).float() + 1.0
        h[1] = 1e-6 * h[1] if value is None else value
        batches[name] = h
    return batches


class TestSamplesWithoutDirection:
    """The cosine of a zero vector is not defined, and has no bounded gradient close to it."""

    @pytest.mark.parametrize("blank", ["zero", "constant", "tiny"])
    @pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 2), (5, 4, 1, 1), (5, 6, 3)])
    def test_similarity_is_that_of_the_others(self, shape, blank: str) -> None:
        h, y = blank_batches(*shape)[blank].requires_grad_(), one_hot(5, 3)
        found = losses.similarity_alignment(h, y)
        kept = [0, 2, 3, 4]
        others = oracle.similarity_alignment(
            h.detach().double().numpy()[kept], y.double().numpy()[kept]
        )
        assert float(found.detach()) == pytest.approx(others * 16 / 25, abs=1e-5)
        (grad,) = torch.autograd.grad(found, h)
        assert grad[1].abs().max() == 0
        assert 0 < float(grad.abs().max()) < 10

    def test_similarity_leaves_out_samples_without_a_label(self) -> None:
        h, y = randn(5, 4).requires_grad_(), one_hot(5, 3)
        y[1] = 0
        found = losses.similarity_alignment(h, y)
        kept = [0, 2, 3, 4]
        others = oracle.similarity_alignment(h.detach().numpy()[kept], y.numpy()[kept])
        assert float(found.detach()) == pytest.approx(others * 16 / 25, abs=1e-9)

    def test_nothing_has_a_direction(self) -> None:
        h = torch.zeros(4, 3, requires_grad=True)
        for loss in (
            losses.similarity_alignment(h, one_hot(4, 2).float()),
            losses.cosine_alignment(h, torch.zeros(4, 3)),
        ):
            (grad,) = torch.autograd.grad(loss, h)
            assert grad.abs().max() == 0

    def test_cosine_is_that_of_the_others(self) -> None:
        p, b = randn(4, 3), randn(4, 3, seed=1)
        p[1], b[2] = 0, 0
        p.requires_grad_()
        found = losses.cosine_alignment(p, b)
        kept = [0, 3]
        others = oracle.cosine_alignment(p.detach().numpy()[kept], b.numpy()[kept])
        assert float(found.detach()) == pytest.approx(1 - (1 - others) / 2)
        (grad,) = torch.autograd.grad(found, p)
        assert grad[1:3].abs().max() == 0
        assert 0 < float(grad.abs().max()) < 10


SHAPES = [(5, 4), (5, 4, 3, 2), (5, 4, 1, 1), (5, 6, 3), (5, 1, 3)]


class TestSimilarity:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_the_mean_squared_difference_of_similarity_matrices(self, shape) -> None:
        h, y = randn(*shape), one_hot(shape[0], 3)
        found = float(losses.similarity_alignment(h, y))
        # The library keeps the root of the variance differentiable at 0 with an epsilon of 1e-8.
        assert found == pytest.approx(oracle.similarity_alignment(h.numpy(), y.numpy()), abs=1e-6)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_statistics(self, shape) -> None:
        h = randn(*shape)
        expected = oracle.statistics(h.numpy())
        np.testing.assert_allclose(losses.channel_statistics(h).numpy(), expected, atol=1e-6)

    @settings(max_examples=25)
    @given(batch=st.integers(2, 6), width=st.integers(4, 8), seed=seeds)
    def test_matrix_is_a_matrix_of_cosines(self, batch: int, width: int, seed: int) -> None:
        x = randn(batch, width, seed=seed)
        rows, _ = losses.directions(x)
        S = rows @ rows.mT
        np.testing.assert_allclose(S.numpy(), oracle.similarity(x.numpy()), atol=1e-9)
        assert float(S.abs().max()) <= 1 + 1e-9
        torch.testing.assert_close(S.diagonal(), torch.ones(batch).double())

    def test_is_zero_where_activations_are_similar_as_targets_are(self) -> None:
        y = one_hot(6, 3)
        assert float(losses.similarity_alignment(2.0 * y + 1.0, y)) == pytest.approx(0.0, abs=1e-12)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_gradient(self, shape) -> None:
        y = one_hot(shape[0], 3)
        h = randn(*shape).requires_grad_()
        assert torch.autograd.gradcheck(lambda h: losses.similarity_alignment(h, y), h)

    def test_a_dead_unit_gives_a_finite_gradient(self) -> None:
        for shape in SHAPES:
            h = torch.zeros(shape, requires_grad=True)
            losses.similarity_alignment(h, one_hot(shape[0], 3).float()).backward()
            assert torch.isfinite(h.grad).all()


class TestCosine:
    def test_is_one_minus_the_mean_cosine(self) -> None:
        p, b = randn(5, 4), randn(5, 4, seed=1)
        expected = oracle.cosine_alignment(p.numpy(), b.numpy())
        assert float(losses.cosine_alignment(p, b)) == pytest.approx(expected)

    def test_bounds(self) -> None:
        p = randn(5, 4)
        assert float(losses.cosine_alignment(p, 3 * p)) == pytest.approx(0.0)
        assert float(losses.cosine_alignment(p, -p)) == pytest.approx(2.0)

    def test_gradient(self) -> None:
        inputs = (randn(5, 4).requires_grad_(), randn(5, 4, seed=1).requires_grad_())
        assert torch.autograd.gradcheck(losses.cosine_alignment, inputs)


class TestHoyer:
    @given(values=st.lists(st.floats(0.01, 10), min_size=1, max_size=8), scale=st.floats(0.1, 10))
    def test_is_the_ratio_of_norms_and_scale_free(self, values, scale) -> None:
        s = torch.tensor(values).double()
        expected = sum(values) / math.sqrt(sum(v * v for v in values))
        assert float(losses.hoyer_sparsity(s)) == pytest.approx(expected)
        assert float(losses.hoyer_sparsity(scale * s)) == pytest.approx(expected)
        assert 1 - 1e-9 <= expected <= math.sqrt(len(values)) + 1e-9

    def test_gradient(self) -> None:
        s = randn(5).abs().add(0.1).requires_grad_()
        assert torch.autograd.gradcheck(losses.hoyer_sparsity, s)


def test_similarity_makes_one_map_at_a_time() -> None:
    """Its gradient is a map; on the way there one more is made at the most, and none held."""
    h = torch.randn(4, 8, 16, 16, requires_grad=True)
    with LiveTensors([h]) as memory:
        loss = losses.similarity_alignment(h, torch.eye(4))
        held = memory.live
        loss.backward()
    one = 4 * h.numel()
    assert held < 1.1 * one
    assert memory.peak < 3.1 * one
