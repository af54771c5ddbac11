"""Dense layers of every registered type, with the settings that their users give them: how to draw
a layer and an input, and its weight as a matrix, entry by entry.

Convolutions of any number of axes join by themselves; a layer type of another sort joins
:data:`KINDS` by hand, and a test fails until it has.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from tests.oracles.kernels import kernel_matrix
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from svdalign.factors.layers import REGISTERED


class Conv1D(nn.Module):
    """As ``transformers.pytorch_utils.Conv1D`` is written: a linear layer, weight transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


Conv1D.__module__ = "transformers.pytorch_utils"


@dataclass(frozen=True)
class Kind:
    """``cases``: draws a dense layer in double precision and an input. ``matrix``: of a weight and
    a scheme. ``example``: a layer of 3 to 4 channels with a bias."""

    cases: st.SearchStrategy[tuple[nn.Module, Tensor]]
    matrix: Callable[[Tensor, str], Tensor]
    example: Callable[[], nn.Module]


def _matrices(
    make: Callable[[int, int, bool], nn.Module],
) -> st.SearchStrategy[tuple[nn.Module, Tensor]]:
    @st.composite
    def cases(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(draw(st.integers(0, 2**20)))
        into, out = draw(st.integers(1, 8)), draw(st.integers(1, 8))
        leading = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        layer = make(into, out, draw(st.booleans())).double()
        return layer, torch.randn(*leading, into).double()

    return cases()


def _convolutions(
    make: type[nn.Module], axes: int, transposed: bool = False
) -> st.SearchStrategy[tuple[nn.Module, Tensor]]:
    def settings(low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
        return st.tuples(*[st.integers(low, high)] * axes)

    @st.composite
    def cases(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(draw(st.integers(0, 2**20)))
        kernel, dilation = draw(settings(1, 3)), draw(settings(1, 2))
        padding = draw(settings(0, 2))
        more = {}
        if transposed:
            stride = draw(settings(1, 3))
            larger = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
            more["output_padding"] = tuple(draw(st.integers(0, n)) for n in larger)
        else:
            padding = draw(st.sampled_from(["same", "valid", padding, padding]))
            stride = (1,) * axes if padding == "same" else draw(settings(1, 3))
        C, N = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        layer = make(
            C, N, kernel, stride, padding, dilation=dilation, bias=draw(st.booleans()), **more
        )
        # Large enough for the kernel to fit in, and for a padding of 2 to leave something over.
        least = [
            5 if transposed else (k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)
        ]
        size = [n + draw(st.integers(0, 3)) for n in least]
        return layer.double(), torch.randn(2, C, *size).double()

    return cases()


def _transposed(weight: Tensor, scheme: str) -> Tensor:
    return kernel_matrix(weight.transpose(0, 1), scheme)


def _convolution(kind: type[nn.Module]) -> Kind:
    transposed = issubclass(kind, _ConvTransposeNd)
    axes = kind(1, 1, 1).weight.ndim - 2
    more = ((0, 1, 0) if transposed else (1, 2, 1))[:axes]  # output padding, or dilation

    def example() -> nn.Module:
        settings = ((3, 2, 1), (1, 2, 1), (1, 0, 0))  # kernel, stride, padding
        kernel, stride, padding = (values[:axes] for values in settings)
        name = "output_padding" if transposed else "dilation"
        return kind(3, 4, kernel, stride, padding, **{name: more})

    matrix = _transposed if transposed else kernel_matrix
    return Kind(_convolutions(kind, axes, transposed), matrix, example)


KINDS = {
    "torch.nn.modules.linear.Linear": Kind(
        _matrices(nn.Linear), kernel_matrix, lambda: nn.Linear(3, 4)
    ),
    "transformers.pytorch_utils.Conv1D": Kind(
        _matrices(lambda into, out, bias: Conv1D(out, into)), _transposed, lambda: Conv1D(4, 3)
    ),
}
for _name in sorted(REGISTERED.keys() - KINDS.keys()):
    _module, _, _class = _name.rpartition(".")
    if issubclass(_kind := getattr(importlib.import_module(_module), _class), _ConvNd):
        KINDS[_name] = _convolution(_kind)
