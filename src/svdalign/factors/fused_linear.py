"""Two factored linear layers with an activation between them, as in a transformer's perceptron.

The wide ``h = act(W z + b)``, ``W = U diag(s)`` (N, r), is read by the second layer alone. So it
need not be whole: it is computed for some samples at a time from ``z``, which has only ``r``
channels, when the second layer reads it, and again in the backward pass. A training step keeps
``r`` numbers a token in place of ``2 N``.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ._kernels import expand_tokens, reduce_tokens
from .fused import take_over
from .layers import SVDLinear


class FusedLinear(SVDLinear):
    """``layer``, a factored linear layer, and ``tail``, the activations that follow it.

    It has the parameters of ``layer`` itself, not copies. In training its input may be lazy, and
    with a ``tail`` its output is. In evaluation, and for an input (B, in) without tokens, it runs
    ``layer`` and then ``tail``. Input (B, ..., in), output (B, ..., out).
    """

    affine = False
    tail: nn.Sequential

    def __init__(self, layer: SVDLinear, tail: list[nn.Module]) -> None:
        U, s, V = (t.to("meta") for t in (layer.U, layer.s, layer.V))  # no copies of the values
        super().__init__(U, s, V, None, like=layer)
        take_over(self, layer, tail)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.ndim < 3:
            return cast(Tensor, self.tail(super().forward(x)))
        z, weight = reduce_tokens(x, self.V), self.U * self.s
        if not len(self.tail):
            return F.linear(z, weight, self.bias)
        return expand_tokens(self.tail, z, weight, self.bias)

    def plain(self) -> nn.Module:
        return nn.Sequential(super().plain(), *self.tail) if len(self.tail) else super().plain()
