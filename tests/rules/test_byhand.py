"""Rules on a perceptron, dense and factored, against backward passes written in numpy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.oracles import byhand
from torch import nn

import svdalign as sva
from svdalign import rules
from svdalign.factors import SVDLinear
from svdalign.rules.fa import mirrored

SIZES = (7, 12, 9, 10, 4)


def perceptron(factored: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(SIZES):
        layers += [nn.Linear(into, out), nn.ReLU()]
    net = nn.Sequential(*layers[:-1]).double()
    return sva.factorize(net, {"0": 4, "2": 3, "6": 2}) if factored else net


def weights(model: nn.Sequential) -> list[byhand.Layer]:
    return [
        (
            (layer.merged_weight() if isinstance(layer, SVDLinear) else layer.weight)
            .detach()
            .numpy(),
            layer.bias.detach().numpy(),
        )
        for layer in model
        if not isinstance(layer, nn.ReLU)
    ]


def setup(rule, factored: bool) -> tuple[sva.Learner, nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    model = perceptron(factored)
    x, y = torch.randn(8, SIZES[0]).double(), torch.randint(0, SIZES[-1], (8,))
    learner = sva.Learner(
        model, rule, optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x
    )  # fmt: skip
    return learner, model, x, y


def check(model: nn.Sequential, found: dict, expected: list[byhand.Layer]) -> None:
    for i, (G, bias) in enumerate(expected):
        layer, path = model[2 * i], str(2 * i)
        if isinstance(layer, SVDLinear):
            factors = [X.detach().numpy() for X in (layer.U, layer.s, layer.V)]
            wanted = dict(zip(("U", "s", "V"), byhand.in_factors(G, *factors), strict=True))
        else:
            wanted = {"weight": G}
        for name, grad in {**wanted, "bias": bias}.items():
            np.testing.assert_allclose(found[f"{path}.{name}"].numpy(), grad, atol=1e-10)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("rule", ["dfa", "drtp"])
def test_direct_feedback(rule: str, factored: bool) -> None:
    learner, model, x, y = setup(rule, factored)
    B = [feedback.B.numpy() for feedback in learner.feedback.values()]
    assert [b.shape for b in B] == [(d, SIZES[-1]) for d in SIZES[1:-1]]
    expected = getattr(byhand, rule)(x.numpy(), y.numpy(), weights(model), B)
    check(model, learner.gradients(x, y), expected)


@pytest.mark.parametrize("factored", [False, True])
def test_feedback_alignment(factored: bool) -> None:
    learner, model, x, y = setup("fa", factored)
    back = []
    for _, mirror in mirrored(model, learner.transport):
        matrix = mirror.merged_weight() if isinstance(mirror, SVDLinear) else mirror.weight
        back.append(matrix.detach().numpy())
    forward = weights(model)
    for M, (W, _) in zip(back, forward, strict=True):
        assert M.shape == W.shape
        assert not np.allclose(M, W)
    expected = byhand.fa(x.numpy(), y.numpy(), forward, back)
    check(model, learner.gradients(x, y), expected)


@pytest.mark.parametrize("factored", [False, True])
def test_sign_symmetric_feedback_follows_the_weights(factored: bool) -> None:
    learner, model, x, y = setup("sign-symmetric", factored)
    for _ in range(2):
        forward = weights(model)
        back = [np.sign(W) * np.abs(W).mean() for W, _ in forward]
        expected = byhand.fa(x.numpy(), y.numpy(), forward, back)
        check(model, learner.gradients(x, y), expected)
        learner.step(x, y)


@pytest.mark.parametrize("factored", [False, True])
def test_random_magnitudes_carry_the_weights_signs_and_are_drawn_for_every_batch(
    factored: bool,
) -> None:
    learner, model, x, y = setup("brsf", factored)
    drawn = []
    for _ in range(2):
        forward = weights(model)
        gradients = learner.gradients(x, y)
        back = [
            mirror.weight.detach().numpy().copy()
            for _, mirror in mirrored(model, learner.transport)
        ]
        for M, (W, _) in zip(back, forward, strict=True):
            np.testing.assert_array_equal(np.sign(M), np.sign(W))
            share = np.abs(M) / (2 * np.abs(W).mean())
            assert share.max() <= 1
            # Uniform on [0, 1]: variance 1 / 12, so the mean lies within six of its deviations.
            assert abs(share.mean() - 0.5) < 6 / np.sqrt(12 * M.size)
        check(model, gradients, byhand.fa(x.numpy(), y.numpy(), forward, back))
        drawn.append(np.abs(back[0]) / np.abs(forward[0][0]).mean())
        learner.step(x, y)
    assert not np.allclose(drawn[0], drawn[1])


def test_feedback_alignment_keeps_its_weights_fixed() -> None:
    learner, _, x, y = setup("fa", True)
    before = {name: value.clone() for name, value in learner.transport.state_dict().items()}
    for _ in range(3):
        learner.step(x, y)
    assert all(torch.equal(value, before[n]) for n, value in learner.transport.state_dict().items())


@pytest.mark.parametrize("factored", [False, True])
def test_local_error_without_alignment(factored: bool) -> None:
    rule = replace(rules.get("ssa"), alpha=0.0)
    learner, model, x, y = setup(rule, factored)
    feedback = [
        [X.detach().numpy().copy() for X in (f.U, f.s, f.V)] for f in learner.feedback.values()
    ]
    B = [U @ np.diag(s) @ V.T for U, s, V in feedback]
    expected, learned = byhand.ssa_local(x.numpy(), y.numpy(), weights(model), B)
    check(model, learner.gradients(x, y), expected)
    learner.backward(x, y)
    for module, factors, G in zip(learner.feedback.values(), feedback, learned, strict=True):
        wanted = byhand.in_factors(G, *factors)
        for X, grad in zip((module.U, module.s, module.V), wanted, strict=True):
            np.testing.assert_allclose(X.grad.numpy(), grad, atol=1e-10)


def test_the_reconstruction_without_its_terms_is_output_error_through_fixed_feedback() -> None:
    rule = replace(rules.get("ssa-reconstruction"), alpha=0.0, beta=0.0)
    learner, model, x, y = setup(rule, True)
    B = [(f.U @ torch.diag(f.s) @ f.V.T).numpy() for f in learner.feedback.values()]
    assert not list(learner.feedback.parameters())
    check(
        model,
        learner.gradients(x, y),
        byhand.dfa(x.numpy(), y.numpy(), weights(model), B),
    )


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("alignment", ["against-error", "with-error", "target"])
def test_the_reconstructions_cosines(alignment: str, factored: bool) -> None:
    rule = rules.SSAReconstruction(alignment=alignment, alpha=0.7, beta=0.0)
    learner, model, x, y = setup(rule, factored)
    B = [(f.U @ torch.diag(f.s) @ f.V.T).numpy() for f in learner.feedback.values()]
    expected = byhand.ssa_reconstruction(x.numpy(), y.numpy(), weights(model), B, 0.7, alignment)
    check(model, learner.gradients(x, y), expected)


def test_dfa_steps_like_its_hand_written_loop() -> None:
    """Ten updates, not one gradient: SGD on a dense perceptron."""
    learner, model, x, y = setup("dfa", False)
    B = [feedback.B.numpy() for feedback in learner.feedback.values()]
    layers = [(W.copy(), b.copy()) for W, b in weights(model)]
    for _ in range(10):
        learner.step(x, y)
        grads = byhand.dfa(x.numpy(), y.numpy(), layers, B)
        layers = [
            (W - 0.1 * dW, b - 0.1 * db)
            for (W, b), (dW, db) in zip(layers, grads, strict=True)
        ]  # fmt: skip
    for (W, b), (W_, b_) in zip(weights(model), layers, strict=True):
        np.testing.assert_allclose(W, W_, atol=1e-10)
        np.testing.assert_allclose(b, b_, atol=1e-10)
