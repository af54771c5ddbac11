"""Re-diagonalisation and truncation, from the definitions: W = U diag(s) V^T, Eckart-Young, and the
chain rule."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import schedulefree
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svdalign as sva
from svdalign import Learner
from svdalign.factors import FactoredLayer, SVDConv2d, _cut, factorize, reduce_rank
from svdalign.factors.rediagonalize import (
    energy_rank,
    rediagonalize,
    rediagonalized,
    spectrum,
)

M, N, R = 11, 9, 6


def skewed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Factors as an optimizer without retraction leaves them: not orthonormal, signs mixed."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.randn(k, R, generator=g, dtype=torch.float64) for k in (M, N))
    return U, torch.randn(R, generator=g, dtype=torch.float64), V


def orthonormal(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal factors, ``s`` of both signs and in no order."""
    U, s, V = skewed(seed)
    return torch.linalg.qr(U).Q.to(dtype), s.to(dtype), torch.linalg.qr(V).Q.to(dtype)


def model_of(factors: tuple[Tensor, Tensor, Tensor]) -> nn.Sequential:
    U, s, V = factors
    net = nn.Sequential(nn.Linear(len(V), len(U)), nn.Tanh(), nn.Linear(len(U), 3)).to(U.dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    model = factorize(net, {"0": len(s)})
    assert isinstance(model, nn.Sequential)
    layer_of(model).set_factors(U, s, V)
    return model


def layer_of(model: nn.Module) -> FactoredLayer:
    return next(m for m in model.modules() if isinstance(m, FactoredLayer))


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(16, N, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (16,), generator=g)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        x, y = batch(i, next(model.parameters()).dtype)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


# --- the decomposition --------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [skewed, orthonormal])
def test_rediagonalisation_is_the_svd_of_the_product(factors):
    U, s, V = factors()
    W = (U * s) @ V.mT
    new = rediagonalize(U, s, V)
    eye = torch.eye(R, dtype=torch.float64)
    torch.testing.assert_close((new.U * new.s) @ new.V.mT, W)
    torch.testing.assert_close(new.U.mT @ new.U, eye)
    torch.testing.assert_close(new.V.mT @ new.V, eye)
    torch.testing.assert_close(new.s, torch.linalg.svdvals(W)[:R])


@pytest.mark.parametrize("factors", [skewed, orthonormal])
def test_maps_carry_gradients_by_the_chain_rule(factors):
    U, s, V = (X.requires_grad_() for X in factors())
    G = torch.randn(M, N, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    old = torch.autograd.grad(((U * s) @ V.mT * G).sum(), (U, s, V))
    diagonal = rediagonalize(U, s, V)
    new = [X.detach().requires_grad_() for X in diagonal[:3]]
    grads = torch.autograd.grad(((new[0] * new[1]) @ new[2].mT * G).sum(), new)
    torch.testing.assert_close(old[0] @ diagonal.P, grads[0])
    torch.testing.assert_close(old[2] @ diagonal.Q, grads[2])
    torch.testing.assert_close((diagonal.P * diagonal.Q).mT @ s.detach(), diagonal.s)
    if factors is orthonormal:
        torch.testing.assert_close((diagonal.P * diagonal.Q).mT @ old[1], grads[1])


def test_maps_of_orthonormal_factors_are_signed_permutations():
    diagonal = rediagonalize(*orthonormal())
    for C in (diagonal.P, diagonal.Q):
        torch.testing.assert_close(
            C.abs().sort(0).values, torch.eye(R, dtype=C.dtype).sort(0).values
        )


def test_rank_deficient_factors_are_rediagonalised():
    U, s, V = skewed()
    U[:, 1] = U[:, 0]
    s[2] = 0
    new = rediagonalize(U, s, V)
    torch.testing.assert_close((new.U * new.s) @ new.V.mT, (U * s) @ V.mT)
    assert (new.s[-2:] < 1e-12).all()


@pytest.mark.parametrize(
    ("energy", "expected"), [(1.0, 3), (0.99, 3), (0.9, 2), (0.65, 2), (0.64, 1), (1e-9, 1)]
)
def test_energy_rank_is_the_smallest_that_suffices(energy, expected):
    # Squares 0.64, 0.32, 0.04, 0 of a whole of 1.
    s = torch.tensor([-(0.32**0.5), 0.2, 0.0, 0.8], dtype=torch.float64)
    assert energy_rank(s, energy) == expected


# --- truncation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [skewed, orthonormal])
@pytest.mark.parametrize("rank", range(1, R + 1))
def test_truncation_is_the_best_approximation_of_that_rank(factors, rank):
    model = model_of(factors())
    layer = layer_of(model)
    W = layer.matrix().detach()
    (cut,) = reduce_rank(model, rank=rank)
    values = torch.linalg.svdvals(W)
    best = values[rank:].square().sum()
    torch.testing.assert_close(torch.linalg.matrix_norm(W - layer.matrix()).square(), best)
    assert cut.dropped == pytest.approx(best.item(), abs=1e-12)
    assert cut.energy == pytest.approx((1 - best / values.square().sum()).item())
    assert (cut.before, cut.after, cut.full_rank) == (R, rank, N)
    assert layer.rank == rank
    assert [tuple(p.shape) for p in (layer.U, layer.s, layer.V)] == [(M, rank), (rank,), (N, rank)]


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
def test_truncated_convolution_keeps_the_share_it_says(scheme):
    torch.manual_seed(0)
    model = factorize(nn.Conv2d(5, 8, 3), {"": 7}, scheme).double()
    K = model.merged_weight().detach()
    (cut,) = reduce_rank(model, energy=0.8)
    error = (K - model.merged_weight()).square().sum().item()
    assert cut.dropped == pytest.approx(error)
    assert 0.8 <= cut.energy < 1
    assert 1 - error / K.square().sum().item() == pytest.approx(cut.energy)
    assert isinstance(model, SVDConv2d)
    assert model(torch.zeros(1, 5, 6, 6, dtype=torch.float64)).shape == (1, 8, 4, 4)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 1),
        ({"ratio": 0.5}, 3),
        ({"ratio": 0.51}, 4),
        ({"min_rank": 5}, 5),
        ({"min_rank": 0.5}, math.ceil(0.5 * N)),
        ({"ratio": 0.5, "min_rank": 2}, 3),
        ({"min_rank": 50}, R),
        ({"ratio": 1.0}, R),
    ],
)
def test_limits_hold(limits, expected):
    model = model_of(orthonormal())
    reduce_rank(model, energy=1e-6, **limits)
    assert layer_of(model).rank == expected


def test_rank_may_be_a_fraction_or_named():
    model = model_of(orthonormal())
    assert reduce_rank(model, rank=0.5)[0].after == math.ceil(0.5 * N)
    assert reduce_rank(model, rank={})[0].after == math.ceil(0.5 * N)
    assert reduce_rank(model, rank={"0": 2})[0].after == 2
    assert reduce_rank(model, rank=4)[0].after == 2  # never grows


@pytest.mark.parametrize("factors", [skewed, orthonormal])
def test_a_layer_that_is_not_cut_is_not_touched(factors):
    model = model_of(factors())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reduce_rank(model, energy=1.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_columns_that_stay_keep_their_place():
    model = model_of(orthonormal())
    U, s = layer_of(model).U.detach().clone(), layer_of(model).s.detach().clone()
    reduce_rank(model, rank=R - 2)
    kept = s.abs().argsort(descending=True)[: R - 2].sort().values
    assert torch.equal(layer_of(model).s, s[kept])
    assert torch.equal(layer_of(model).U, U[:, kept])


def test_memory_shrinks():
    model = model_of(orthonormal())
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(1))
    x, y = batch(1)
    F.cross_entropy(model(x), y).backward()
    reduce_rank(model, optimizer, rank=2)
    layer = layer_of(model)
    for p in (layer.U, layer.s, layer.V):
        state = optimizer.state[p]
        for tensor in (p, p.grad, state["exp_avg"], state["exp_avg_sq"]):
            assert tensor.shape[-1] == 2
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_pending_gradients_are_those_of_the_cut_factors():
    """With the same dL/dW, the gradient of a column that stays is what it was."""
    model = model_of(orthonormal())
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    layer = layer_of(model)
    expected = layer.U.grad[:, layer.s.abs().argsort(descending=True)[:3].sort().values]
    reduce_rank(model, rank=3)
    assert torch.equal(layer.U.grad, expected)


# --- optimizer state ----------------------------------------------------------------------------


def stepping(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A schedule-free optimizer as it is in training."""
    optimizer.train()
    return optimizer


ELEMENTWISE = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, foreach=False),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "schedule-free": lambda p: stepping(schedulefree.AdamWScheduleFree(p, 0.01)),
    "schedule-free, the mean kept": lambda p: stepping(
        schedulefree.SGDScheduleFreeReference(p, 0.1)
    ),
}


def turned_and_carried(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Re-diagonalise the layer at full rank."""
    layer = layer_of(model)
    _cut.cut_layer(
        layer,
        rediagonalize(layer.U, layer.s, layer.V),
        torch.arange(layer.rank),
        (optimizer,),
    )


@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE.keys())
def test_full_rank_rediagonalisation_changes_neither_function_nor_next_steps(make):
    """From orthonormal factors, with state made by training on them."""
    plain = model_of(orthonormal())
    optimizer = make(list(plain.parameters()))
    train(plain, optimizer, range(4))
    # Any U and V that are orthonormal will do as the point to compare at: state stays as it is.
    layer = layer_of(plain)
    U, V = (torch.linalg.qr(X.detach()).Q for X in (layer.U, layer.V))
    layer.set_factors(U, layer.s, V)
    turned = copy.deepcopy(plain)
    other = make(list(turned.parameters()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    turned_and_carried(turned, other)
    assert (layer_of(turned).s > 0).all()
    assert not torch.equal(layer_of(turned).s, layer.s)
    x, _ = batch(50)
    torch.testing.assert_close(turned(x), plain(x))
    for step in range(3):
        train(plain, optimizer, range(10 + step, 11 + step))
        train(turned, other, range(10 + step, 11 + step))
        torch.testing.assert_close(layer_of(turned).matrix(), layer.matrix())
        torch.testing.assert_close(turned(x), plain(x))


@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE.keys())
def test_dropping_null_columns_changes_no_other_step(make):
    """Columns of no energy contribute nothing to the others' gradients: without them, with the
    state carried, the others step as before. (They are held at zero here, else they would grow
    again by their own gradient in s.)"""
    U, s, V = orthonormal()
    s[1], s[4] = 0.0, 0.0
    model = model_of((U, s, V))
    optimizer = make(list(model.parameters()))
    layer = layer_of(model)
    layer.s.register_hook(lambda g: g * (layer.s.detach() != 0))  # hold the null columns at zero
    train(model, optimizer, range(3))
    with torch.no_grad():
        layer.s[[1, 4]] = 0.0
        for X in (layer.U, layer.V):
            X.copy_(torch.linalg.qr(X).Q)
    twin = copy.deepcopy(model)
    other = make(list(twin.parameters()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (cut,) = reduce_rank(twin, other, energy=1.0)
    assert cut.after == R - 2
    train(model, optimizer, range(10, 11))
    train(twin, other, range(10, 11))
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(layer_of(twin).U, layer.U[:, kept])
    torch.testing.assert_close(layer_of(twin).s, layer.s[kept])
    torch.testing.assert_close(layer_of(twin).V, layer.V[:, kept])


def test_momentum_is_carried_as_the_gradients_it_sums():
    """Not orthonormal: U's momentum becomes what it would be had every past gradient been taken in
    the new factors (at fixed factors, where all share one basis)."""
    model = model_of(skewed())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    train(model, optimizer, range(3))
    layer = layer_of(model)
    turned_and_carried(model, optimizer)
    fresh = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    train(model, fresh, range(3))
    for p in (layer.U, layer.V):
        torch.testing.assert_close(
            optimizer.state[p]["momentum_buffer"], fresh.state[p]["momentum_buffer"]
        )


def test_second_moment_is_bounded_and_right_on_average():
    """Over past gradients g_t, sum_t (g_t P)_k^2 <= r sum_i P_ik^2 sum_t g_ti^2 in every entry; for
    orthonormal P the sums over a row agree."""
    g = torch.Generator().manual_seed(3)
    gradients = torch.randn(50, M, R, generator=g, dtype=torch.float64)
    gradients = gradients + 2 * torch.randn(R, generator=g, dtype=torch.float64)  # correlated
    U, s, V = orthonormal()
    mixing = torch.linalg.qr(torch.randn(R, R, generator=g, dtype=torch.float64)).Q
    for P in (rediagonalize(*skewed()).P, mixing, rediagonalize(U, s, V).P):
        true = (gradients @ P).square().mean(0)
        estimate = gradients.square().mean(0) @ P.square()
        assert (true <= R * estimate * (1 + 1e-12)).all()
        if P is mixing:
            torch.testing.assert_close(true.sum(1), estimate.sum(1))
    torch.testing.assert_close(true, estimate)  # the last P is a signed permutation


@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE.keys())
@pytest.mark.parametrize("factors", [skewed, orthonormal])
def test_state_is_cut_with_the_factors_and_steps_go_on(make, factors):
    model = model_of(factors())
    optimizer = make(list(model.parameters()))
    parameters = list(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, range(3))
    scheduler.step()
    counts = [copy.copy(optimizer.state[p].get("step")) for p in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    reduce_rank(model, optimizer, rank=2)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert counts == [optimizer.state[p].get("step") for p in parameters]
    assert rates == [group["lr"] for group in optimizer.param_groups]
    for p in parameters:
        for value in optimizer.state[p].values():
            assert not isinstance(value, Tensor) or value.ndim == 0 or value.shape == p.shape
    before = layer_of(model).matrix().detach().clone()
    train(model, optimizer, range(3, 5))
    assert torch.isfinite(layer_of(model).matrix()).all()
    assert not torch.equal(layer_of(model).matrix(), before)


OTHERS = {
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_unknown_optimizer_is_reset_for_the_cut_layers_and_says_so_once(make, monkeypatch):
    monkeypatch.setattr(_cut, "_said", set())
    model = model_of(orthonormal())
    optimizer = make(list(model.parameters()))
    train(model, optimizer, range(3))
    head = {k: copy.deepcopy(v) for k, v in optimizer.state[model[2].weight].items()}
    with pytest.warns(UserWarning, match="cannot be carried") as said:
        reduce_rank(model, optimizer, rank=4)
    assert len(said) == 1
    layer = layer_of(model)
    for p in (layer.U, layer.s, layer.V):
        assert not optimizer.state.get(p)
    if not isinstance(optimizer, torch.optim.LBFGS):  # one history for all parameters
        for key, value in optimizer.state[model[2].weight].items():
            torch.testing.assert_close(value, head[key])
    train(model, optimizer, range(3, 5))
    reduce_rank(model, optimizer, rank=2)  # warnings are errors: not said again
    train(model, optimizer, range(5, 7))
    assert torch.isfinite(layer.matrix()).all()


def test_subclass_with_state_of_its_own_is_not_trusted(monkeypatch):
    class Lookahead(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p].setdefault("slow", p.detach().clone())

    monkeypatch.setattr(_cut, "_said", set())
    model = model_of(orthonormal())
    optimizer = Lookahead(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, range(1))
    with pytest.warns(UserWarning, match="Lookahead"):
        reduce_rank(model, optimizer, rank=2)
    assert layer_of(model).U not in optimizer.state


def test_several_optimizers():
    model = model_of(orthonormal())
    layer = layer_of(model)
    first = torch.optim.SGD([layer.U, layer.V], 0.1, momentum=0.9)
    second = torch.optim.Adam([layer.s], 0.1)
    for i in range(2):
        x, y = batch(i)
        F.cross_entropy(model(x), y).backward()
        first.step()
        second.step()
    reduce_rank(model, (first, second), rank=3)
    assert first.state[layer.U]["momentum_buffer"].shape == (M, 3)
    assert second.state[layer.s]["exp_avg"].shape == (3,)


def test_a_graph_alive_during_the_cut_does_no_harm():
    model = model_of(orthonormal())
    x, y = batch(0)
    alive = F.cross_entropy(model(x), y)
    reduce_rank(model, rank=2)
    F.cross_entropy(model(x), y).backward()
    assert layer_of(model).U.grad.shape == (M, 2)
    assert alive.grad_fn is not None


def test_single_precision_orthonormality_at_rounding_is_recognised():
    """What a retraction leaves counts as orthonormal: columns are dropped, not turned."""
    from svdalign.factors.stiefel import newton_schulz_retract

    g = torch.Generator().manual_seed(0)
    for m, n, r in itertools.product((64, 1024), (64, 512), (16, 64)):
        U, V = (
            newton_schulz_retract(
                torch.linalg.qr(torch.randn(k, r, generator=g)).Q
                + 1e-3 * torch.randn(k, r, generator=g) / k**0.5
            )
            for k in (m, n)
        )
        model = factorize(nn.Linear(n, m), {"": r})
        model.set_factors(U, torch.rand(r, generator=g) + 0.5, V)
        assert rediagonalized(model) is None


def test_spectrum_is_that_of_the_matrix():
    layer = layer_of(model_of(skewed()))
    torch.testing.assert_close(spectrum(layer), torch.linalg.svdvals(layer.matrix())[:R])


def test_ranks_of_a_state_dict_are_taken_over():
    model, other = model_of(orthonormal()), model_of(skewed())
    reduce_rank(model, rank=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(layer_of(other).matrix(), layer_of(model).matrix())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "either energy or rank or parameters"),
        ({"energy": 0.5, "parameters": 0.5}, ValueError, "either energy or rank or parameters"),
        ({"parameters": 1.5}, ValueError, "parameters must be a fraction"),
        ({"energy": 0.5, "rank": 3}, ValueError, "either energy or rank"),
        ({"energy": 0.0}, ValueError, r"energy must be a number in \(0, 1\], got 0.0"),
        ({"energy": "half"}, ValueError, "energy must be a number .*got 'half'"),
        ({"rank": 2, "ratio": "half"}, ValueError, "ratio must be a number .*got 'half'"),
        ({"energy": math.nan}, ValueError, "energy must be"),
        ({"rank": 0}, ValueError, "rank must be a fraction"),
        ({"rank": 1.5}, ValueError, "rank must be a fraction"),
        ({"rank": True}, TypeError, "rank must be a fraction"),
        ({"rank": {"nope": 3}}, ValueError, "rank names"),
        ({"energy": 0.5, "ratio": 2.0}, ValueError, "ratio must be"),
        ({"energy": 0.5, "min_rank": 0}, ValueError, "min_rank must be"),
        ({"energy": 0.5, "optimizer": 3}, TypeError, "optimizer must be .*got int"),
        ({"energy": 0.5, "optimizer": ["adam"]}, TypeError, "optimizer must be"),
    ],
)
def test_bad_arguments_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        reduce_rank(model_of(orthonormal()), **arguments)


def test_what_is_no_model_and_no_optimizer_is_refused():
    model = model_of(orthonormal())
    learner = Learner(model, "bp", optimizer=lambda p: torch.optim.SGD(p, 0.1), example=batch(0)[0])
    with pytest.raises(TypeError, match=r"optimizer must be .*learner\.optimizer.*got dict"):
        reduce_rank(model, [learner, {}], energy=0.5)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Learner"):
        reduce_rank(learner, learner.optimizer, energy=0.5)


def test_a_model_without_factors_is_refused():
    with pytest.raises(ValueError, match="no factored layer"):
        reduce_rank(nn.Linear(2, 2), energy=0.5)


@pytest.mark.parametrize("factor", ["U", "s", "V"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("how", [{"energy": 0.5}, {"rank": 2}, {"parameters": 40}])
def test_factors_that_are_not_finite_are_refused_and_nothing_is_cut(factor, value, how):
    one, other = model_of(orthonormal(0)), model_of(orthonormal(1))
    layer = layer_of(other)
    with torch.no_grad():
        getattr(layer, factor).view(-1)[0] = value
    with pytest.raises(ValueError, match=r"NaN or infinite .* layer '1\.0'"):
        reduce_rank(nn.Sequential(one, other), **how)
    assert layer_of(one).rank == layer.rank == R


def test_no_warning_for_what_is_carried():
    model = model_of(orthonormal())
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuts = reduce_rank(model, optimizer, rank=2)
    assert [cut.after for cut in cuts] == [2]


# --- a budget of parameters ---------------------------------------------------------------------


def two_layers() -> nn.Sequential:
    """Squares of ``s``: 16, 9, 4, 1 of 30 at 9 parameters a direction; 36, 4, 4, 4 of 48 at 21."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 16, bias=False))
    model = factorize(model, {"0": 4, "1": 4}).double()
    with torch.no_grad():
        model[0].s.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        model[1].s.copy_(torch.tensor([2.0, -6.0, 2.0, 2.0]))
    return model


def best_ranks(budget: int) -> tuple[int, int]:
    """By trying all: a direction is kept if it is worth more per parameter than one that is not."""
    worth = [
        [x / 30 / 9 for x in (16.0, 9.0, 4.0, 1.0)],
        [x / 48 / 21 for x in (36.0, 4.0, 4.0, 4.0)],
    ]
    found = (1, 1)
    for a in range(1, 5):
        for b in range(1, 5):
            dropped = [*worth[0][a:], *worth[1][b:]]
            least = min([*worth[0][1:a], *worth[1][1:b]], default=math.inf)
            if 9 * a + 21 * b <= budget and least >= max(dropped, default=0.0):
                found = max(found, (a, b), key=sum)
    return found


@pytest.mark.parametrize("budget", range(30, 125, 3))
def test_a_budget_keeps_what_is_worth_most_per_parameter(budget):
    model = two_layers()
    cuts = reduce_rank(model, parameters=budget)
    assert tuple(cut.after for cut in cuts) == best_ranks(budget)
    assert sum(p.numel() for p in model.parameters()) <= budget


def test_a_share_is_of_the_dense_parameters():
    model = two_layers()
    reduce_rank(model, parameters=0.75)  # of 16 + 64
    assert tuple(layer.rank for layer in model) == best_ranks(60)
    assert sum(p.numel() for p in model.parameters()) == 48  # the next would take 21


def test_a_budget_gives_way_to_limits():
    model = two_layers()
    reduce_rank(model, parameters=30, ratio=0.5, min_rank=3)
    assert tuple(layer.rank for layer in model) == (3, 3)


def test_a_budget_out_of_reach_is_refused_and_nothing_is_cut():
    model = two_layers()
    with pytest.raises(ValueError, match=r"parameters=0.3 asks for 24 .* take 30"):
        reduce_rank(model, parameters=0.3)
    assert tuple(layer.rank for layer in model) == (4, 4)


# --- a learner's optimizer ----------------------------------------------------------------------


def learner(make=lambda p: torch.optim.Adam(p, 0.01), seed: int = 0) -> sva.Learner:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
    model = factorize(net, {"0": 6, "2": 5})
    return sva.Learner(model, optimizer=make, example=torch.randn(4, 9))


def steps(one: sva.Learner) -> None:
    x, y = torch.randn(4, 9, generator=torch.Generator().manual_seed(5)), torch.tensor([0, 1, 2, 0])
    for _ in range(2):
        one.step(x, y)


def test_a_learner_stands_for_its_optimizer() -> None:
    ours, theirs = learner(), learner()
    for one, given in ((ours, ours), (theirs, theirs.optimizer)):
        steps(one)
        reduce_rank(one.model, given, rank=2)
        steps(one)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_learner_of_another_model_is_refused() -> None:
    one, other = learner(), learner()
    with pytest.raises(ValueError, match="optimizer must be a learner of model, got a learner of"):
        reduce_rank(one.model, other, rank=2)
    assert one.model[0].rank == 6


@pytest.mark.parametrize("name", ["adam", "momentum", "amsgrad", "rmsprop"])
def test_a_step_after_a_cut_without_the_optimizer_says_so(name: str) -> None:
    one = learner(ELEMENTWISE[name])
    steps(one)
    reduce_rank(one.model, energy=0.5)
    before = copy.deepcopy(one.model.state_dict())
    with pytest.raises(RuntimeError, match=r"ranks were cut and the optimizer's state was not.*"):
        steps(one)
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, before[key])
    one.optimizer.state.clear()
    steps(one)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.LBFGS])
@pytest.mark.parametrize("how", ["cut", "loaded"])
def test_without_a_learner_a_step_with_state_of_other_ranks_says_so(make, how: str) -> None:
    net = nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 3))
    model, smaller = factorize(net, {"0": 6}), factorize(net, {"0": 4})
    optimizer = make(model.parameters())
    x = torch.randn(4, 9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    if how == "cut":
        reduce_rank(model, rank=4)
    else:
        model.load_state_dict(smaller.state_dict())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"ranks were cut and the optimizer's state was not"):
        optimizer.step(closure)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    optimizer = make(model.parameters())
    optimizer.step(closure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the state of LBFGS was reset
        reduce_rank(model, optimizer, rank=2)
    optimizer.step(closure)


@pytest.mark.parametrize("make", [*OTHERS.values(), lambda p: torch.optim.SGD(p, 0.1)])
def test_optimizers_that_can_go_on_do(make, monkeypatch) -> None:
    if isinstance(make([nn.Parameter(torch.zeros(2, 2))]), torch.optim.LBFGS):
        pytest.skip("a learner gives it no closure")
    monkeypatch.setattr(_cut, "_said", set())
    one = learner(make)
    steps(one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that its state was reset
        reduce_rank(one.model, one, rank=2)
    steps(one)
    assert one.model[0].rank == 2


def test_factors_that_are_computed_are_not_cut() -> None:
    model = model_of(orthonormal())
    nn.utils.parametrizations.orthogonal(layer_of(model), "U")
    with pytest.raises(ValueError, match="computes U of layer '0'"):
        reduce_rank(model, rank=2)
    assert layer_of(model).rank == R


def test_a_cut_in_inference_mode_leaves_weights_that_can_be_trained() -> None:
    one = learner()
    with torch.inference_mode():
        reduce_rank(one.model, one, rank=2)
    steps(one)
