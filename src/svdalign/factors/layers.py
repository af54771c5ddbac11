"""Factored layers: the weight lives as ``W = U diag(s) V^T``; the dense ``W`` is never formed."""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FactoredLayer", "SVDConv2d", "SVDLinear", "Scheme", "svd_factors"]

Scheme = Literal["spatial", "channel"]
SCHEMES: tuple[str, ...] = get_args(Scheme)


def svd_factors(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading ``rank`` singular triplets of ``W`` (m, n), with ``||W||_F`` kept.

    Returns ``U (m, r), s (r,), V (n, r)``. Cutting drops energy; rescaling ``s`` by one common
    factor restores the norm, and with it the scale of the forward signal at initialisation.
    """
    # LAPACK in double: this happens once a layer, and full rank must give the function back.
    A, sigma, Bt = torch.linalg.svd(W.detach().double(), full_matrices=False)
    s = sigma[:rank]
    kept, whole = torch.linalg.vector_norm(s), torch.linalg.vector_norm(sigma)
    if kept > 0:
        s = s * (whole / kept)
    U, V = A[:, :rank], Bt[:rank].mT
    return U.to(W.dtype).contiguous(), s.to(W.dtype), V.to(W.dtype).contiguous()


class FactoredLayer(nn.Module):
    """A linear map held as ``U diag(s) V^T`` plus bias.

    ``U`` (m, r) and ``V`` (n, r) have orthonormal columns, ``s`` is (r,). What ``m`` and ``n``
    stand for is the subclass's reshape of the framework's weight.
    """

    U: nn.Parameter
    s: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, U: Tensor, s: Tensor, V: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.set_factors(U, s, V)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach().clone())
        )

    def set_factors(self, U: Tensor, s: Tensor, V: Tensor) -> None:
        """Replace the factors' values, of a new rank if ``s`` is of another length.

        The ``Parameter`` objects stay the same ones, so optimizers and schedulers that hold them go
        on; their gradients are dropped. Raises ValueError for factors that are not of shapes
        (m, r), (r,), (n, r), for a rank below 1 or above min(m, n), and for another m or n.
        """
        r = s.numel()
        if s.ndim != 1 or r < 1 or U.ndim != 2 or V.ndim != 2 or U.shape[1] != r or V.shape[1] != r:
            raise ValueError(
                "factors must have shapes (m, r), (r,), (n, r) with r >= 1, got "
                f"U {tuple(U.shape)}, s {tuple(s.shape)}, V {tuple(V.shape)}"
            )
        if r > min(len(U), len(V)):
            raise ValueError(f"rank {r} is more than min(m, n) = {min(len(U), len(V))}")
        if "U" in self._parameters and (len(U), len(V)) != (len(self.U), len(self.V)):
            raise ValueError(
                f"factors must keep m = {len(self.U)} and n = {len(self.V)}, got "
                f"U {tuple(U.shape)}, V {tuple(V.shape)}"
            )
        for name, value in (("U", U), ("s", s), ("V", V)):
            value = value.detach().clone(memory_format=torch.contiguous_format)
            parameter = self._parameters.get(name)
            if parameter is None:
                self.register_parameter(name, nn.Parameter(value))
            else:
                parameter.grad = None
                # A graph that is still alive holds autograd's accumulator for this parameter, which
                # remembers the old shape. Only a change of dtype makes torch let go of it.
                other = torch.float32 if value.dtype == torch.float64 else torch.float64
                parameter.data = torch.empty(0, dtype=other, device=value.device)
                parameter.data = value

    @property
    def rank(self) -> int:
        """Current rank r."""
        return self.s.numel()

    @property
    def full_rank(self) -> int:
        """min(m, n): the rank at which nothing is lost."""
        return min(self.U.shape[0], self.V.shape[0])

    def matrix(self) -> Tensor:
        """The dense matrix ``U diag(s) V^T``, (m, n). For export and tests, not for training."""
        return (self.U * self.s) @ self.V.mT

    def merged_weight(self) -> Tensor:
        """The dense weight in the framework's own layout."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """:meth:`merged_weight`, for code that reads a layer's weight instead of calling the layer
        (``nn.TransformerEncoderLayer`` in evaluation, for one). It forms the dense weight anew."""
        return self.merged_weight()

    def output_directions(self) -> Tensor:
        """Matrix (out, q) whose columns span the output channel directions this layer can reach."""
        raise NotImplementedError

    def dense(self) -> nn.Module:
        """The dense layer of the same function."""
        raise NotImplementedError


class SVDLinear(FactoredLayer):
    """``nn.Linear`` with ``weight = U diag(s) V^T``: ``U`` (out, r), ``V`` (in, r).

    Input ``(..., in)``, output ``(..., out)``.
    """

    @classmethod
    def from_dense(cls, layer: nn.Linear, rank: int) -> SVDLinear:
        """Factors of ``layer.weight`` cut to ``rank`` (see :func:`svd_factors`)."""
        return cls(*svd_factors(layer.weight, rank), layer.bias)

    @property
    def in_features(self) -> int:
        return self.V.shape[0]

    @property
    def out_features(self) -> int:
        return self.U.shape[0]

    def merged_weight(self) -> Tensor:
        return self.matrix()

    def output_directions(self) -> Tensor:
        return self.U

    def dense(self) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, self.U.device)
        return cast(nn.Linear, _copy_into(layer.to(self.U.dtype), self))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x @ self.V, self.U * self.s, self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class SVDConv2d(FactoredLayer):
    """``nn.Conv2d`` with a factored kernel ``K`` (N, C, H, W).

    ``scheme="spatial"``: ``K`` as an (N W, C H) matrix; an (H x 1) convolution C -> r, a scale by
    ``s``, a (1 x W) convolution r -> N. ``scheme="channel"``: ``K`` as an (N, C H W) matrix; an
    (H x W) convolution C -> r, a scale, a 1 x 1 convolution r -> N. Stride, padding and dilation
    are split by axis. Input (B, C, h, w).
    """

    def __init__(
        self,
        U: Tensor,
        s: Tensor,
        V: Tensor,
        bias: Tensor | None,
        *,
        like: nn.Conv2d,
        scheme: Scheme,
    ) -> None:
        super().__init__(U, s, V, bias)
        self.scheme = scheme
        self.in_channels, self.out_channels = like.in_channels, like.out_channels
        self.kernel_size = cast(tuple[int, int], like.kernel_size)
        self.stride = cast(tuple[int, int], like.stride)
        self.dilation = cast(tuple[int, int], like.dilation)
        self.padding = like.padding
        self.padding_mode = like.padding_mode

    @classmethod
    def from_dense(cls, layer: nn.Conv2d, rank: int, scheme: Scheme = "spatial") -> SVDConv2d:
        """Factors of ``layer.weight`` reshaped by ``scheme`` and cut to ``rank``.

        Raises ValueError for a grouped convolution (its kernel is not one matrix), for a padding
        mode other than zeros (it does not split by axis) and for an unknown scheme.
        """
        if scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
        if layer.groups != 1:
            raise ValueError(
                f"a convolution with groups={layer.groups} cannot be factored, only groups=1"
            )
        if layer.padding_mode != "zeros":
            raise ValueError(
                f"padding_mode={layer.padding_mode!r} cannot be factored, only padding_mode='zeros'"
            )
        U, s, V = svd_factors(kernel_matrix(layer.weight, scheme), rank)
        return cls(U, s, V, layer.bias, like=layer, scheme=scheme)

    def kernels(self) -> tuple[Tensor, Tensor]:
        """The two convolution kernels, views of ``V`` and ``U``: C -> r and r -> N."""
        (H, W), C, N, r = self.kernel_size, self.in_channels, self.out_channels, self.rank
        if self.scheme == "spatial":
            return self.V.mT.reshape(r, C, H, 1), self.U.reshape(N, W, 1, r).permute(0, 3, 2, 1)
        return self.V.mT.reshape(r, C, H, W), self.U.reshape(N, r, 1, 1)

    def split(
        self, value: tuple[int, int], neutral: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """A per-axis setting, shared out between the first and the second convolution."""
        if self.scheme == "spatial":
            return (value[0], neutral), (neutral, value[1])
        return value, (neutral, neutral)

    def paddings(self) -> tuple[str | tuple[int, int], str | tuple[int, int]]:
        """Padding of the first and of the second convolution: numbers, or ``"same"`` where that is
        more padding after than before."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if self.padding == "same":
            height, width = (
                d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)
            )
            first, second = self.split((height, width), 0)
            return _half(first), _half(second)
        return self.split(cast(tuple[int, int], self.padding), 0)

    def first_settings(self) -> tuple[Any, Any, Any]:
        """Stride, padding and dilation of the first convolution."""
        dilation = self.split(self.dilation, 1)[0]
        return self.split(self.stride, 1)[0], self.paddings()[0], dilation

    def second_settings(self) -> tuple[Any, Any, Any]:
        """Stride, padding and dilation of the second convolution."""
        dilation = self.split(self.dilation, 1)[1]
        return self.split(self.stride, 1)[1], self.paddings()[1], dilation

    def reduce(self, x: Tensor) -> Tensor:
        """The first convolution: ``x`` (B, C, h, w) to (B, r, h', w')."""
        return F.conv2d(x, self.kernels()[0], None, *self.first_settings())

    def expansion(self) -> Tensor:
        """Kernel of the second convolution, with ``diag(s)`` in it: (N, r, 1, W) or (N, r, 1, 1).

        ``s`` is folded into the smaller of the two operands: r N W products instead of one per
        pixel, and no scaled copy of the map to hold.
        """
        second = self.kernels()[1] * self.s[:, None, None]
        # In double precision torch's own CPU kernel refuses this layout backward.
        return second.contiguous() if second.dtype == torch.float64 else second

    def expand(self, z: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
        """The second convolution, of ``z`` (B, r, h, w) with the kernel ``second``."""
        return F.conv2d(z, second, bias, *self.second_settings())

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.reduce(x), self.expansion(), self.bias)

    def merged_weight(self) -> Tensor:
        (H, W), C, N = self.kernel_size, self.in_channels, self.out_channels
        if self.scheme == "spatial":
            return self.matrix().reshape(N, W, C, H).permute(0, 2, 3, 1)
        return self.matrix().reshape(N, C, H, W)

    def output_directions(self) -> Tensor:
        return self.U.reshape(self.out_channels, -1)

    def dense(self) -> nn.Conv2d:
        layer = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride,
            cast(Any, self.padding), self.dilation,
            bias=self.bias is not None, device=self.U.device, dtype=self.U.dtype,
        )  # fmt: skip
        return cast(nn.Conv2d, _copy_into(layer, self))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, rank={self.rank}, "
            f"scheme={self.scheme}, bias={self.bias is not None}"
        )


def _half(total: tuple[int, int]) -> str | tuple[int, int]:
    """``total`` padding by axis, shared out evenly between the two sides, or ``"same"``."""
    return "same" if any(n % 2 for n in total) else (total[0] // 2, total[1] // 2)


def kernel_matrix(K: Tensor, scheme: Scheme) -> Tensor:
    """A kernel (N, C, H, W) as the matrix that ``scheme`` factors: (N W, C H) or (N, C H W)."""
    N, C, H, W = K.shape
    if scheme == "spatial":
        return K.permute(0, 3, 1, 2).reshape(N * W, C * H)
    return K.reshape(N, C * H * W)


def break_even_rank(m: int, n: int) -> int:
    """The largest rank whose factors hold fewer numbers than the dense matrix: r (m+n+1) < m n."""
    return math.ceil(m * n / (m + n + 1)) - 1


def absolute_rank(rank: int | float, full: int) -> int:
    """The rank that is meant: a whole number as it is, at most ``full``; a fraction in (0, 1] of
    ``full`` rounded up."""
    return min(full, rank) if isinstance(rank, int) else max(1, math.ceil(rank * full - 1e-9))


def _copy_into(dense: nn.Module, layer: FactoredLayer) -> nn.Module:
    with torch.no_grad():
        cast(Tensor, dense.weight).copy_(layer.merged_weight())
        if layer.bias is not None:
            cast(Tensor, dense.bias).copy_(layer.bias)
    return dense
