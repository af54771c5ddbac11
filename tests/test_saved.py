"""What is held in a tensor's place makes it again, exactly, where it still is that tensor."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from svdalign._saved import CHUNK, by_parts, hold, made_of, parts_of


def doubled(x: Tensor) -> Tensor:
    """Twice ``x``, and known to be so."""
    out = 2 * x
    made_of(out, lambda rows, x: 2 * x[rows], (x,), [slice(0, 2), slice(2, len(x))])
    return out


def test_a_tensor_nothing_is_known_of_is_held_itself() -> None:
    t = torch.randn(4, 3, 2, 2)
    held = hold(t)
    assert held.tensors == (t,)
    assert held.parts == [slice(0, 4)]
    assert held.of(slice(1, 3), held.tensors).data_ptr() == t[1:3].data_ptr()
    assert held.like(slice(1, 3), held.tensors).shape == (2, 3, 2, 2)


def test_it_is_made_of_others_again_when_it_is_gone() -> None:
    x = torch.randn(5, 3, 2, 2)
    out = doubled(x)
    wanted, held = out.clone(), hold(out.detach())
    del out
    gc.collect()
    assert len(held.tensors) == 1
    assert held.tensors[0].data_ptr() == x.data_ptr()
    parts = [held.of(rows, held.tensors) for rows in held.parts]
    torch.testing.assert_close(torch.cat(parts), wanted, rtol=0, atol=0)
    like = held.like(slice(1, 3), held.tensors)
    assert (like.shape, like.dtype) == ((2, 3, 2, 2), x.dtype)


def test_as_long_as_it_lives_it_is_not_made_again() -> None:
    out = doubled(torch.randn(5, 3, 2, 2))
    held = hold(out)
    assert held.of(slice(2, 5), held.tensors).data_ptr() == out[2:].data_ptr()


def test_a_tensor_changed_in_place_is_no_longer_what_it_was_made_of() -> None:
    x = torch.randn(5, 3, 2, 2)
    out = doubled(x)
    before, wanted = hold(out), out.clone()
    out.add_(1.0)
    assert hold(out).tensors == (out,)
    # What was held before the change goes on to mean the tensor as it was.
    torch.testing.assert_close(before.of(slice(0, 5), before.tensors), wanted)


def test_of_an_inference_tensor_nothing_is_noted() -> None:
    x = torch.randn(5, 3, 2, 2)
    with torch.inference_mode():
        out = doubled(x)
        assert hold(out).tensors == (out,)


@pytest.mark.parametrize("view", [lambda t: t[:2], lambda t: t.flatten(1), lambda t: t.mT])
def test_a_view_of_another_shape_is_another_tensor(view) -> None:
    out = view(doubled(torch.randn(5, 3, 2, 2)))
    assert hold(out).tensors == (out,)


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
