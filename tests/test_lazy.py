"""A lazy tensor is the tensor that its recipe describes, for whoever reads it in whatever way."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from svdalign._lazy import LazyTensor, Recipe, by_parts_or_lazy, read, reads_by_parts, recipe_of
from svdalign._parts import CHUNK, by_parts, parts_of
from svdalign.lab.costs import LiveTensors

PARTS = [slice(0, 2), slice(2, 5)]


def doubled(x: Tensor) -> LazyTensor:
    """Twice ``x``, (5, 3, 2, 2)."""
    return LazyTensor(
        Recipe(
            (x,), tuple(x.shape), x.dtype, x.device, torch.contiguous_format, PARTS,
            samples=lambda rows, x: 2 * x[rows],
        )
    )  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 2, 2)


def test_a_plain_tensor_is_its_own_recipe(x: Tensor) -> None:
    recipe = recipe_of(x)
    assert recipe.tensors == (x,)
    assert recipe.parts == [slice(0, 5)]
    assert read(x, slice(1, 3)).data_ptr() == x[1:3].data_ptr()
    assert recipe.empty(slice(1, 3)).shape == (2, 3, 2, 2)


def test_some_samples_are_computed_and_nothing_else(x: Tensor) -> None:
    lazy = doubled(x)
    with LiveTensors([x]) as live:
        torch.testing.assert_close(read(lazy, slice(2, 5)), 2 * x[2:5], rtol=0, atol=0)
    assert live.peak < 3 * x.nbytes
    assert lazy.whole is None
    assert lazy.untyped_storage().nbytes() == 0


def test_two_readers_of_a_part_share_it_while_one_of_them_uses_it(x: Tensor) -> None:
    lazy = doubled(x)
    part = read(lazy, PARTS[0])
    assert read(lazy.detach(), PARTS[0]) is part
    assert read(lazy, PARTS[1]) is not part
    del part
    gc.collect()
    assert all(ref() is None for ref in lazy.recipe.latest.values())


READERS = [
    torch.relu,
    torch.clone,
    lambda t: t + 1,
    lambda t: t.flatten(1) @ torch.ones(12, 3),
    lambda t: t[1:4],
    lambda t: t.mean((2, 3)),
    lambda t: torch.cat([t, t]),
    lambda t: t.view(5, 12),
    lambda t: t.to(torch.float64),
    lambda t: t.contiguous(memory_format=torch.channels_last),
    lambda t: torch.nn.functional.max_pool2d(t, 2),
]


@pytest.mark.parametrize("reader", READERS)
def test_any_operation_gets_the_whole_tensor(reader, x: Tensor) -> None:
    torch.testing.assert_close(reader(doubled(x)), reader(2 * x), rtol=0, atol=0)


def test_shape_layout_and_kind_are_the_tensors(x: Tensor) -> None:
    for format in (torch.contiguous_format, torch.channels_last):
        like = (2 * x).contiguous(memory_format=format)
        recipe = recipe_of(like)
        lazy = LazyTensor(Recipe(
            (x,), recipe.shape, recipe.dtype, recipe.device, recipe.format, PARTS,
            samples=lambda rows, x, like=like: like[rows],
        ))  # fmt: skip
        assert (lazy.shape, lazy.stride(), lazy.dtype) == (like.shape, like.stride(), like.dtype)
        assert lazy.is_contiguous(memory_format=format)
        assert "shape=(5, 3, 2, 2)" in repr(lazy)


def test_a_change_in_place_is_seen_by_later_readers_and_not_by_earlier_ones(x: Tensor) -> None:
    lazy = doubled(x)
    before = recipe_of(lazy)
    lazy.add_(1.0)
    torch.testing.assert_close(read(lazy, PARTS[0]), 2 * x[:2] + 1)
    torch.testing.assert_close(lazy.clone(), 2 * x + 1)
    torch.testing.assert_close(before.read(PARTS[0], before.tensors), 2 * x[:2])


@pytest.mark.parametrize("parts", [PARTS, [slice(0, 5)]])
def test_the_whole_is_nobody_elses(parts: list[slice], x: Tensor) -> None:
    lazy = LazyTensor(recipe_of(x))
    lazy = LazyTensor(Recipe(
        (x,), (5, 3, 2, 2), x.dtype, x.device, torch.contiguous_format, parts,
        samples=lambda rows, x: x[rows],
    ))  # fmt: skip
    wanted = x.clone()
    lazy.add_(1.0)
    torch.testing.assert_close(x, wanted, rtol=0, atol=0)


def test_sums_stay_lazy_and_add_to_what_has_memory(x: Tensor) -> None:
    total = doubled(x) + x
    assert isinstance(total, LazyTensor)
    assert isinstance(doubled(x) + total, LazyTensor)
    torch.testing.assert_close((doubled(x) + total).clone(), 5 * x)
    into = x.clone()
    into += doubled(x)
    assert not isinstance(into, LazyTensor)
    torch.testing.assert_close(into, 3 * x)
    # Of another shape or kind it is not a sum of maps.
    torch.testing.assert_close(doubled(x) + torch.ones(1), 2 * x + 1)
    torch.testing.assert_close(torch.add(doubled(x), x, alpha=3), 5 * x)


@reads_by_parts
class Through(torch.autograd.Function):
    """Passes gradients on, and notes whether they came lazily."""

    @staticmethod
    def forward(ctx, x: Tensor, seen: list[bool]) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.seen.append(isinstance(grad, LazyTensor))
        return by_parts(lambda rows: read(grad, rows), PARTS), None


class Thrice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.like = replace(recipe_of(x).without_tensors(), parts=PARTS)
        return 3 * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return by_parts_or_lazy(lambda rows: 3 * grad[rows], ctx.like, ctx.next_functions[0][0])


def test_gradients_are_lazy_for_those_alone_who_read_by_parts(x: Tensor) -> None:
    weights = torch.randn(5, 3, 2, 2)
    seen: list[bool] = []
    x.requires_grad_()
    (Thrice.apply(Through.apply(x, seen)) * weights).sum().backward()
    assert seen == [True]
    torch.testing.assert_close(x.grad, 3 * weights)
    assert type(x.grad) is Tensor
    # A leaf, and most of torch's own functions, get a tensor with memory.
    (leaf,) = torch.autograd.grad((Thrice.apply(x) * weights).sum(), x)
    assert type(leaf) is Tensor
    (squared,) = torch.autograd.grad((Thrice.apply(x.square()) * weights).sum(), x)
    torch.testing.assert_close(squared, 6 * weights * x.detach())


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.ReLU6(), nn.Hardswish(), nn.GELU(),
    nn.GELU("tanh"), nn.SiLU(),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_gradients_stay_lazy_through_activation_functions(activation: nn.Module, x: Tensor) -> None:
    weights = torch.randn(5, 3, 2, 2)
    seen: list[bool] = []
    x = (4 * x).requires_grad_()
    (Thrice.apply(activation(Through.apply(x, seen))) * weights).sum().backward()
    (expected,) = torch.autograd.grad((3 * activation(1 * x) * weights).sum(), x)
    torch.testing.assert_close(x.grad, expected)
    assert seen == [True]
    # Whoever reads it next gets a tensor with memory.
    (squared,) = torch.autograd.grad((Thrice.apply(activation(x.square())) * weights).sum(), x)
    (expected,) = torch.autograd.grad((3 * activation(x.square()) * weights).sum(), x)
    torch.testing.assert_close(squared, expected)
    assert type(squared) is Tensor


def test_gradients_of_several_readers_add(x: Tensor) -> None:
    weights = torch.randn(5, 3, 2, 2)
    seen: list[bool] = []
    x.requires_grad_()
    y = Through.apply(x, seen)
    ((Thrice.apply(y) + y + Thrice.apply(y)) * weights).sum().backward()
    torch.testing.assert_close(x.grad, 7 * weights)


def test_lazy_tensors_take_part_in_autograd(x: Tensor) -> None:
    lazy = doubled(x).requires_grad_()
    (lazy * lazy).sum().backward()
    torch.testing.assert_close(lazy.grad.clone(), 4 * x)


@pytest.mark.parametrize("batch", [0, 1, 7, 100])
@pytest.mark.parametrize("chunk", [1, 50, 10**9])
def test_parts_are_all_samples_once(batch: int, chunk: int, monkeypatch) -> None:
    monkeypatch.setitem(CHUNK, "cpu", chunk)
    t = torch.randn(batch, 3, 2, 2).to(memory_format=torch.channels_last)
    parts = parts_of(t)
    assert len(parts) <= 32 + 1
    together = by_parts(lambda rows: t[rows] + 1, parts)
    torch.testing.assert_close(together, t + 1, rtol=0, atol=0)
    if batch:
        assert together.is_contiguous(memory_format=torch.channels_last)
