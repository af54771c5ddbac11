"""The reconstruction's terms on weights and maps, and what it refuses; its cosines on a perceptron
are in test_byhand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.oracles import losses as oracle
from torch import Tensor, nn

import svdalign as sva
from svdalign.rules import SSAReconstruction

PLAIN = SSAReconstruction(alpha=0.0, beta=0.0)


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 9, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(9 * 36, 3)
    )  # fmt: skip


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))


def learner_of(rule: SSAReconstruction, model: nn.Module, x: Tensor) -> sva.Learner:
    return sva.Learner(
        model,
        rule,
        units="layer",
        optimizer=lambda p: torch.optim.SGD(p, 0.05),
        example=x,
        retraction=None,
    )


def added(
    rule: SSAReconstruction, net: nn.Sequential, ranks: dict[str, int], scheme: str = "spatial"
) -> tuple[dict[str, Tensor], sva.Learner, Tensor, Tensor]:
    """Gradients that ``rule`` adds to those of its task loss, off orthonormality; the learner and
    the batch."""
    torch.manual_seed(0)
    model = sva.factorize(net.double(), ranks, scheme)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    x = torch.randn((4, 2, 6, 6) if isinstance(net[0], nn.Conv2d) else (4, 6)).double()
    y = torch.arange(4) % 3
    learner = learner_of(rule, model, x)
    plain = learner_of(replace(PLAIN, grid=rule.grid), model, x)
    with_term, without = learner.gradients(x, y), plain.gradients(x, y)
    return {n: with_term[n] - without[n] for n in without}, learner, x, y


def slope(loss: Callable[[], float], values: np.ndarray, at: tuple[int, ...]) -> float:
    """Derivative of ``loss`` in ``values[at]``, which it reads, by central differences."""
    step = 1e-6
    values[at] += step
    up = loss()
    values[at] -= 2 * step
    down = loss()
    values[at] += step
    return (up - down) / (2 * step)


def test_subspace_turns_the_layers_output_space_to_the_feedbacks() -> None:
    rule = replace(PLAIN, alpha=0.7, alignment="subspace")
    grads, learner, _, _ = added(rule, perceptron(), {"0": 4, "2": 2})
    for path, feedback in zip(("0", "2"), learner.feedback.values(), strict=True):
        U = learner.model.get_submodule(path).U.detach().numpy().copy()
        for at in ((0, 0), (3, 1), (7, 1)):
            expected = 0.7 * slope(lambda U=U, f=feedback: oracle.share(U, f.U.numpy()), U, at)
            assert float(grads[f"{path}.U"][at]) == pytest.approx(expected, abs=1e-7)
        assert grads[f"{path}.V"].abs().max() < 1e-12
        assert grads[f"{path}.s"].abs().max() < 1e-12


def test_subspace_of_a_spatial_convolution_is_that_of_its_channels() -> None:
    """U is (N W, r): its columns reach at most r W directions of the N channels."""
    rule = replace(PLAIN, alpha=0.7, alignment="subspace")
    grads, learner, _, _ = added(rule, convolutional(), {"0": 2})
    U = learner.model[0].U.detach().numpy().copy()

    def share() -> float:
        reached = np.concatenate([U[w::3] for w in range(3)], axis=1)  # rows are (channel, w)
        return oracle.share(reached, learner.feedback["0"].U.numpy())

    for at in ((0, 0), (4, 1), (26, 1)):
        assert float(grads["0.U"][at]) == pytest.approx(0.7 * slope(share, U, at), abs=1e-7)
    assert grads["0.U"].abs().max() > 1e-3


def test_subspace_says_nothing_once_all_channels_are_reached() -> None:
    rule = replace(PLAIN, alpha=0.7, alignment="subspace")
    grads, _, _, _ = added(rule, convolutional(), {"0": 3})  # r W = 9 = N
    assert all(grad.abs().max() < 1e-12 for grad in grads.values())


@pytest.mark.parametrize("alignment", ["against-error", "with-error", "target"])
@pytest.mark.parametrize("grid", [1, 2])
def test_cosines_of_a_map_read_it_pooled(alignment: str, grid: int) -> None:
    rule = replace(PLAIN, alpha=0.7, alignment=alignment, grid=grid)
    grads, learner, x, y = added(rule, convolutional(), {"0": 4})
    model, B = learner.model, learner.feedback["0"]
    bias = model[0].bias.detach().numpy().copy()
    z = torch.nn.functional.conv2d(x, model[0].merged_weight(), padding=1).detach().numpy()
    wanted = torch.eye(3).double()[y]
    if alignment != "target":
        e = (model(x).softmax(1) - wanted).detach()
        wanted = e if alignment == "with-error" else -e
    direction = (wanted @ (B.U * B.s @ B.V.T).T).numpy()

    def loss() -> float:
        h = np.maximum(z + bias[:, None, None], 0.0)
        cells = h.reshape(4, 9, grid, 6 // grid, grid, 6 // grid).mean((3, 5))
        return oracle.cosine_alignment(cells.reshape(4, -1), direction)

    for i in (0, 5):
        assert float(grads["0.bias"][i]) == pytest.approx(0.7 * slope(loss, bias, (i,)), abs=1e-7)


def test_the_penalty_is_on_every_factor() -> None:
    """d/dX ||X^T X - I||_F^2 = 4 X (X^T X - I)."""
    grads, learner, _, _ = added(replace(PLAIN, beta=0.3), convolutional(), {"0": 3})
    for name in ("U", "V"):
        X = getattr(learner.model[0], name).detach()
        expected = 0.3 * 4 * X @ (X.T @ X - torch.eye(3).double())
        torch.testing.assert_close(grads[f"0.{name}"], expected, rtol=0, atol=1e-10)


def test_without_its_task_a_hidden_unit_learns_from_the_other_terms_alone() -> None:
    rule = replace(PLAIN, alpha=0.7, beta=0.2, alignment="target")
    torch.manual_seed(0)
    model, x = sva.factorize(perceptron().double(), {"0": 4, "2": 3}), torch.randn(4, 6).double()
    y = torch.arange(4) % 3
    whole, task, terms = (
        learner_of(r, model, x).gradients(x, y) for r in (rule, PLAIN, replace(rule, task=0.0))
    )
    for name in whole:
        rest = whole[name] - task[name]
        if name.startswith("4."):  # the task teaches the output's layer itself
            rest = whole[name]
        torch.testing.assert_close(terms[name], rest, rtol=0, atol=1e-12)


def test_the_penalty_alone_keeps_factors_nearly_orthonormal() -> None:
    """Over the same steps without a retraction, the drift is smaller the larger beta."""
    drifts = []
    for beta in (0.0, 0.03, 0.3):
        torch.manual_seed(0)
        x, y = torch.randn(32, 6), torch.arange(32) % 3
        learner = learner_of(replace(PLAIN, beta=beta), sva.factorize(perceptron(), {"0": 4}), x)
        for _ in range(200):
            learner.step(x, y)
        U = learner.model[0].U.detach()
        drifts.append(float(torch.linalg.matrix_norm(U.T @ U - torch.eye(4))))
    assert drifts[0] > 2 * drifts[1] > 4 * drifts[2]


def test_without_rows_of_errors_the_cosine_is_left_out() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1)).double()
    model, x = sva.factorize(net, {"0": 2}), torch.randn(2, 2, 5, 5).double()
    y = torch.randint(0, 3, (2, 5, 5))
    with_term = learner_of(replace(PLAIN, alpha=1.0), model, x).gradients(x, y)
    without = learner_of(PLAIN, model, x).gradients(x, y)
    assert all(torch.equal(with_term[n], without[n]) for n in without)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alignment", "cosine"), ("task", -1.0), ("alpha", -1.0), ("alpha", float("nan")),
        ("beta", -0.1), ("grid", 0), ("grid", 1.5), ("grid", True), ("error", "elsewhere"),
    ],
)  # fmt: skip
def test_fields_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be .*got"):
        SSAReconstruction(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("error", ["local", "target"])
def test_it_learns_from_the_outputs_error_alone(error: str) -> None:
    with pytest.raises(ValueError, match=r"error must be 'output' for rule"):
        SSAReconstruction(error=error)  # type: ignore[arg-type]
