"""Sign-symmetric feedback: errors travel layer by layer, through the signs of the weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..factors import FactoredLayer
from .fa import FA, linear_maps

__all__ = ["SignSymmetric"]


@dataclass(frozen=True)
class SignSymmetric(FA):
    """Backpropagation whose errors go back through ``sign(W)`` times the mean of ``|W|``, ``W``
    being the layer's present weight. It holds the whole graph, as BP does.

    Source: Liao, Leibo and Poggio, *How Important Is Weight Symmetry in Backpropagation?* (2016),
    uniform sign-concordant feedback; Moskovitz, Litwin-Kumar and Abbott (2018).
    """

    name: str = "sign-symmetric"

    def transport(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        mirrors = {}
        for name, layer in linear_maps(model).items():
            mirror = layer.dense() if isinstance(layer, FactoredLayer) else copy.deepcopy(layer)
            mirrors[name.replace(".", "/")] = mirror.requires_grad_(False)
        return nn.ModuleDict(mirrors)

    @contextlib.contextmanager
    def transporting(self, model: nn.Module, transport: nn.Module) -> Iterator[None]:
        with torch.no_grad():
            for name, mirror in transport.named_children():
                layer = model.get_submodule(name.replace("/", "."))
                if isinstance(layer, FactoredLayer):
                    weight: Tensor = layer.merged_weight()
                else:
                    weight = layer.get_parameter("weight")
                mirror.get_parameter("weight").copy_(weight.sign() * weight.abs().mean())
        with super().transporting(model, transport):
            yield
