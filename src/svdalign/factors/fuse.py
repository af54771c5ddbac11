"""A factored convolution fused with the batch norm, activation and pooling that follow it.

In the channel scheme a convolution ends in ``y = W z + b``, ``z`` (B, r, h, w) a map of only ``r``
channels, ``W = U diag(s)`` (N, r). Two things follow, and both are exact:

- The batch statistics that a norm takes of ``y`` are those of ``z`` seen through ``W``: mean
  ``W mean(z) + b``, variance ``diag(W cov(z) W^T)``. The norm becomes a change of ``W`` and ``b``,
  and the map that it would read, of ``N`` channels, need not exist.
- What is left, ``W z + b``, activation, pooling, treats every sample by itself, so it runs for some
  samples at a time. Held is ``z``, and where a ReLU's output is pooled, that and the places of the
  maxima; what else the backward pass needs is made again, for those who come after as well
  (:mod:`svdalign._saved`).

A training step so holds ``r`` channels of full resolution where it held ``2 N`` to ``3 N``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from .._autocast import outside_autocast, present_autocast
from .._copying import copied
from .._map_statistics import statistics
from .._saved import Held, by_parts, empty, hold, made_of, parts_of
from .._tracing import followers, substitute
from .layers import SVDConv2d

__all__ = ["FusedConv2d", "fuse"]

#: What treats every sample by itself, draws no random numbers and keeps no state.
PER_SAMPLE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.MaxPool2d, nn.AvgPool2d, nn.GroupNorm,
)  # fmt: skip


def fuse(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which factored convolutions take in what alone follows them.

    That is a batch norm (in the channel scheme), then activations, pooling and group norms, as far
    as they are modules of these types that the traced ``forward`` calls once; an ``nn.Identity`` is
    left in the place of each. The function is kept to rounding, training and evaluation alike, and
    a training step holds less: see the text of the module. Parameters keep their values; those of
    a norm that was taken in go by the name of its convolution: ``CONV.tail.0.weight``.

    Pooling that can shrink a map more than a 2 x 2 pooling does is not taken in, so that the units
    of layers end where they do without fusing. A unit that is to end amid what was taken in (a
    block whose pooling stands outside it) ends after it.

    To be called before a learner or an optimizer is made. Where nothing can be fused the copy is
    like ``model``, and a UserWarning says why. Raises ValueError for a model whose ``forward``
    cannot be traced (control flow that depends on the data).
    """
    fused = fuse_where_possible(model)
    if not any(isinstance(module, FusedConv2d) for module in fused.modules()):
        warnings.warn(f"nothing was fused: {_why_not(fused)}", stacklevel=2)
    return fused


def _why_not(model: nn.Module) -> str:
    layers = [m for m in model.modules() if isinstance(m, SVDConv2d)]
    if not layers:
        return "model has no factored convolution; svdalign.factorize makes them"
    normed = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    if normed and any(layer.scheme == "spatial" for layer in layers):
        return (
            "in the spatial scheme a convolution takes in no batch norm; "
            'svdalign.factorize(model, scheme="channel") makes convolutions that do'
        )
    return (
        "no factored convolution is followed, and by that alone, by a module that it can take in, "
        "such as a batch norm, an activation or a small pooling"
    )


def fuse_where_possible(model: nn.Module) -> nn.Module:
    """:func:`fuse` without a word where there is nothing to fuse."""
    model = copied(model)
    leaf = (SVDConv2d,)
    try:
        follows = followers(model, leaf)
    except Exception as error:  # tracing runs the user's own code on stand-ins
        raise ValueError(
            f"model cannot be fused, as its forward cannot be traced: {error}"
        ) from error
    replaced: dict[nn.Module, nn.Module] = {}
    for path in follows:
        layer = model.get_submodule(path)
        if type(layer) is not SVDConv2d:
            continue
        tail: list[nn.Module] = []
        for module in _chain(model, follows, path):
            norm = type(module) is nn.BatchNorm2d and not tail and layer.scheme == "channel"
            if not (norm or _can_be_taken_in(module)):
                break
            tail.append(module)
        if tail:
            replaced |= {layer: FusedConv2d(layer, tail)}
            replaced |= {module: nn.Identity() for module in tail}
    substitute(model, replaced, leaf)
    return model


def _can_be_taken_in(module: nn.Module) -> bool:
    if isinstance(module, nn.MaxPool2d) and module.return_indices:
        return False
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and not _shrinks_little(module):
        return False
    return type(module) in PER_SAMPLE


def _shrinks_little(pool: nn.MaxPool2d | nn.AvgPool2d) -> bool:
    """Whether of a map of any size, n along an axis, at least ``n // 2`` are left: then a unit goes
    on (:mod:`svdalign.engine.units`)."""
    by_axis = (pool.kernel_size, pool.stride, pool.padding, getattr(pool, "dilation", 1))
    return all(
        stride <= 2 and dilation * (kernel - 1) <= 2 * padding + 1
        for kernel, stride, padding, dilation in zip(*map(_pair, by_axis), strict=True)
    )


def _chain(model: nn.Module, follows: dict[str, str], path: str) -> Iterator[nn.Module]:
    while path in follows:
        path = follows[path]
        yield model.get_submodule(path)


class FusedConv2d(SVDConv2d):
    """``layer``, a factored convolution, and ``tail``, the modules that follow it.

    Takes over the parameters of ``layer``. In evaluation it is nothing but ``layer`` and then
    ``tail``; see the text of the module for training. Input (B, C, h, w).
    """

    affine = False

    def __init__(self, layer: SVDConv2d, tail: list[nn.Module]) -> None:
        U, s, V = (t.to("meta") for t in (layer.U, layer.s, layer.V))  # no copies of the values
        super().__init__(U, s, V, None, like=cast(Any, layer), scheme=layer.scheme)
        for name in ("U", "s", "V", "bias"):  # the very objects: frozen ones stay frozen
            self.register_parameter(name, layer._parameters[name])
        self.tail = nn.Sequential(*tail)
        self.training = layer.training  # and what is in the tail keeps its own mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return cast(Tensor, self.tail(super().forward(x)))
        z, second, tail = _reduce(self, x), self.expansion(), list(self.tail)
        bias: Tensor | None = self.bias
        if isinstance(norm := tail[0], nn.BatchNorm2d):
            kernel, bias = _norm(norm, z, second[:, :, 0, 0], bias)
            second, tail = kernel[:, :, None, None], tail[1:]
        kinds = [type(module) for module in tail]
        if not kinds:
            return self.expand(z, second, bias)
        even = not isinstance(self.paddings()[1], str)
        if even and kinds in ([nn.ReLU], [nn.ReLU, nn.MaxPool2d]):
            pool = tail[1] if len(tail) > 1 else None
            return cast(Tensor, _Rectified.apply(self, pool, z, second, bias))  # type: ignore[no-untyped-call]
        rest = nn.Sequential(*tail)
        weights = (second, bias, *rest.parameters())
        return cast(Tensor, _Recomputed.apply(self, rest, z, *weights))  # type: ignore[no-untyped-call]

    def plain(self) -> nn.Module:
        return nn.Sequential(super().plain(), *self.tail)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fused"


# --- batch norm as a change of weights ----------------------------------------------------------


def _norm(norm: nn.BatchNorm2d, z: Tensor, W: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight (N, r) and bias (N,) whose ``W z + b`` is ``norm`` of that of ``W`` and ``bias``.
    Found in at least single precision, returned in that of ``W``.

    Takes notice of the batch in the running statistics as ``norm`` would.
    """
    dtype, W = W.dtype, W.to(statistics(W.dtype))
    shift = W.new_zeros(len(W)) if bias is None else bias
    if norm.training or norm.running_mean is None:
        count = z.numel() // z.shape[1]
        if count <= 1:
            raise ValueError(
                "batch norm needs more than one value per channel in training, "
                f"got a map of shape {tuple(z.shape)}"
            )
        with outside_autocast():  # variances do not bear rounding
            mean_z, cov_z = _Moments.apply(z)  # type: ignore[no-untyped-call]
            centre = W @ mean_z
            variance = ((W @ cov_z) * W).sum(1).clamp_min(0.0)
        if norm.training and norm.running_mean is not None:
            _take_notice(norm, (centre + shift).detach(), variance.detach(), count)
        offset = centre + 0.0 * shift  # a bias before a norm has no effect, but a gradient: zero
    else:
        assert norm.running_var is not None
        offset, variance = norm.running_mean - shift, norm.running_var.to(W.dtype)
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    start = 0.0 if norm.bias is None else norm.bias
    return (W * scale[:, None]).to(dtype), (start - scale * offset).to(dtype)


@torch.no_grad()
def _take_notice(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    share: float | Tensor = (
        1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    )
    norm.running_mean += share * (mean - norm.running_mean)
    norm.running_var += share * (variance * (count / (count - 1)) - norm.running_var)


class _Moments(torch.autograd.Function):
    """Mean (r,) and covariance (r, r), dividing by their number, of the positions of ``z``
    (B, r, h, w); at least in single precision. Holds ``z`` alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        count, dtype = z.numel() // z.shape[1], statistics(z.dtype)
        parts = [z[rows] for rows in parts_of(z)]  # copies of them are small
        mean = torch.stack([_rows(part).to(dtype).sum(0) for part in parts]).sum(0) / count
        cov = mean.new_zeros(len(mean), len(mean))
        for part in parts:
            # Centred before the products: large squares would lose digits.
            centred = _rows(part).to(dtype, copy=True).sub_(mean)
            cov.addmm_(centred.mT, centred)
            del centred  # before the next is made
        ctx.save_for_backward(z, mean)
        return mean, cov / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean: Tensor, d_cov: Tensor) -> Tensor:
        z, mean = ctx.saved_tensors
        rows = _rows(z)
        slope = (d_cov + d_cov.mT) / len(rows)
        start = d_mean / len(rows) - mean @ slope
        dz = torch.addmm(start.to(z.dtype), rows, slope.to(z.dtype))
        B, _, h, w = z.shape
        return dz.reshape(B, h, w, -1).permute(0, 3, 1, 2)


def _rows(z: Tensor) -> Tensor:
    """The positions of a map, (B h w, r): a view of one that is held channels last."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


# --- some samples at a time ---------------------------------------------------------------------


def _reduce(layer: FusedConv2d, x: Tensor) -> Tensor:
    """The first convolution, (B, r, h, w)."""
    if isinstance(layer.paddings()[0], str):  # uneven, which its gradient does not know of
        return layer.reduce(x)
    return cast(Tensor, _Reduced.apply(layer, x, layer.kernels()[0]))  # type: ignore[no-untyped-call]


class _Reduced(torch.autograd.Function):
    """First convolution. Holds what its input is made of, if that is known, and makes the input
    again where the weights' gradient asks for it."""

    @staticmethod
    def forward(ctx: Any, layer: FusedConv2d, x: Tensor, first: Tensor) -> Tensor:
        held = hold(x)
        ctx.layer, ctx.held = layer, held.without_tensors()
        ctx.save_for_backward(first, *held.tensors)
        return layer.reduce(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, *tensors = ctx.saved_tensors
        held: Held = ctx.held
        stride, padding, dilation = ctx.layer.first_settings()
        for_x, for_first = (
            needed and _asked_for(node)
            for needed, (node, _) in zip(ctx.needs_input_grad[1:], ctx.next_functions, strict=True)
        )
        kernel = first.to(grad.dtype)

        def run(rows: slice) -> tuple[Tensor | None, ...]:
            # For the signal alone the input's shape is enough.
            x = (held.of if for_first else held.like)(rows, tensors).to(grad.dtype)
            dx, dW, _ = torch.ops.aten.convolution_backward(
                grad[rows], x, kernel, None, stride, padding, dilation, False, [0, 0], 1,
                [for_x, for_first, False],
            )  # fmt: skip
            return None if dx is None else dx.to(held.dtype), dW

        return None, *_gradients_by_parts(run, held.parts, [for_x, for_first])


class _Rectified(torch.autograd.Function):
    """Second convolution, ReLU and, if ``pool`` is given, max pooling. Holds ``z`` and, of pooled
    maps, the output and the places of the maxima."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: FusedConv2d,
        pool: nn.MaxPool2d | None,
        z: Tensor,
        second: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        places: list[Tensor] = []
        window = [] if pool is None else _settings(pool)

        def run(part: Tensor) -> Tensor:
            y = layer.expand(part, second, bias).relu_()
            ctx.shape = y.shape[1:]
            if pool is None:
                return y
            y, place = F.max_pool2d(y, *window, return_indices=True)
            if not places:
                ctx.corners, ctx.narrow = _corners(window, ctx.shape[-1], place)
            places.append((place - ctx.corners).to(ctx.narrow))
            return y

        parts = parts_of(z, len(second))
        out = by_parts(lambda rows: run(z[rows]), parts)
        if pool is None and z.numel() < out.numel():
            weights = (second,) if bias is None else (second, bias.clone())  # it may be a parameter
            made_of(out, _rectified_again(layer), (z, *weights), parts)
        held = hold(out)
        ctx.layer, ctx.window, ctx.held = layer, window, held.without_tensors()
        ctx.save_for_backward(z, second, *places, *held.tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, second, *saved = ctx.saved_tensors
        second, window, held = second.to(z.dtype), ctx.window, ctx.held
        stride, padding, dilation = ctx.layer.second_settings()
        parts = parts_of(z, len(second))
        places, tensors = (saved[: len(parts)], saved[len(parts) :]) if window else ([], saved)
        wanted = _wanted(ctx)
        full = empty((parts[0].stop, *ctx.shape), like=grad) if window else grad

        def run(part: slice) -> tuple[Tensor | None, ...]:
            out = held.of(part, tensors)
            g = torch.ops.aten.threshold_backward(grad[part], out, 0)
            if window:
                like = full[: len(g)]  # of the pooling's input the shape is read alone
                place = ctx.corners + places[part.start // parts[0].stop]
                g = torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
                    g, like, *window, place, grad_input=like
                )
                del place  # before the next is made
            found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
                g, z[part], second, [len(second)], stride, padding, dilation, False, [0, 0], 1,
                wanted,
            )  # fmt: skip
            return found

        return None, None, *_gradients_by_parts(run, parts, wanted)


class _Recomputed(torch.autograd.Function):
    """Second convolution and any ``tail``. Holds ``z`` and the weights, and computes the rest again
    in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: FusedConv2d,
        tail: nn.Sequential,
        z: Tensor,
        second: Tensor,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.layer, ctx.tail = layer, tail
        ctx.autocast = present_autocast()
        ctx.save_for_backward(z, second, bias)
        parts = parts_of(z, len(second))
        return by_parts(lambda rows: tail(layer.expand(z[rows], second, bias)), parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, second, bias = ctx.saved_tensors
        z, second, bias = z.detach(), second.detach(), None if bias is None else bias.detach()
        weights = (second, bias, *ctx.tail.parameters())
        wanted = _wanted(ctx)
        inputs = [w.requires_grad_() for w, want in zip(weights, wanted[1:], strict=True) if want]

        def run(rows: slice) -> Iterator[Tensor | None]:
            part = z[rows].requires_grad_(wanted[0])
            with torch.enable_grad(), ctx.autocast():
                out = ctx.tail(ctx.layer.expand(part, second, bias))
            found = iter(torch.autograd.grad(out, [part] * wanted[0] + inputs, grad[rows]))
            return (next(found) if want else None for want in wanted)

        return None, None, *_gradients_by_parts(run, parts_of(z, len(second)), wanted)


def _rectified_again(layer: FusedConv2d) -> Callable[..., Tensor]:
    def samples(rows: slice, z: Tensor, second: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.to(z.dtype)
        return layer.expand(z[rows], second.to(z.dtype), bias).relu_()

    return samples


def _gradients_by_parts(
    run: Callable[[slice], Iterable[Tensor | None]], parts: list[slice], wanted: list[bool]
) -> list[Tensor | None]:
    """Gradients of a map, put together, and of weights, summed, from those that ``run`` finds for
    ``parts`` of the samples; None where none is wanted."""
    sums: list[Tensor | None] = [None] * len(wanted[1:])

    def one(rows: slice) -> Any:
        part, *found = run(rows)
        sums[:] = [_add(a, b) for a, b in zip(sums, found, strict=True)]
        return part

    if wanted[0]:
        return [by_parts(one, parts), *sums]
    for rows in parts:
        one(rows)
    return [None, *sums]


def _wanted(ctx: Any) -> list[bool]:
    """Which gradients, of ``z``, the second kernel, the bias and any further weights, this backward
    pass is for: of no weights where it only carries a signal upstream."""
    needed = ctx.needs_input_grad[2:]
    nodes = [node for node, _ in ctx.next_functions]
    if len(nodes) < len(needed):  # there is no bias: for None autograd has no entry
        nodes.insert(2, None)
    return [n and _asked_for(node) for n, node in zip(needed, nodes, strict=True)]


def _asked_for(node: Any) -> bool:
    """Whether the running backward pass goes on to ``node``, the source of a tensor that needs a
    gradient."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch's answer for a leaf that ``torch.autograd.grad`` is asked for
        return True


def _settings(pool: nn.MaxPool2d) -> list[Any]:
    """Kernel size, stride, padding, dilation, by axis, and ceil mode."""
    by_axis = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return [*map(_pair, by_axis), pool.ceil_mode]


def _corners(window: list[Any], width: int, place: Tensor) -> tuple[Tensor, torch.dtype]:
    """Where in a map of ``width`` the windows of a max pooling begin, (h, w) of its output, and a
    dtype for the way from there to a maximum: mostly a byte does."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), _ = window
    rows, columns = (torch.arange(n, device=place.device) for n in place.shape[-2:])
    corners = (rows * sh - ph)[:, None] * width + (columns * sw - pw)
    return corners, torch.uint8 if dh * (kh - 1) * width + dw * (kw - 1) < 256 else torch.int32


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sums of parts, in at least single precision."""
    if b is None:
        return a
    b = b if b.dtype == torch.float64 else b.float()
    return b if a is None else a.add_(b)
