"""Feedback matrices: one linear map and its adjoint, whatever its parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdalign.feedback import Feedback, GaussianFeedback, StructuredFeedback

EXACT = {"rtol": 0.0, "atol": 1e-10}

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def make(kind: str, d: int, classes: int, rank: int | None = None, seed: int = 0) -> Feedback:
    generator = torch.Generator().manual_seed(seed)
    if kind == "gaussian":
        return GaussianFeedback(d, classes, generator=generator).double()
    return StructuredFeedback(
        d, classes, rank=rank, learn=kind == "learned", generator=generator
    ).double()


def dense(feedback: Feedback) -> Tensor:
    """The matrix, from its parts and its definition."""
    if isinstance(feedback, GaussianFeedback):
        return feedback.B
    return feedback.U @ torch.diag(feedback.s) @ feedback.V.T


@pytest.mark.parametrize("kind", ["gaussian", "fixed", "learned"])
class TestContract:
    @settings(max_examples=25)
    @given(size=sizes, leading=st.lists(st.integers(1, 3), max_size=2))
    def test_readout_and_projection_are_one_matrix_and_its_transpose(
        self, kind: str, size, leading
    ) -> None:
        d, C = size
        feedback = make(kind, d, C)
        with torch.no_grad():
            for value in (*feedback.parameters(), *feedback.buffers()):
                value += 0.1 * torch.randn_like(value)  # off orthonormality: still one matrix
        B = dense(feedback)
        p, e = torch.randn(*leading, d).double(), torch.randn(*leading, C).double()
        torch.testing.assert_close(feedback.project(e), e @ B.T, **EXACT)
        torch.testing.assert_close(feedback.readout(p), p @ B, **EXACT)
        torch.testing.assert_close((feedback.readout(p) * e).sum(), (p * feedback.project(e)).sum())

    def test_the_gradient_at_the_features_is_the_projected_error(self, kind: str) -> None:
        feedback = make(kind, 6, 4)
        p = torch.randn(3, 6).double().requires_grad_()
        e = torch.randn(3, 4).double()
        (delta,) = torch.autograd.grad((feedback.readout(p) * e).sum(), p)
        torch.testing.assert_close(delta, feedback.project(e), **EXACT)

    def test_directions_span_what_comes_back(self, kind: str) -> None:
        feedback = make(kind, 7, 3)
        basis, _ = torch.linalg.qr(feedback.directions())
        delta = feedback.project(torch.randn(5, 3).double())
        torch.testing.assert_close(delta @ basis @ basis.T, delta, **EXACT)

    def test_the_seed_decides(self, kind: str) -> None:
        assert torch.equal(dense(make(kind, 5, 3, seed=1)), dense(make(kind, 5, 3, seed=1)))
        assert not torch.equal(dense(make(kind, 5, 3, seed=1)), dense(make(kind, 5, 3, seed=2)))

    def test_state_dict_round_trip(self, kind: str) -> None:
        one, two = make(kind, 5, 3, seed=1), make(kind, 5, 3, seed=2)
        two.load_state_dict(one.state_dict())
        assert torch.equal(dense(one), dense(two))


@settings(max_examples=25)
@given(size=sizes, rank=st.one_of(st.none(), st.integers(1, 12)), learn=st.booleans())
def test_structured_factors_are_orthonormal_and_of_the_rank_asked_for(size, rank, learn) -> None:
    d, C = size
    feedback = make("learned" if learn else "fixed", d, C, rank)
    k = min(d, C) if rank is None else min(rank, d, C)
    assert (feedback.U.shape, feedback.s.shape, feedback.V.shape) == ((d, k), (k,), (C, k))
    for X in (feedback.U, feedback.V):
        torch.testing.assert_close(X.T @ X, torch.eye(k).double(), rtol=0, atol=1e-5)


def test_only_learned_feedback_has_parameters() -> None:
    assert not list(make("gaussian", 4, 3).parameters())
    assert not list(make("fixed", 4, 3).parameters())
    assert {name for name, _ in make("learned", 4, 3).named_parameters()} == {"U", "s", "V"}
    assert set(make("fixed", 4, 3).state_dict()) == {"U", "s", "V"}


def test_gaussian_entries_have_the_stated_variance() -> None:
    B = make("gaussian", 400, 25).B
    assert float(B.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(B.var()) == pytest.approx(1 / 25, rel=0.05)


def test_learned_gradient_is_features_times_error() -> None:
    """dL/dB = p e^T summed over the batch; in the factors, its tangent-space form."""
    feedback = make("learned", 6, 4)
    p, e = torch.randn(5, 6).double(), torch.randn(5, 4).double()
    (feedback.readout(p) * e).sum().backward()
    G = sum(torch.outer(p[i], e[i]) for i in range(5))
    U, s, V = feedback.U.detach(), feedback.s.detach(), feedback.V.detach()
    torch.testing.assert_close(feedback.U.grad, G @ V @ torch.diag(s), **EXACT)
    torch.testing.assert_close(feedback.s.grad, torch.diagonal(U.T @ G @ V), **EXACT)
    torch.testing.assert_close(feedback.V.grad, G.T @ U @ torch.diag(s), **EXACT)
