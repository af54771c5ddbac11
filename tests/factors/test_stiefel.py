"""One contract for every retraction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles import stiefel as oracle
from torch import Tensor

from svdalign.factors.stiefel import (
    RETRACTIONS,
    newton_schulz_retract,
    orthogonality_error,
    orthogonalize,
    polar_retract,
    qr_retract,
)

EXACT = {"rtol": 0.0, "atol": 1e-10}

shapes = st.tuples(st.integers(1, 8), st.integers(1, 8)).map(lambda t: (max(t), min(t)))
seeds = st.integers(0, 2**20)


def point(shape: tuple[int, int], seed: int) -> Tensor:
    X = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(oracle.gram_schmidt(X))


def noise(shape: tuple[int, int], seed: int) -> Tensor:
    """Of spectral norm 1."""
    N = np.random.default_rng(seed + 1).normal(size=shape)
    return torch.from_numpy(N / np.linalg.norm(N, 2))


def tangent(X: Tensor, seed: int) -> Tensor:
    basis = oracle.tangent_basis(X.numpy())
    weights = np.random.default_rng(seed + 2).normal(size=len(basis))
    return torch.from_numpy((weights @ basis).reshape(X.shape))


@pytest.mark.parametrize("name", sorted(RETRACTIONS))
class TestRetraction:
    @settings(max_examples=30)
    @given(shape=shapes, seed=seeds)
    def test_lands_on_the_manifold(self, name: str, shape, seed) -> None:
        R = RETRACTIONS[name](point(shape, seed) + 1e-3 * noise(shape, seed))
        assert np.linalg.norm(R.numpy().T @ R.numpy() - np.eye(shape[1])) < 1e-9

    @settings(max_examples=30)
    @given(shape=shapes, seed=seeds)
    def test_leaves_a_point_of_the_manifold_where_it_is(self, name: str, shape, seed) -> None:
        X = point(shape, seed)
        torch.testing.assert_close(RETRACTIONS[name](X), X, **EXACT)

    @settings(max_examples=30)
    @given(shape=shapes, seed=seeds)
    def test_agrees_with_a_tangent_step_to_first_order(self, name: str, shape, seed) -> None:
        retract, X, t = RETRACTIONS[name], point(shape, seed), 1e-5
        V = tangent(X, seed)
        slope = (retract(X + t * V) - retract(X - t * V)) / (2 * t)
        torch.testing.assert_close(slope, V, rtol=1e-6, atol=1e-7)

    def test_works_on_batches(self, name: str) -> None:
        X = torch.stack([point((5, 3), seed) + 1e-2 * noise((5, 3), seed) for seed in range(4)])
        R = RETRACTIONS[name](X)
        for x, r in zip(X, R, strict=True):
            torch.testing.assert_close(r, RETRACTIONS[name](x), **EXACT)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_stays_so_and_raises_nothing(self, name: str, value: float) -> None:
        X = torch.stack([point((5, 3), 0), point((5, 3), 1)])
        X[0, 2, 1] = value
        R = RETRACTIONS[name](X)
        assert not R[0].isfinite().all()
        torch.testing.assert_close(R[1], X[1], **EXACT)

    def test_keeps_dtype_and_input(self, name: str) -> None:
        X = (point((6, 2), 0) + 1e-2 * noise((6, 2), 0)).float()
        before = X.clone()
        assert RETRACTIONS[name](X).dtype == torch.float32
        assert torch.equal(X, before)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_retracted_to_its_rounding(self, name: str, dtype) -> None:
        X = (point((6, 2), 0) + 1e-2 * noise((6, 2), 0)).to(dtype)
        R = RETRACTIONS[name](X)
        assert R.dtype == dtype
        wanted = RETRACTIONS[name](X.double())
        bound = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(R.double(), wanted, rtol=0, atol=bound)

    @pytest.mark.parametrize("shape", [(2, 3), (4,)])
    def test_refuses_a_wide_matrix(self, name: str, shape) -> None:
        with pytest.raises(ValueError, match=r"X must have shape \(\.\.\., m, r\).*got"):
            RETRACTIONS[name](torch.zeros(shape))


@given(shape=shapes, seed=seeds)
def test_qr_is_gram_schmidt(shape, seed) -> None:
    X = np.random.default_rng(seed).normal(size=shape)
    expected = torch.from_numpy(oracle.gram_schmidt(X))
    torch.testing.assert_close(qr_retract(torch.from_numpy(X)), expected, rtol=0, atol=1e-8)


@given(shape=shapes, seed=seeds)
def test_polar_is_the_symmetric_orthogonalisation(shape, seed) -> None:
    X = point(shape, seed) + 0.5 * noise(shape, seed)
    expected = torch.from_numpy(oracle.polar(X.numpy()))
    torch.testing.assert_close(polar_retract(X), expected, **EXACT)


@settings(max_examples=30)
@given(shape=shapes, seed=seeds)
def test_polar_is_the_nearest_point(shape, seed) -> None:
    X = torch.from_numpy(np.random.default_rng(seed).normal(size=shape))
    distance = (polar_retract(X) - X).norm()
    for other in range(10):
        assert distance <= (point(shape, seed + other) - X).norm() + 1e-12
        near = polar_retract(X) + 1e-2 * noise(shape, seed + other)
        assert distance <= (qr_retract(near) - X).norm() + 1e-12


@given(shape=shapes, seed=seeds, size=st.floats(0.0, 0.3))
def test_newton_schulz_converges_to_the_polar_factor(shape, seed, size) -> None:
    X = point(shape, seed) + size * noise(shape, seed)
    expected = torch.from_numpy(oracle.polar(X.numpy()))
    torch.testing.assert_close(newton_schulz_retract(X, steps=8), expected, **EXACT)


@given(shape=shapes, seed=seeds, size=st.floats(0.0, 0.4))
def test_newton_schulz_squares_the_error_at_each_step(shape, seed, size) -> None:
    """With eigenvalues 1 + e of the Gram matrix, a step leaves -3/4 e^2 + e^3/4."""
    X = point(shape, seed) + size * noise(shape, seed)
    e = np.linalg.eigvalsh(X.numpy().T @ X.numpy()) - 1.0
    after = newton_schulz_retract(X, steps=1).numpy()
    found = np.linalg.eigvalsh(after.T @ after) - 1.0
    np.testing.assert_allclose(found, np.sort(-0.75 * e**2 + 0.25 * e**3), atol=1e-10)


def test_newton_schulz_refuses_no_steps() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        newton_schulz_retract(torch.eye(2), steps=0)


class TestOrthogonalityError:
    @given(shape=shapes, seed=seeds)
    def test_is_the_norm_of_the_gram_defect(self, shape, seed) -> None:
        X = np.random.default_rng(seed).normal(size=shape)
        expected = np.sqrt(sum(
            (X[:, i] @ X[:, j] - (i == j)) ** 2 for i in range(shape[1]) for j in range(shape[1])
        ))  # fmt: skip
        assert float(orthogonality_error(torch.from_numpy(X))) == pytest.approx(expected)

    def test_is_zero_on_the_manifold(self) -> None:
        assert float(orthogonality_error(torch.eye(4)[:, :2])) == 0.0


@pytest.mark.parametrize("size", [0.5, 3.0, 100.0])
def test_newton_schulz_converges_after_a_large_update(size: float) -> None:
    """It used to diverge from ||X^T X - I|| of about 2, which a rate of 1e-2 reaches."""
    X = point((40, 8), 0) + size * noise((40, 8), 1)
    expected = torch.from_numpy(oracle.polar(X.numpy()))
    for _ in range(12):  # what training steps without updates would do
        X = newton_schulz_retract(X)
    torch.testing.assert_close(X, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6, 1e10, 1e14])
def test_qr_is_orthonormal_for_any_condition(condition: float) -> None:
    """The products that are fast near the manifold would lose digits far from it."""
    A, B = point((30, 6), 0), point((6, 6), 1)
    s = torch.logspace(0, -np.log10(condition), 6, dtype=torch.float64)
    Q = qr_retract(A @ torch.diag(s) @ B)
    assert np.linalg.norm(Q.numpy().T @ Q.numpy() - np.eye(6)) < 1e-13
    assert (Q.mT @ A @ torch.diag(s) @ B).diagonal().min() > 0


def test_single_precision_qr_is_as_orthonormal_as_householders() -> None:
    X = (point((512, 64), 0) + 0.5 * noise((512, 64), 0)).float()
    ours, torchs = orthogonality_error(qr_retract(X)), orthogonality_error(torch.linalg.qr(X).Q)
    assert ours < 4 * torchs


@given(shapes, seeds, st.booleans())
def test_orthogonalize_is_its_polynomial_of_every_singular_value(shape, seed, wide):
    X = np.random.default_rng(seed).normal(size=shape)
    X = X.T if wide else X
    result = orthogonalize(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(result, oracle.nearly_polar(X), rtol=0, atol=1e-9)


def test_orthogonalize_brings_singular_values_near_one_and_leaves_zero():
    A, B = point((40, 12), 0), point((30, 12), 1)
    sigma = torch.logspace(0, -2.3, 12, dtype=torch.float64)  # down to 1/200
    X = (A * sigma) @ B.mT
    values = torch.linalg.svdvals(orthogonalize(X))[:12]
    assert values.min() > 0.68
    assert values.max() < 1.21
    assert not orthogonalize(torch.zeros(4, 3)).any()
    stack = torch.stack([X, 3 * X])  # scale does not matter, and stacks are taken
    torch.testing.assert_close(orthogonalize(stack), orthogonalize(X).expand(2, -1, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_keeps_its_argument_s_dtype(dtype):
    X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(X.to(dtype))
    assert result.dtype == dtype
    expected = torch.from_numpy(oracle.nearly_polar(X.to(dtype).double().numpy()))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)
