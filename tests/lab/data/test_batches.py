from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svdalign.lab.data import Augment, Split, batches, num_batches

MEAN, STD = (0.25, 0.5), (0.5, 0.125)
AUGMENT = Augment(crop=2, flip=True, cutout=3)


@pytest.fixture
def split() -> Split:
    """23 samples; the label is the sample's number."""
    return Split(torch.randint(256, (23, 2, 6, 6)).to(torch.uint8), torch.arange(23))


def run(split: Split, batch_size: int = 5, **options: object) -> list[tuple[Tensor, Tensor]]:
    return list(batches(split, batch_size, mean=MEAN, std=STD, **options))  # type: ignore[arg-type]


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.equal(u) and y.equal(v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_unshuffled_batches_are_the_normalised_split(split: Split) -> None:
    x, y = (torch.cat(parts) for parts in zip(*run(split), strict=True))
    assert y.equal(split.labels)
    assert x.dtype == torch.float32
    for channel in range(2):
        expected = (split.images[:, channel] / 255 - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(x[:, channel], expected)


def test_shuffled_epoch_is_a_permutation_with_its_own_images(split: Split) -> None:
    plain = torch.cat([x for x, _ in run(split)])
    shuffled = run(split, shuffle=True)
    x, y = (torch.cat(parts) for parts in zip(*shuffled, strict=True))
    assert sorted(y.tolist()) == list(range(23))
    assert not y.equal(split.labels)
    assert x.equal(plain[y])


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [5, 5, 5, 5, 3]), (True, [5, 5, 5, 5])])
def test_sizes(split: Split, drop_last: bool, sizes: list[int]) -> None:
    assert [len(y) for _, y in run(split, drop_last=drop_last)] == sizes
    assert num_batches(split, 5, drop_last=drop_last) == len(sizes)
    assert len(run(split, 23, drop_last=drop_last)) == 1


@pytest.mark.parametrize("start", range(6))
def test_going_on_equals_not_stopping(split: Split, start: int) -> None:
    options = {"shuffle": True, "seed": 3, "epoch": 2, "augment": AUGMENT}
    whole = run(split, **options)
    torch.randn(7)  # the global generator has no part in it
    assert same(run(split, start=start, **options), whole[start:])


def test_seed_and_epoch_change_order_and_augmentation(split: Split) -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**63, 0)]
    for shuffle in (True, False):
        epochs = [
            run(split, shuffle=shuffle, seed=seed, epoch=epoch, augment=AUGMENT)
            for seed, epoch in keys
        ]
        assert not any(same(a, b) for i, a in enumerate(epochs) for b in epochs[:i])


def test_augmentation_differs_between_batches() -> None:
    split = Split(torch.randint(256, (1, 2, 6, 6)).expand(16, -1, -1, -1).to(torch.uint8),
                  torch.zeros(16, dtype=torch.int64))  # fmt: skip
    first, second = (x for x, _ in run(split, 8, augment=AUGMENT))
    assert not first.equal(second)


def test_memory_format(split: Split) -> None:
    for (x, y), (u, v) in zip(
        run(split, memory_format=torch.channels_last, augment=AUGMENT),
        run(split, augment=AUGMENT),
        strict=True,
    ):
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert u.is_contiguous()
        assert x.equal(u)
        assert y.equal(v)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_batches(split: Split) -> None:
    on_gpu = Split(split.images.cuda(), split.labels.cuda())
    options = {"shuffle": True, "augment": AUGMENT}
    for (x, y), (u, v) in zip(run(split, **options), run(on_gpu, **options), strict=True):
        assert u.is_cuda
        assert v.is_cuda
        torch.testing.assert_close(u.cpu(), x)
        assert v.cpu().equal(y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"epoch": -1}, "epoch must not be negative, got -1"),
        ({"start": -1}, "start must not be negative, got -1"),
        ({"start": 6}, "start must be at most 5, the number of batches, got 6"),
        ({"mean": (0.5,)}, "mean and std must have 2 values, one a channel, got 1 and 2"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_batch(
    split: Split, options: dict[str, object], message: str
) -> None:
    arguments: dict[str, object] = {"batch_size": 5, "mean": MEAN, "std": STD} | options
    with pytest.raises(ValueError, match=message):
        batches(split, **arguments)  # type: ignore[arg-type]


def test_alternate_mirrors_each_image_every_other_epoch(split: Split) -> None:
    def epoch(number: int) -> dict[int, Tensor]:
        options = {"shuffle": True, "seed": 5, "augment": Augment(alternate=True)}
        found = run(split, epoch=number, **options)
        return {int(label): x for images, y in found for x, label in zip(images, y, strict=True)}

    first, second, third = epoch(0), epoch(1), epoch(2)
    plain = {int(y): x for x, y in zip(*run(split, 23)[0], strict=True)}
    mirrored = {name for name, x in first.items() if not x.equal(plain[name])}
    assert 0 < len(mirrored) < len(split)
    for name, x in first.items():
        assert x.equal(plain[name].flip(2) if name in mirrored else plain[name])
        assert second[name].equal(x.flip(2))
        assert third[name].equal(x)
