from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import svdalign as sva
from svdalign.lab import models
from svdalign.lab.experiments.profile import Profile, ProfileConfig


def natural(n: int, size: int) -> torch.Tensor:
    """Images whose neighbouring pixels go together, as those of photographs do."""
    noise = torch.randn(n, 3, size + 4, size + 4, generator=torch.Generator().manual_seed(0))
    return nn.functional.avg_pool2d(noise, 5, stride=1)


def test_whitened_patches_have_covariance_one() -> None:
    whitening, images = models.Whitening(3), natural(200, 12)
    with pytest.raises(AssertionError):
        assert_white(whitening(images))
    whitening.fit(images, eps=0.0)
    assert_white(whitening(images))


def assert_white(out: torch.Tensor) -> None:
    patches, negatives = out.transpose(0, 1).flatten(1).chunk(2)
    assert negatives.equal(-patches)
    torch.testing.assert_close(torch.cov(patches), torch.eye(12), atol=2e-3, rtol=0)


def test_whitening_is_not_trained_and_is_saved_with_the_model() -> None:
    whitening, other = models.Whitening(1), models.Whitening(1)
    assert not list(whitening.parameters())
    whitening.fit(natural(20, 8)[:, :1])
    other.load_state_dict(whitening.state_dict())
    assert other.weight.equal(whitening.weight)


@pytest.mark.parametrize("image_size", [9, 16, 32])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_maps_images_to_finite_logits(in_channels: int, image_size: int) -> None:
    net = models.build(
        "airbench", num_classes=7, in_channels=in_channels, image_size=image_size, width=0.125
    )
    logits = net(torch.randn(2, in_channels, image_size, image_size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_trains_shifts_but_no_scales_of_norms() -> None:
    """24 patches, blocks of 64, 256 and 256 channels, ten classes."""
    net = models.build("airbench", num_classes=10)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    pairs = [(24, 64), (64, 64), (64, 256), (256, 256), (256, 256), (256, 256)]
    assert trained == sum(9 * a * b + b for a, b in pairs) + 2560


def test_first_kernels_hand_inputs_on() -> None:
    block = models.build("airbench", num_classes=10).block1
    x = torch.randn(1, 24, 8, 8)
    torch.testing.assert_close(block.conv1(x)[:, :24], x)
    assert not block.conv1(x)[:, 24:48].allclose(x)


@pytest.mark.parametrize(
    ("units", "number"), [("layer", 7), ("block", 4), (2, 2), (["block1", "block2"], 3)]
)
def test_units(units: str | int | list[str], number: int) -> None:
    """Patches belong to the first unit; the classifier is one of its own, or the last's part."""
    net = sva.factorize(models.build("airbench", num_classes=10, width=0.25), 0.5, "channel")
    learner = sva.Learner(
        net,
        units=units,
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
        example=torch.randn(2, 3, 32, 32),
    )
    assert len(learner.units) == number


def test_costs_are_worked_out_without_images(tmp_path: Path) -> None:
    config = ProfileConfig(
        model="airbench", width=0.25, batch_size=4, methods=["bp-dense", "ssa"], estimate=True
    )
    found = {row["method"]: row for row in Profile(config, tmp_path).run()["methods"]}
    peaks = {method: row["memory"]["peak"] for method, row in found.items()}
    assert 0 < peaks["ssa"] < peaks["bp-dense"]
