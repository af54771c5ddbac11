from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import svdalign as sva
from svdalign.factors import FusedConv2d, FusedLinear
from svdalign.lab import models
from svdalign.lab.costs import parameter_count, pretending, step_macs

SMALL = ["mlp", "smallconv", "vgg8", "vgg13", "resnet20", "resnet32", "mobilenet_v1"]


@pytest.mark.parametrize("image_size", [16, 28, 32])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_maps_images_to_finite_logits(name: str, in_channels: int, image_size: int) -> None:
    net = models.build(
        name, num_classes=7, in_channels=in_channels, image_size=image_size, width=0.125
    )
    logits = net(torch.randn(2, in_channels, image_size, image_size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("image_size", [8, 9, 15])
@pytest.mark.parametrize("name", SMALL)
def test_smallest_and_odd_sizes(name: str, image_size: int) -> None:
    net = models.build(name, num_classes=3, image_size=image_size, width=0.125)
    assert net(torch.randn(2, 3, image_size, image_size)).shape == (2, 3)


def conv(fan_in: int, fan_out: int) -> int:
    """Parameters of a 3x3 convolution without bias and its batch norm."""
    return fan_in * fan_out * 9 + 2 * fan_out


def linear(fan_in: int, fan_out: int) -> int:
    return fan_in * fan_out + fan_out


COUNTS = {
    "mlp": linear(3072, 512) + linear(512, 512) + linear(512, 10),
    "smallconv": conv(3, 32) + conv(32, 64) + conv(64, 128) + linear(128 * 4 * 4, 10),
    "vgg8": conv(3, 128)
    + conv(128, 256)
    + conv(256, 256)
    + conv(256, 512)
    + 2 * conv(512, 512)
    + linear(512 * 2 * 2, 1024)
    + linear(1024, 10),
    # Configuration B of Simonyan & Zisserman: 1x1 map after five poolings of 32 pixels.
    "vgg13": conv(3, 64)
    + conv(64, 64)
    + conv(64, 128)
    + conv(128, 128)
    + conv(128, 256)
    + conv(256, 256)
    + conv(256, 512)
    + 3 * conv(512, 512)
    + 2 * linear(512, 512)
    + linear(512, 10),
    # The published 0.27 M and 0.46 M with parameter-free skips, plus two 1x1 skips with batch norm.
    "resnet20": 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64),
    "resnet32": 464_154 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64),
    # Published for 1000 classes (torchvision's layout), with a classifier of 10.
    "mobilenet_v1": 4_231_976 - linear(1024, 1000) + linear(1024, 10),
}


@pytest.mark.parametrize("name", SMALL)
def test_parameter_counts(name: str) -> None:
    net = models.build(name, num_classes=10)
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "weighted"),
    [
        ("mlp", 3),
        ("smallconv", 4),
        ("vgg8", 8),
        ("vgg13", 13),
        ("resnet20", 20),
        ("resnet32", 32),
        ("mobilenet_v1", 28),
    ],
)  # fmt: skip
def test_number_of_weighted_layers_is_the_published(name: str, weighted: int) -> None:
    net = models.build(name, num_classes=10, width=0.1)
    layers = [
        m
        for path, m in net.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and ".skip." not in path
    ]
    assert len(layers) == weighted


@pytest.mark.parametrize("name", SMALL)
def test_width_scales_every_hidden_layer(name: str) -> None:
    narrow = models.build(name, num_classes=10, width=0.5)
    full = models.build(name, num_classes=10)

    def widths(net: nn.Module) -> list[int]:
        return [m.weight.shape[0] for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    *hidden, classes = widths(narrow)
    *hidden_full, classes_full = widths(full)
    assert [2 * w for w in hidden] == hidden_full
    assert classes == classes_full == 10


@pytest.mark.parametrize("name", SMALL)
def test_activations_are_distinct_modules(name: str) -> None:
    net = models.build(name, num_classes=10, image_size=16, width=0.125)
    calls: dict[str, int] = {}
    for path, module in net.named_modules():
        if isinstance(module, nn.ReLU):
            # In place only on a sum that a residual block has just made.
            block = net.get_submodule(path.rpartition(".")[0])
            assert not module.inplace or (
                hasattr(block, "skip") and module is [*block.children()][-1]
            )
            calls[path] = 0

            def count(*_: object, path: str = path) -> None:
                calls[path] += 1

            module.register_forward_hook(count)
    net(torch.randn(2, 3, 16, 16))
    assert calls
    assert set(calls.values()) == {1}


def test_resnet_block_is_its_definition() -> None:
    torch.manual_seed(0)
    net = models.build("resnet20", num_classes=10, width=0.25)
    block = net.get_submodule("stage2.0").eval()
    x = torch.randn(2, 4, 8, 8)
    p = dict(block.named_parameters())
    b = dict(block.named_buffers())

    def conv_norm(h: torch.Tensor, conv: str, bn: str, stride: int, padding: int) -> torch.Tensor:
        h = torch.conv2d(h, p[f"{conv}.weight"], stride=stride, padding=padding)
        return torch.nn.functional.batch_norm(
            h, b[f"{bn}.running_mean"], b[f"{bn}.running_var"], p[f"{bn}.weight"], p[f"{bn}.bias"]
        )

    h = conv_norm(x, "conv1", "bn1", 2, 1).clamp(min=0)
    h = conv_norm(h, "conv2", "bn2", 1, 1) + conv_norm(x, "skip.0", "skip.1", 2, 0)
    torch.testing.assert_close(block(x), h.clamp(min=0))


def test_convolutions_are_he_initialised() -> None:
    torch.manual_seed(0)
    net = models.build("vgg8", num_classes=10)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    for m in convs:
        expected = (2 / (m.out_channels * 9)) ** 0.5
        assert m.weight.std().item() == pytest.approx(expected, rel=0.05)


# Parameters, and multiply-accumulates at 224 pixels, as published for 1000 classes.
LARGE = {
    "resnet18": (11_689_512, 1.81e9),
    "vit_s16": (22_050_664, 4.6e9),
    "resnet50": (25_557_032, 4.09e9),
    "resnet101": (44_549_160, 7.80e9),
    "vit_b16": (86_567_656, 17.6e9),
    "vit_l16": (304_326_632, 61.6e9),
}
PUBLISHED = {**LARGE, "mobilenet_v1": (4_231_976, 569e6)}


def test_every_model_is_tested() -> None:
    assert sorted([*SMALL, *LARGE, "airbench"]) == models.available()  # it: test_airbench.py


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_for_224_pixels_are_the_published_ones(name: str) -> None:
    parameters, macs = PUBLISHED[name]
    with pretending():
        net = models.build(name, num_classes=1000, image_size=224)
        counted = step_macs(lambda: net(torch.randn(1, 3, 224, 224)))
    assert parameter_count(net) == parameters
    assert counted == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize("name", LARGE)
def test_large_models_run(name: str) -> None:
    net = models.build(name, num_classes=7, in_channels=1, image_size=32, width=0.1)
    logits = net(torch.randn(2, 1, 32, 32))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_mobilenet_keeps_a_map_of_small_images() -> None:
    def maps(size: int) -> list[int]:
        net = models.build("mobilenet_v1", num_classes=3, image_size=size, width=0.05)
        found: list[int] = []
        for block in net[:-3]:
            block.register_forward_hook(lambda m, args, out: found.append(out.shape[-1]))
        net(torch.randn(2, 3, size, size))
        return found

    assert maps(32) == [32, 32, 16, 16, 8, 8, 4, 4, 4, 4, 4, 4, 2, 2]
    assert maps(64) == [32, 32, 16, 16, 8, 8, 4, 4, 4, 4, 4, 4, 2, 2]


def test_depthwise_convolutions_are_he_initialised_by_their_own_fan() -> None:
    torch.manual_seed(0)
    net = models.build("mobilenet_v1", num_classes=10)
    depthwise = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 13
    weights = torch.cat([m.weight.flatten() for m in depthwise])
    assert weights.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)


def test_mobilenets_pointwise_convolutions_are_factored() -> None:
    net = models.build("mobilenet_v1", num_classes=10, width=0.25)
    report = sva.factorize(net, 0.25, "channel").factorization
    pointwise = {f"{i}.3" for i in range(1, 14)}
    assert pointwise <= {row.name for row in report if row.rank is not None}
    depthwise = {row.name: row.note for row in report if row.note.startswith("grouped")}
    assert set(depthwise) == {f"{i}.0" for i in range(1, 14)}


@pytest.mark.parametrize("units", ["layer", "block"])
@pytest.mark.parametrize("rule", sva.rules.available())
def test_mobilenet_trains_by_every_rule(rule: str, units: str) -> None:
    torch.manual_seed(0)
    net = models.build("mobilenet_v1", num_classes=3, image_size=16, width=0.06)
    model = sva.factorize(net, 0.25, "channel")
    x, y = torch.randn(6, 3, 16, 16), torch.arange(6) % 3
    learner = sva.Learner(
        model, rule, units=units, optimizer=lambda p: torch.optim.AdamW(p, 1e-3), example=x
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [float(learner.step(x, y).loss) for _ in range(3)]
    assert all(map(math.isfinite, losses))
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vgg"}, r"unknown model 'vgg'; did you mean vgg8.* \(available: .*vgg13"),
        ({"image_size": 7}, r"image_size must be at least 8 for 'smallconv', got 7"),
        ({"num_classes": 0}, r"num_classes must be at least 1"),
        ({"in_channels": 0}, r"in_channels must be at least 1"),
        ({"width": 0.0}, r"width must be a positive"),
        ({"width": float("nan")}, r"width must be a positive"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"name": "smallconv", "num_classes": 10} | change
    with pytest.raises(ValueError, match=message):
        models.build(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", models.available())
def test_every_network_can_be_fused(name: str) -> None:
    net = sva.factorize(models.build(name, num_classes=10, image_size=32, width=0.06), 0.25)
    fused = sva.fuse(net)
    assert any(isinstance(module, FusedConv2d | FusedLinear) for module in fused.modules())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fused.eval()(x), net.eval()(x), rtol=1e-4, atol=1e-4)
