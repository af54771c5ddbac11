"""The propositions of docs/theory.md, each against the functions that the library runs."""

from __future__ import annotations

import pytest
import torch
from tests.oracles import stiefel as oracle
from torch import Tensor, nn

import svdalign as sva
from svdalign.factors.stiefel import (
    RETRACTIONS,
    orthogonality_error,
    polar_retract,
    qr_retract,
)
from svdalign.losses import orthogonality_penalty


def orthonormal(m: int, r: int) -> Tensor:
    return qr_retract(torch.randn(m, r, dtype=torch.float64))


def projected(X: Tensor, Z: Tensor) -> Tensor:
    """``Z`` projected onto the tangent space at ``X``, spelled out on a basis of that space."""
    basis = oracle.tangent_basis(X.numpy())
    return torch.from_numpy((basis.T @ (basis @ Z.numpy().ravel())).reshape(X.shape))


def direction(name: str, X: Tensor, Z: Tensor) -> Tensor:
    """Derivative of ``R(X + t Z)`` in ``t`` at 0."""
    t = 1e-5
    retract = RETRACTIONS[name]
    return (retract(X + t * Z) - retract(X - t * Z)) / (2 * t)


# --- 1: the projected gradient ------------------------------------------------------------------


def test_the_projected_gradient_loses_nothing_but_length() -> None:
    torch.manual_seed(0)
    X, G = orthonormal(7, 3), torch.randn(7, 3, dtype=torch.float64)
    P = projected(X, G)
    XtG = X.mT @ G
    torch.testing.assert_close(P, G - X @ (0.5 * (XtG + XtG.mT)))
    assert float((G * P).sum()) == pytest.approx(float(P.square().sum()), rel=1e-12)


# --- 2: a raw gradient step, then a retraction --------------------------------------------------


@pytest.mark.parametrize("name", ["polar", "newton-schulz"])
def test_polar_retraction_of_a_raw_step_is_a_projected_step(name: str) -> None:
    torch.manual_seed(0)
    X, Z = orthonormal(7, 3), torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(direction(name, X, Z), projected(X, Z), rtol=0, atol=1e-8)


def test_qr_retraction_of_a_raw_step_keeps_what_is_below_the_diagonal() -> None:
    torch.manual_seed(0)
    X, Z = orthonormal(7, 3), torch.randn(7, 3, dtype=torch.float64)
    A = X.mT @ Z
    rho = A.tril(-1) - A.tril(-1).mT
    expected = X @ rho + Z - X @ A
    torch.testing.assert_close(direction("qr", X, Z), expected, rtol=0, atol=1e-8)
    tangent = projected(X, Z)
    torch.testing.assert_close(direction("qr", X, tangent), tangent, rtol=0, atol=1e-8)


def test_qr_retraction_of_a_raw_step_can_go_uphill_where_polar_does_not() -> None:
    X = torch.eye(2, dtype=torch.float64)
    downhill = torch.tensor([[0.0, 2.0], [1.0, 0.0]], dtype=torch.float64)  # minus the gradient
    assert float((downhill * direction("qr", X, downhill)).sum()) == pytest.approx(-1.0, abs=1e-8)
    assert float((downhill * direction("polar", X, downhill)).sum()) == pytest.approx(0.5, abs=1e-8)


# --- 3: a penalty, and nothing ------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 3.0])
def test_a_penalty_bounds_the_drift(beta: float) -> None:
    """Along descent by ``sqrt((f(X_0) - f(X)) / beta)``, at rest by ``|f'| / (4 beta sigma)``."""
    torch.manual_seed(0)
    X, A = orthonormal(6, 3), torch.randn(6, 3, dtype=torch.float64)

    def f(X: Tensor) -> Tensor:
        return (X - A).square().sum()

    start = float(f(X))
    for _ in range(20_000):
        bound = max(0.0, (start - float(f(X))) / beta) ** 0.5
        assert float(orthogonality_error(X)) <= bound + 1e-9
        at = X.requires_grad_()
        (grad,) = torch.autograd.grad(f(at) + beta * orthogonality_penalty(at), at)
        X = X.detach()
        if float(grad.norm()) < 1e-10:
            break
        X = X - 1e-2 / (1 + beta) * grad
    slope = torch.linalg.matrix_norm(2 * (X - A)).item()
    smallest = float(torch.linalg.svdvals(X).min())
    assert 0 < float(orthogonality_error(X)) <= slope / (4 * beta * smallest) * (1 + 1e-6)


def test_without_anything_columns_grow_with_their_singular_values() -> None:
    """Along the flow ``|u_i|^2 - s_i^2`` and ``|v_i|^2 - s_i^2`` stand still."""
    torch.manual_seed(0)
    net = sva.factorize(nn.Linear(5, 6).double(), {"": 3})
    x, target = torch.randn(20, 5).double(), 3 * torch.randn(20, 6).double()
    factors = [net.U, net.s, net.V]
    s_before = net.s.detach().square()

    for _ in range(4000):
        grads = torch.autograd.grad((net(x) - target).square().mean(), factors)
        with torch.no_grad():
            for X, grad in zip(factors, grads, strict=True):
                X -= 1e-3 * grad
    moved = net.s.detach().square() - s_before
    for X in (net.U, net.V):
        torch.testing.assert_close(X.detach().square().sum(0) - 1, moved, rtol=0, atol=2e-3)
    assert moved.abs().max() > 0.1


# --- 4: when feedback and backpropagation agree -------------------------------------------------


def test_below_a_linear_readout_feedback_is_downhill_as_far_as_its_product_is_positive() -> None:
    """For ``z = W h`` the feedback's ``B e`` and backpropagation's ``W^T e`` have the inner product
    ``e^T (W B) e``."""
    torch.manual_seed(0)
    W, B = torch.randn(4, 9, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    product = W @ B
    values, errors = torch.linalg.eigh((product + product.mT) / 2)
    assert values[0] < 0 < values[-1]  # random feedback: downhill for some errors, not for others
    for e, value in zip(errors.mT, values, strict=True):
        assert float((B @ e) @ (W.mT @ e)) == pytest.approx(float(value), rel=1e-9)


def test_polar_and_qr_land_on_the_manifold_at_rounding() -> None:
    torch.manual_seed(0)
    X = orthonormal(9, 4) + 0.1 * torch.randn(9, 4, dtype=torch.float64)
    for retract in (polar_retract, qr_retract):
        assert float(orthogonality_error(retract(X))) < 1e-14
