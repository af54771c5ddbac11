"""Factored convolutions of any number of axes, ordinary and transposed.

``scheme="channel"``: the kernel ``K`` (N, C, *kernel) as an (N, C prod(kernel)) matrix; a
convolution of the whole kernel C -> r, a scale by ``s``, a pointwise convolution r -> N.

``scheme="spatial"``: the axes are shared out between the two convolutions. Of two axes (H, W) the
first has H and the second W: ``K`` as an (N W, C H) matrix; an (H x 1) convolution C -> r, a scale,
a (1 x W) convolution r -> N. Of one axis the second has it, of three the first has one.

Each convolution has the stride, padding and dilation of its own axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FactoredLayer, Scheme, plain_layer


class FactoredConvolution(FactoredLayer):
    """A convolution with a factored kernel; see the text of the module.

    Input (B, C, *space), output (B, N, *space'). A subclass names its function in torch and its
    module.
    """

    channels_last = False
    convolve: ClassVar[Callable[..., Tensor]]
    module: ClassVar[type[nn.Module]]

    def _take_settings(self, like: nn.Module) -> None:
        like = cast(nn.Conv2d, like)
        self.in_channels, self.out_channels = like.in_channels, like.out_channels
        self.kernel_size, self.stride = like.kernel_size, like.stride
        self.dilation, self.padding = like.dilation, like.padding
        self.padding_mode = like.padding_mode

    @classmethod
    def refusal(cls, layer: nn.Module) -> str:
        if reason := super().refusal(layer):
            return reason
        layer = cast(nn.Conv2d, layer)
        if layer.groups != 1:
            return f"grouped convolution (groups={layer.groups}), only groups=1 is one matrix"
        if layer.padding_mode != "zeros":
            return f"padding_mode={layer.padding_mode!r}, only padding_mode='zeros' splits by axis"
        return ""

    @classmethod
    def is_pointwise(cls, layer: nn.Module) -> bool:
        return all(size == 1 for size in cast(nn.Conv2d, layer).kernel_size)

    # --- kernels --------------------------------------------------------------------------------

    @staticmethod
    def _channels_first(K: Tensor) -> Tensor:
        """A kernel of torch's layout as (N, C, *kernel), or the other way round."""
        return K

    @classmethod
    def to_matrix(cls, weight: Tensor, scheme: Scheme) -> Tensor:
        K = cls._channels_first(weight)
        axes = list(range(2, K.ndim))
        first = axes[: _axes_of_first(len(axes), scheme)]
        second = axes[len(first) :]
        m = math.prod(K.shape[axis] for axis in (0, *second))
        return K.permute(0, *second, 1, *first).reshape(m, K.numel() // m)

    def from_matrix(self, W: Tensor) -> Tensor:
        first, second = self._kernel_sizes()
        K = W.reshape(self.out_channels, *second, self.in_channels, *first)
        at_C = 1 + len(second)
        axes = (0, at_C, *range(at_C + 1, K.ndim), *range(1, at_C))
        return self._channels_first(K.permute(axes))

    def _axes(self) -> int:
        return _axes_of_first(len(self.kernel_size), self.scheme)

    def _kernel_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The sizes of the kernel along the axes of the first and of the second convolution."""
        return self.kernel_size[: self._axes()], self.kernel_size[self._axes() :]

    def kernels(self) -> tuple[Tensor, Tensor]:
        """The two kernels, views of ``V`` and ``U`` in torch's layout: C -> r and r -> N."""
        (a, b), N, r = self._kernel_sizes(), self.out_channels, self.rank
        first = self.V.mT.reshape(r, self.in_channels, *a, *(1 for _ in b))
        ones = [1 for _ in a]
        if b:
            second = self.U.reshape(N, *b, *ones, r)
            at_r = second.ndim - 1
            second = second.permute(0, at_r, *range(1 + len(b), at_r), *range(1, 1 + len(b)))
        else:
            second = self.U.reshape(N, r, *ones)
        return self._channels_first(first), self._channels_first(second)

    def expansion(self) -> Tensor:
        """The kernel of the second convolution, multiplied by ``diag(s)``.

        ``s`` is multiplied into the kernel, not into the map: that takes a product for each entry
        of the kernel in place of one for each pixel, and no copy of the map."""
        second = self._channels_first(self.kernels()[1])
        second = self._channels_first(second * self.s.reshape(-1, *(1 for _ in self.kernel_size)))
        # In double precision torch's own CPU kernel refuses this layout backward.
        return second.contiguous() if second.dtype == torch.float64 else second

    def output_directions(self) -> Tensor:
        return self.U.reshape(self.out_channels, -1)

    # --- settings -------------------------------------------------------------------------------

    def split(
        self, value: tuple[int, ...], neutral: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A setting by axis, split between the first and the second convolution."""
        k = self._axes()
        rest = len(value) - k
        return (*value[:k], *[neutral] * rest), (*[neutral] * k, *value[k:])

    def paddings(self) -> tuple[str | tuple[int, ...], str | tuple[int, ...]]:
        """Padding of the first and of the second convolution: numbers, or ``"same"`` where there is
        more padding after than before."""
        if self.padding == "valid":
            return self.split((0,) * len(self.kernel_size), 0)
        if self.padding == "same":
            pairs = zip(self.dilation, self.kernel_size, strict=True)
            first, second = self.split(tuple(d * (k - 1) for d, k in pairs), 0)
            return _half(first), _half(second)
        return self.split(cast("tuple[int, ...]", self.padding), 0)

    def first_settings(self) -> tuple[Any, Any, Any]:
        """Stride, padding and dilation of the first convolution."""
        dilation = self.split(self.dilation, 1)[0]
        return self.split(self.stride, 1)[0], self.paddings()[0], dilation

    def second_settings(self) -> tuple[Any, Any, Any]:
        """Stride, padding and dilation of the second convolution."""
        dilation = self.split(self.dilation, 1)[1]
        return self.split(self.stride, 1)[1], self.paddings()[1], dilation

    # --- forward --------------------------------------------------------------------------------

    def reduce(self, x: Tensor) -> Tensor:
        """The first convolution: ``x`` (B, C, *space) to (B, r, *space)."""
        return type(self).convolve(x, self.kernels()[0], None, *self.first_settings())

    def expand(self, z: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
        """The second convolution, of ``z`` (B, r, *space) with the kernel ``second``."""
        return type(self).convolve(z, second, bias, *self.second_settings())

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.reduce(x), self.expansion(), self.bias)

    # --- dense layers ---------------------------------------------------------------------------

    def dense(self) -> nn.Module:
        settings = (self.stride, self.padding, self.dilation)
        return self._layer(self.merged_weight(), self.bias, settings)

    def pair(self) -> tuple[nn.Module, nn.Module]:
        return (
            self._layer(self.kernels()[0], None, self.first_settings()),
            self._layer(self.expansion(), self.bias, self.second_settings()),
        )

    def _layer(
        self, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...], **more: Any
    ) -> nn.Module:
        stride, padding, dilation = settings
        N, C, *kernel = self._channels_first(weight).shape
        return plain_layer(
            weight, bias, self.module, C, N, tuple(kernel), stride, padding,
            dilation=dilation, bias=bias is not None, **more,
        )  # fmt: skip

    def macs(self, x: Sequence[int] = (), y: Sequence[int] = ()) -> tuple[int, int]:
        m, n, k = len(self.U), len(self.V), self._axes()
        inputs, outputs = (x[2:], y[2:]) if x else (self.stride, (1,) * len(self.stride))
        # The map between the two convolutions is strided along the axes of the first alone.
        between, out = math.prod(outputs[:k]) * math.prod(inputs[k:]), math.prod(outputs)
        return between * n + out * m, out * m * n

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, rank={self.rank}, "
            f"scheme={self.scheme}, bias={self.bias is not None}"
        )


class FactoredTransposedConvolution(FactoredConvolution):
    """A transposed convolution with a factored kernel (C, N, *kernel); see the text of the module.

    Each of the two is a transposed convolution that enlarges the map along its own axes.
    """

    def _take_settings(self, like: nn.Module) -> None:
        super()._take_settings(like)
        self.output_padding = cast("tuple[int, ...]", like.output_padding)

    @staticmethod
    def _channels_first(K: Tensor) -> Tensor:
        return K.transpose(0, 1)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        first, second = self.split(self._paddings_for(x, output_size), 0)
        convolve = type(self).convolve
        stride, padding, dilation = self.first_settings()
        z = convolve(x, self.kernels()[0], None, stride, padding, first, 1, dilation)
        stride, padding, dilation = self.second_settings()
        return convolve(z, self.expansion(), self.bias, stride, padding, second, 1, dilation)

    def _paddings_for(self, x: Tensor, output_size: Sequence[int] | None) -> tuple[int, ...]:
        """``output_padding``, or the one that gives an output of the size asked for."""
        if output_size is None:
            return self.output_padding
        settings = (self.stride, cast("tuple[int, ...]", self.padding), self.dilation)
        least = [
            (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
            for size, kernel, stride, padding, dilation in zip(
                x.shape[2:], self.kernel_size, *settings, strict=True
            )
        ]
        wanted = tuple(output_size)[-len(least) :]
        more = tuple(w - n for w, n in zip(wanted, least, strict=True))
        if any(not 0 <= p < max(s, 1) for p, s in zip(more, self.stride, strict=True)):
            most = [n + s - 1 for n, s in zip(least, self.stride, strict=True)]
            raise ValueError(
                f"output_size must be between {least} and {most} for an input of shape "
                f"{tuple(x.shape)}, got {list(output_size)}"
            )
        return more

    def dense(self) -> nn.Module:
        settings = (self.stride, self.padding, self.dilation)
        weight, more = self.merged_weight(), self.output_padding
        return self._layer(weight, self.bias, settings, output_padding=more)

    def pair(self) -> tuple[nn.Module, nn.Module]:
        a, b = self.split(self.output_padding, 0)
        first, second, bias = self.kernels()[0], self.expansion(), self.bias
        return (
            self._layer(first, None, self.first_settings(), output_padding=a),
            self._layer(second, bias, self.second_settings(), output_padding=b),
        )

    def macs(self, x: Sequence[int] = (), y: Sequence[int] = ()) -> tuple[int, int]:
        m, n, k = len(self.U), len(self.V), self._axes()
        inputs, outputs = (x[2:], y[2:]) if x else ((1,) * len(self.stride), self.stride)
        # A transposed convolution multiplies each pixel that it reads.
        into, between = math.prod(inputs), math.prod(outputs[:k]) * math.prod(inputs[k:])
        return into * n + between * m, into * m * n


def _axes_of_first(axes: int, scheme: Scheme) -> int:
    """How many axes of the kernel the first convolution has."""
    return axes // 2 if scheme == "spatial" else axes


def _half(total: tuple[int, ...]) -> str | tuple[int, ...]:
    """The padding on each side if ``total``, by axis, can be halved, else ``"same"``."""
    return "same" if any(n % 2 for n in total) else tuple(n // 2 for n in total)


# --- one for each dense type --------------------------------------------------------------------


class SVDConv1d(FactoredConvolution, dense=nn.Conv1d):
    """``nn.Conv1d`` with a factored kernel."""

    convolve, module = F.conv1d, nn.Conv1d


class SVDConv2d(FactoredConvolution, dense=nn.Conv2d):
    """``nn.Conv2d`` with a factored kernel."""

    convolve, module = F.conv2d, nn.Conv2d


class SVDConv3d(FactoredConvolution, dense=nn.Conv3d):
    """``nn.Conv3d`` with a factored kernel."""

    convolve, module = F.conv3d, nn.Conv3d


class SVDConvTranspose1d(FactoredTransposedConvolution, dense=nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with a factored kernel."""

    convolve, module = F.conv_transpose1d, nn.ConvTranspose1d


class SVDConvTranspose2d(FactoredTransposedConvolution, dense=nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a factored kernel."""

    convolve, module = F.conv_transpose2d, nn.ConvTranspose2d


class SVDConvTranspose3d(FactoredTransposedConvolution, dense=nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with a factored kernel."""

    convolve, module = F.conv_transpose3d, nn.ConvTranspose3d
