"""Factored ``Conv1D`` of Hugging Face's transformers, the linear layer of GPT-2."""

from __future__ import annotations

from torch import Tensor, nn

from .base import Scheme, plain_layer
from .linear import SVDLinear


class SVDTransformersConv1D(SVDLinear, dense="transformers.pytorch_utils.Conv1D"):
    """A linear layer whose weight is kept transposed, (in, out).

    Input ``(..., in)``, output ``(..., out)``. The transformers library is not imported.
    """

    dense_type: type[nn.Module]

    def _take_settings(self, like: nn.Module) -> None:
        self.dense_type = like.dense_type if isinstance(like, type(self)) else type(like)

    @staticmethod
    def to_matrix(weight: Tensor, scheme: Scheme) -> Tensor:
        return weight.mT

    def from_matrix(self, W: Tensor) -> Tensor:
        return W.mT

    def dense(self) -> nn.Module:
        sizes = self.out_features, self.in_features
        return plain_layer(self.merged_weight(), self.bias, self.dense_type, *sizes)

    def single(self) -> nn.Module:
        return super().dense()
