from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.oracles import augment as oracle
from torch import Tensor

from svdalign.lab.data import Augment, _augment

shapes = st.tuples(*(st.integers(1, n) for n in (4, 3, 7, 7)))
seeds = st.integers(0, 2**31)


def pixels(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(1, 256, shape, generator=generator).to(torch.uint8)


@given(shape=shapes, padding=st.integers(0, 5), seed=seeds)
def test_crop_is_its_definition(shape: tuple[int, ...], padding: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    images = pixels(shape, g)
    top, left = torch.randint(2 * padding + 1, (2, shape[0]), generator=g)
    actual = _augment.crop(images, padding, top, left)
    assert actual.equal(oracle.crop(images, padding, top, left))


@given(shape=shapes, seed=seeds)
def test_flip_is_its_definition(shape: tuple[int, ...], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    images = pixels(shape, g)
    mask = torch.randint(2, (shape[0],), generator=g).bool()
    actual = _augment.flip(images, mask)
    assert actual.equal(oracle.flip(images, mask))
    assert _augment.flip(actual, mask).equal(images)


@given(shape=shapes, side=st.integers(1, 9), seed=seeds)
def test_cutout_is_its_definition(shape: tuple[int, ...], side: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    images = pixels(shape, g)
    row = torch.randint(shape[2], (shape[0],), generator=g)
    column = torch.randint(shape[3], (shape[0],), generator=g)
    actual = _augment.cutout(images, side, row, column)
    assert actual.equal(oracle.cutout(images, side, row, column))


@given(
    shape=shapes, crop=st.integers(0, 3), flip=st.booleans(), cutout=st.integers(0, 4), seed=seeds
)
def test_augment_keeps_form_and_input(
    shape: tuple[int, ...], crop: int, flip: bool, cutout: int, seed: int
) -> None:
    images = pixels(shape, torch.Generator().manual_seed(seed))
    before = images.clone()
    augment = Augment(crop=crop, flip=flip, cutout=cutout)
    out = augment(images, torch.Generator().manual_seed(seed))
    assert images.equal(before)
    assert (out.shape, out.dtype) == (images.shape, images.dtype)
    assert out.equal(augment(images, torch.Generator().manual_seed(seed)))
    if not (crop or flip or cutout):
        assert out.equal(images)


def test_every_offset_flip_and_centre_occurs() -> None:
    """On an image with one bright pixel in the middle, crop and flip move it to every place."""
    images = torch.zeros(4000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2] = 255
    moved = Augment(crop=2)(images, torch.Generator().manual_seed(0))
    share = (moved > 0).float().mean(0)
    assert share.min() > 0.02  # 1/25 each
    assert share.sum().item() == pytest.approx(1)

    images = torch.zeros(4000, 1, 1, 2, dtype=torch.uint8)
    images[..., 0] = 255
    flipped = Augment(flip=True)(images, torch.Generator().manual_seed(0))
    assert (flipped[..., 1] > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)

    images = torch.ones(4000, 1, 4, 4, dtype=torch.uint8)
    holes = Augment(cutout=1)(images, torch.Generator().manual_seed(0)) == 0
    assert holes.sum((1, 2, 3)).eq(1).all()
    assert holes.float().mean(0).min() > 0.04  # 1/16 each


@pytest.mark.parametrize("name", ["crop", "cutout"])
def test_negative_sizes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -1"):
        Augment(**{name: -1})


def test_translate_mirrors_the_border() -> None:
    """A shift of one pixel repeats the line next to the border, and never the border itself."""
    line = torch.tensor([10, 20, 30, 40], dtype=torch.uint8)
    images = line.expand(200, 1, 4, 4)
    moved = Augment(translate=1)(images, torch.Generator().manual_seed(0))
    rows = {tuple(row) for row in moved.reshape(-1, 4).tolist()}
    assert rows == {(20, 10, 20, 30), (10, 20, 30, 40), (20, 30, 40, 30)}


def test_alternate_mirrors_whose_turn_it_is() -> None:
    images = torch.arange(24, dtype=torch.uint8).reshape(2, 1, 3, 4)
    augment, generator = Augment(alternate=True), torch.Generator()
    out = augment(images, generator, torch.tensor([True, False]))
    assert out[0].equal(images[0].flip(2))
    assert out[1].equal(images[1])
    with pytest.raises(ValueError, match="alternate needs turn"):
        augment(images, generator)
