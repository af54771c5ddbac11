"""What the targets are is found from the output, the targets and what the loss takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svdalign as sva
from svdalign.task import Output, find_task

B, C = 12, 5


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05)


def net(width: int, *tail: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, width), *tail
    )


def learner_of(model: nn.Module, x: Tensor, loss=None, rule="ssa", **options) -> sva.Learner:
    return sva.Learner(model, rule, optimizer=sgd, example=x, loss=loss, **options)


def tokens(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def shifted(z: Tensor, y: Tensor) -> Tensor:
    return tokens(z[:, :-1], y[:, 1:])


def focal(z: Tensor, y: Tensor) -> Tensor:
    p = z.log_softmax(1).gather(1, y[:, None])
    return -((1 - p.exp()) ** 2 * p).mean()


def yes_or_no(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z.reshape(-1), y.reshape(-1).float())


def ordinal(z: Tensor, y: Tensor) -> Tensor:
    levels = (y[:, None] > torch.arange(z.shape[1])).float()
    return F.binary_cross_entropy_with_logits(z, levels)


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    d, same = torch.cdist(z, z), y[:, None] == y[None]
    return (d * same).mean() + F.relu(1 - d + same * 10).mean()


def few_columns(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[:, : C - 1], y)


def poisson(z: Tensor, y: Tensor) -> Tensor:
    return F.poisson_nll_loss(z.reshape(-1), y.reshape(-1).float())


hard = torch.arange(B) % C
one_hot = F.one_hot(hard, C)
mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
binary = torch.arange(B) % 2

FOUND = {
    "class indices": (F.cross_entropy, (B, C), hard, "classes"),
    "two classes": (F.cross_entropy, (B, 2), binary, "classes"),
    "as a module": (nn.CrossEntropyLoss(), (B, C), hard, "classes"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), (B, C), hard, "classes"),
    "weighted": (nn.CrossEntropyLoss(weight=torch.rand(C).double()), (B, C), hard, "classes"),
    "as a partial": (partial(F.cross_entropy, label_smoothing=0.1), (B, C), hard, "classes"),
    "negative log-likelihood": (
        lambda z, y: F.nll_loss(z.log_softmax(1), y), (B, C), hard, "classes",
    ),
    "margins": (nn.MultiMarginLoss(), (B, C), hard, "classes"),
    "focal": (focal, (B, C), hard, "classes"),
    "probabilities": (nn.CrossEntropyLoss(), (B, C), mixed, "classes"),
    "probabilities of pixels": (
        F.cross_entropy, (2, C, 3, 4), torch.rand(2, C, 3, 4).softmax(1), "classes",
    ),
    "pixels": (
        nn.CrossEntropyLoss(), (2, C, 3, 4), hard.reshape(1, 3, 4).expand(2, 3, 4), "classes",
    ),
    "tokens": (tokens, (3, 4, C), hard.reshape(3, 4), "classes"),
    "one logit": (yes_or_no, (B, 1), binary, "binary"),
    "one logit, column": (yes_or_no, (B, 1), binary[:, None].float(), "binary"),
    "one logit, flat": (yes_or_no, (B,), binary.bool(), "binary"),
    "masks": (
        F.binary_cross_entropy_with_logits, (1, 1, 3, 4),
        binary.reshape(1, 1, 3, 4).float(), "binary",
    ),
    "several labels": (F.binary_cross_entropy_with_logits, (B, C), (mixed > 0).float(), "labels"),
    "several labels, whole": (
        lambda z, y: z.sub(y).square().mean(), (B, C), (mixed > 0).long(), "labels",
    ),
    "numbers": (F.mse_loss, (B, C), torch.randn(B, C), "numbers"),
    "one number": (F.mse_loss, (B, 1), torch.randn(B, 1), "numbers"),
    "a number of 0 or 1": (F.mse_loss, (B, 1), binary[:, None].float(), "numbers"),
    "a probability": (
        lambda z, y: F.binary_cross_entropy(z, y), (B, 1), binary[:, None].float(), "numbers",
    ),
    "counts": (poisson, (B, 1), hard, "other"),
    "small counts": (poisson, (B, 1), binary, "other"),
    "levels": (ordinal, (B, C), hard, "other"),
    "ids": (contrastive, (B, 32), hard, "other"),
    "classes of a part of the output": (few_columns, (B, C), hard.clamp_max(C - 2), "other"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_a_task_is_found(case: str) -> None:
    loss, shape, y, kind = FOUND[case]
    assert find_task(loss, Output(shape), y, None).kind == kind


def test_the_loss_is_asked_without_a_trace() -> None:
    """Statistics of the loss, random state and gradients stay as they were."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.weight = nn.Parameter(torch.randn(C, C))

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return F.cross_entropy(F.dropout(z @ self.weight, 0.5), y)

    loss, state = Centred(), torch.get_rng_state()
    assert find_task(loss, Output((B, C)), hard, None).kind == "classes"
    assert loss.calls == 0
    assert loss.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


# --- the task decides, not which function the loss is --------------------------------------------


def gradients(loss, y: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(B, 8)
    return learner_of(net(C), x, loss).gradients(x, y)


@pytest.mark.parametrize("y", [hard, mixed], ids=["indices", "probabilities"])
@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(), lambda z, y: F.cross_entropy(z, y), partial(F.cross_entropy)],
    ids=["module", "function", "partial"],
)
def test_one_function_in_other_clothes_gives_the_same_gradients(loss, y: Tensor) -> None:
    expected = gradients(None, y)
    found = gradients(loss, y)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_a_task_can_be_given() -> None:
    """Ids are no classes, whatever their values: without alignment the gradients are those of
    alpha 0."""
    x = torch.randn(B, 8)
    given = learner_of(net(C), x, nn.CrossEntropyLoss(), task="other")
    plain = learner_of(net(C), x, nn.CrossEntropyLoss(), rule=sva.rules.SSA(alpha=0.0))
    expected = plain.gradients(x, hard)
    for name, gradient in given.gradients(x, hard).items():
        assert torch.equal(gradient, expected[name])
    assert given.backward(x, hard).accuracy is None
    with pytest.raises(ValueError, match=r"task must be one of .*'classes'.* got 'images'"):
        learner_of(net(C), x, task="images")


def test_print_says_what_the_task_is() -> None:
    x = torch.randn(B, 8)
    learner = learner_of(net(C), x, nn.CrossEntropyLoss())
    assert "found from the first batch" in repr(learner)
    learner.step(x, hard)
    assert f"one of {C} classes for each sample" in repr(learner)


def test_a_checkpoint_remembers_the_task(tmp_path) -> None:
    x = torch.randn(B, 8)
    learner = learner_of(net(C), x, F.mse_loss)
    learner.step(x, torch.randn(B, C))
    sva.save(learner, tmp_path / "run")
    again = learner_of(net(C), x, F.mse_loss)
    sva.load(tmp_path / "run", into=again)
    again.step(x, mixed)  # rows of probabilities, but by now known to be numbers
    assert again.task.kind == "numbers"


# --- accuracy -------------------------------------------------------------------------------------


def accuracy(loss, z: Tensor, y: Tensor) -> Tensor | None:
    return find_task(loss, Output(tuple(z.shape)), y, None).accuracy(z, y)


def test_accuracy_of_classes_pixels_and_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    for loss, shape, axis in (
        (nn.CrossEntropyLoss(), (B, C), 1),
        (nn.CrossEntropyLoss(), (2, C, 3, 4), 1),
        (tokens, (3, 4, C), 2),
    ):
        z = torch.randn(shape, generator=generator)
        y = z.argmax(axis)
        y.view(-1)[:5] = (y.view(-1)[:5] + 1) % C
        assert accuracy(loss, z, y).item() == pytest.approx(1 - 5 / y.numel())


@pytest.mark.parametrize(
    ("loss", "ignored"),
    [
        (None, -100),
        (nn.CrossEntropyLoss(), -100),
        (nn.CrossEntropyLoss(ignore_index=255), 255),
        (nn.CrossEntropyLoss(ignore_index=-1), -1),
        (nn.CrossEntropyLoss(ignore_index=2), 2),
        (partial(F.cross_entropy, ignore_index=2), 2),
        (lambda z, y: F.cross_entropy(z, y, ignore_index=2), 2),
    ],
)
def test_targets_to_be_ignored_do_not_count(loss, ignored: int) -> None:
    """Nor do they align, as that would pull at samples without a class."""
    x = torch.randn(B, 8)
    learner = learner_of(net(C), x, loss)
    with torch.no_grad():
        y = learner.model(x).argmax(1)
    y[y == ignored] = (ignored + 1) % C
    right = (learner.model(x).argmax(1) == y)[B // 2 :].float().mean()
    y[: B // 2] = ignored
    torch.testing.assert_close(learner.backward(x, y).accuracy, right)


def test_an_index_that_is_ignored_far_into_a_vocabulary_does_not_count() -> None:
    width = 1000
    z = F.one_hot(torch.arange(0, 2 * B, 2), width).float()
    y = z.argmax(1)
    y[:4], y[4] = 777, 3
    loss = nn.CrossEntropyLoss(ignore_index=777)
    assert accuracy(loss, z, y).item() == pytest.approx((B - 5) / (B - 4))


def test_accuracy_of_one_logit_is_that_of_its_sign() -> None:
    z = torch.tensor([[2.0], [-1.0], [0.5], [-3.0]])
    for y in (torch.tensor([1, 0, 0, 0]), torch.tensor([[1.0], [0.0], [0.0], [0.0]])):
        assert accuracy(yes_or_no, z, y).item() == 0.75


@pytest.mark.parametrize(
    ("loss", "z", "y"),
    [
        (nn.CrossEntropyLoss(), torch.randn(B, C), mixed),
        (shifted, torch.randn(3, 4, C), hard.reshape(3, 4)),
        (F.binary_cross_entropy_with_logits, torch.randn(B, C), (mixed > 0).float()),
        (F.mse_loss, torch.randn(B, C), torch.randn(B, C)),
        (ordinal, torch.randn(B, C), hard),
        (contrastive, torch.randn(B, 32), hard),
        (poisson, torch.randn(B, 1), binary),
        (lambda z, y: F.binary_cross_entropy(z, y), torch.rand(B, 1), binary[:, None].float()),
    ],
)
def test_accuracy_is_none_where_there_is_no_right_and_wrong(loss, z: Tensor, y: Tensor) -> None:
    assert accuracy(loss, z, y) is None


# --- targets are checked --------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[Tensor, Tensor], Tensor] | None, Tensor, str]] = {
    "too large": (nn.CrossEntropyLoss(), hard + 1, r"class indices in \[0, 4\], got .*\[1, 5\]"),
    "negative": (nn.CrossEntropyLoss(), hard - 1, r"class indices in \[0, 4\], got .*\[-1, 3\]"),
    "too large, by default": (None, hard + 1, r"class indices in \[0, 4\]"),
    "too large, smoothed": (
        partial(F.cross_entropy, label_smoothing=0.1), hard + 1, r"class indices in \[0, 4\]",
    ),
    "one-hot, whole": (nn.CrossEntropyLoss(), one_hot, r"one-hot torch\.int64.*y\.float\(\)"),
    "one-hot, by default": (None, one_hot, r"one-hot torch\.int64.*y\.argmax\(1\)"),
    "a column": (None, hard[:, None], r"y must hold class indices .*shape \(12, 1\)"),
    "too few": (nn.CrossEntropyLoss(), hard[:-1], r"each of the 12 samples"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_targets_are_refused_in_any_batch(case: str) -> None:
    loss, y, message = BAD[case]
    x = torch.randn(B, 8)
    learner = learner_of(net(C), x, loss)
    with pytest.raises(ValueError, match=message):
        learner.step(x, y)
    learner.step(x, hard)
    with pytest.raises(ValueError, match=message):
        learner.step(x, y)


def test_what_the_loss_does_not_take_is_said_in_its_words_and_ours() -> None:
    x = torch.randn(B, 8)
    learner = learner_of(net(C), x, nn.CrossEntropyLoss())
    with pytest.raises(
        ValueError, match=r"loss cannot take .*\(12, 5\).*y of shape \(12,\), .*float"
    ):
        learner.step(x, hard.float())


def test_yes_or_no_stays_yes_or_no() -> None:
    x = torch.randn(B, 8)
    learner = learner_of(net(1), x, yes_or_no)
    learner.step(x, binary)
    with pytest.raises(ValueError, match=r"y must be 0 or 1.*got values in \[0, 4\]"):
        learner.step(x, hard)


def test_tokens_whose_number_is_that_of_the_classes_are_not_confused() -> None:
    """cross_entropy would take the tokens (axis 1) for the classes without a word."""
    model = nn.Sequential(nn.Embedding(C, 8), net(C))
    ids = hard[: 2 * C].reshape(2, C)
    with pytest.raises(ValueError, match=r"classes come last.*z\.flatten\(0, 1\)"):
        learner_of(model, ids, units="layer")
