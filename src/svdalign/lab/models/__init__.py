"""Plain networks to train, all scalable in width: an MLP, small CNNs, VGGs, CIFAR ResNets and
MobileNetV1; and those of ImageNet: ResNet-18, -50 and -101, ViT-S/16, -B/16 and -L/16.

They know nothing of factors or units: :func:`svdalign.factorize` takes them like any other module.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .._named import did_you_mean, import_maker
from ._airbench import Whitening, airbench
from ._imagenet import resnet18, resnet50, resnet101
from ._mlp import mlp
from ._mobilenet import mobilenet_v1
from ._resnet import resnet20, resnet32
from ._smallconv import smallconv
from ._vgg import vgg8, vgg13
from ._vit import vit_b16, vit_l16, vit_s16

__all__ = ["Whitening", "available", "build"]


@dataclass(frozen=True)
class _Entry:
    make: Callable[[int, int, int, float], nn.Module]
    min_image_size: int


_MODELS = {
    "mlp": _Entry(mlp, 1),
    "smallconv": _Entry(smallconv, 8),
    "airbench": _Entry(airbench, 9),
    "vgg8": _Entry(vgg8, 8),
    "vgg13": _Entry(vgg13, 8),
    "resnet20": _Entry(resnet20, 8),
    "resnet32": _Entry(resnet32, 8),
    "mobilenet_v1": _Entry(mobilenet_v1, 8),
    "resnet18": _Entry(resnet18, 8),
    "resnet50": _Entry(resnet50, 8),
    "resnet101": _Entry(resnet101, 8),
    "vit_s16": _Entry(vit_s16, 16),
    "vit_b16": _Entry(vit_b16, 16),
    "vit_l16": _Entry(vit_l16, 16),
}


def available() -> list[str]:
    """Names that :func:`build` takes, sorted."""
    return sorted(_MODELS)


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
) -> nn.Module:
    """A freshly initialised network from ``(N, in_channels, image_size, image_size)`` to logits.

    Every activation is a module of its own (``nn.ReLU``, in transformers ``nn.GELU``) and every
    pooling a module, so that hooks see them. Weights are drawn from torch's global generator:
    convolutions as in He et al. 2015 (fan out; ``airbench`` has its own), linear layers as the
    framework does. A :class:`Whitening` layer still has to be fitted to images.

    Args:
        name: one of :func:`available`, or a network of your own as ``package.module:Net``: a class
            or function that takes ``in_channels`` and ``num_classes`` as keywords, and
            ``image_size`` and ``width`` if it wants to know them.
        num_classes: number of logits.
        in_channels: channels of the images, 1 or 3 as a rule.
        image_size: height and width of the images in pixels.
        width: factor on the number of channels (units, for the MLP; heads, for transformers) of
            every hidden layer.

    Raises:
        ValueError: for an unknown name, or a size outside what the network can take.
    """
    if ":" in name:
        wanted = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
        return _own(name, {**wanted, "width": width})
    if name not in _MODELS:
        raise ValueError(
            f"unknown model {name!r}{did_you_mean(name, available())} "
            f"(available: {', '.join(available())}, or package.module:Net)"
        )
    entry = _MODELS[name]
    for argument, value, least in (
        ("num_classes", num_classes, 1),
        ("in_channels", in_channels, 1),
        ("image_size", image_size, entry.min_image_size),
    ):
        if value < least:
            raise ValueError(f"{argument} must be at least {least} for {name!r}, got {value}")
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be a positive finite number, got {width}")
    return entry.make(num_classes, in_channels, image_size, width)


def _own(name: str, wanted: dict[str, Any]) -> nn.Module:
    """The user's network."""
    make = import_maker(name, "in_channels", "num_classes")
    known = inspect.signature(make).parameters
    if wanted["width"] != 1.0 and "width" not in known:
        raise ValueError(f"model {name} takes no width, got width {wanted['width']}")
    net = make(**{key: value for key, value in wanted.items() if key in known})
    if not isinstance(net, nn.Module):
        raise ValueError(f"model {name} must make an nn.Module, got {type(net).__name__}")
    return net
