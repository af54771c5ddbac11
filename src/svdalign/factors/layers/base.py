"""What all factored layers have in common: the weight is ``W = U diag(s) V^T``, and training never
forms the dense ``W``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..stale import note_new_rank
from ._read_only import MESSAGE, read_only

Scheme = Literal["spatial", "channel"]
SCHEMES: tuple[str, ...] = get_args(Scheme)

#: Dtypes in which torch multiplies matrices and differentiates the product.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


#: The factored type for each dense type, by the dotted name of the dense one.
REGISTERED: dict[str, type[FactoredLayer]] = {}


def dotted(kind: type) -> str:
    """The name of a type with its module's."""
    return f"{kind.__module__}.{kind.__qualname__}"


def svd_factors(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``rank`` singular triplets of ``W`` (m, n), rescaled to keep ``||W||_F``.

    Returns ``U (m, r), s (r,), V (n, r)``. Cutting drops energy; one common factor on ``s``
    restores the norm, and with it the scale of activations at initialisation. Raises ValueError for
    a ``W`` that is complex, has no values or has some that are not finite."""
    if W.dtype not in _DTYPES:
        raise ValueError(f"W must be of a real floating dtype, one of {_DTYPES}, got {W.dtype}")
    try:
        finite = bool(W.isfinite().all())
    except RuntimeError:  # no test for meta tensors, as estimates of costs answer for these
        raise ValueError(f"W must have values, got a tensor on the {W.device} device") from None
    if not finite:
        raise ValueError(f"W must be finite, got {int((~W.isfinite()).sum())} NaN or infinite")
    # In double precision, so that full rank gives the same function; it happens once a layer.
    A, sigma, Bt = torch.linalg.svd(W.detach().double(), full_matrices=False)
    s = sigma[:rank]
    kept, whole = torch.linalg.vector_norm(s), torch.linalg.vector_norm(sigma)
    if kept > 0:
        s = s * (whole / kept)
    U, V = A[:, :rank], Bt[:rank].mT
    return U.to(W.dtype).contiguous(), s.to(W.dtype), V.to(W.dtype).contiguous()


class FactoredLayer(nn.Module):
    """A linear map with the weight ``U diag(s) V^T``, plus a bias. :func:`svdalign.factorize` and
    :meth:`from_dense` make one from a dense layer, whose weight the subclass turns into a matrix
    (m, n).

    Args:
        U: (m, r), with orthonormal columns.
        s: (r,).
        V: (n, r), with orthonormal columns.
        bias: (out,), or None.
        like: a dense or factored layer whose settings, such as strides, it gets.
        scheme: how a kernel becomes a matrix, "channel" or "spatial"; no matter for linear layers.

    A subclass names its dense type, ``class SVDLinear(FactoredLayer, dense=nn.Linear)``, or, if
    that is of a library which need not be installed, its dotted name,
    ``dense="package.module.Class"``. That registers it (:mod:`svdalign.factors.registry`). It
    defines :meth:`to_matrix`,
    :meth:`from_matrix`, :meth:`forward`, :meth:`dense`, :meth:`pair` and ``channels_last``; where
    they differ from those of a linear layer also :meth:`output_directions`, :meth:`macs`,
    :meth:`is_pointwise` and :meth:`refusal`.
    """

    #: Whether channels are the last axis of the output; else the second.
    channels_last: ClassVar[bool]
    #: Whether the layer is affine in its input, so that errors can go back through another layer of
    #: the same shape.
    affine: ClassVar[bool] = True
    #: ``U`` and ``V`` are to be kept orthonormal.
    orthonormal: ClassVar[bool] = True

    U: nn.Parameter
    s: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None

    def __init_subclass__(cls, dense: type[nn.Module] | str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if dense is not None:
            REGISTERED[dense if isinstance(dense, str) else dotted(dense)] = cls

    def __init__(
        self,
        U: Tensor,
        s: Tensor,
        V: Tensor,
        bias: Tensor | None,
        *,
        like: nn.Module,
        scheme: Scheme = "channel",
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self._take_settings(like)
        self.set_factors(U, s, V)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach().clone())
        )

    def _take_settings(self, like: nn.Module) -> None:
        """Copy the settings, such as strides, of ``like``, a dense or factored layer."""

    # --- from and to dense layers ---------------------------------------------------------------

    @classmethod
    def from_dense(cls, layer: nn.Module, rank: int, scheme: Scheme = "channel") -> Self:
        """A layer with the factors of the weight of ``layer``, reshaped to a matrix by ``scheme``
        and cut to ``rank`` (see :func:`svd_factors`).

        Raises ValueError for an unknown scheme, for a layer that :meth:`refusal` says cannot be
        factored, and for a weight with entries that are not finite.
        """
        if scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
        if reason := cls.refusal(layer):
            raise ValueError(f"{type(layer).__name__} cannot be factored: {reason}")
        weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
        U, s, V = svd_factors(cls.to_matrix(weight, scheme), rank)
        return cls(U, s, V, bias, like=layer, scheme=scheme)

    @classmethod
    def refusal(cls, layer: nn.Module) -> str:
        """Why ``layer`` cannot be factored; an empty string if it can."""
        weight = layer._parameters.get("weight")
        if parametrize.is_parametrized(layer, "weight") or weight is None:
            return "its weight is computed from other parameters"
        if REGISTERED.get(dotted(type(layer))) is not cls:
            return f"a subclass ({type(layer).__name__}) may not be what its base computes"
        if weight.numel() == 0:
            return "its weight is empty"
        if weight.dtype not in _DTYPES:
            return f"its weight is of dtype {weight.dtype}"
        return ""

    @classmethod
    def is_pointwise(cls, layer: nn.Module) -> bool:
        """Whether the dense ``layer`` maps every position by itself, as a classifier does."""
        return True

    @staticmethod
    def to_matrix(weight: Tensor, scheme: Scheme) -> Tensor:
        """The matrix (m, n) of a dense layer's ``weight``."""
        raise NotImplementedError

    def from_matrix(self, W: Tensor) -> Tensor:
        """The dense layer's weight whose matrix is ``W`` (m, n), the inverse of
        :meth:`to_matrix`."""
        raise NotImplementedError

    def dense(self) -> nn.Module:
        """The dense layer of the same function, of the dense type."""
        raise NotImplementedError

    def single(self) -> nn.Module:
        """:meth:`dense`, as a layer of torch's own."""
        return self.dense()

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """The layer as two dense layers of torch's own, with ``s`` merged into the second."""
        raise NotImplementedError

    def plain(self) -> nn.Module:
        """The layer as modules of torch's own: :meth:`pair` in an ``nn.Sequential``, or
        :meth:`single` if that takes no more multiply-accumulates."""
        of_direction, of_dense = self.macs()
        return nn.Sequential(*self.pair()) if self.rank * of_direction < of_dense else self.single()

    def macs(self, x: Sequence[int] = (), y: Sequence[int] = ()) -> tuple[int, int]:
        """Multiply-accumulates for each direction of the factors, and for the dense matrix.

        They are for one sample of an input of shape ``x`` and an output of shape ``y`` (batch axis
        included), without these for one position of a large map; only their ratio counts.
        """
        m, n = len(self.U), len(self.V)
        return m + n, m * n

    # --- factors --------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def set_factors(self, U: Tensor, s: Tensor, V: Tensor) -> None:
        """Replace the factors' values, of a new rank if ``s`` is of another length.

        The ``Parameter`` objects stay the same, so that optimizers and schedulers that refer to
        them go on; their gradients are dropped. Raises ValueError for factors that are not of
        shapes (m, r), (r,), (n, r), for a rank below 1 or above min(m, n), and for another m or n.
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
                if parameter.shape != value.shape:
                    note_new_rank(parameter)
                # A graph that is still alive keeps autograd's accumulator for this parameter, which
                # remembers the old shape. Torch drops it only when the dtype changes.
                other = torch.float32 if value.dtype == torch.float64 else torch.float64
                parameter.data = torch.empty(0, dtype=other, device=value.device)
                parameter.data = value

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take the rank of the factors in ``state_dict``, then their values."""
        s = state_dict.get(f"{prefix}s")
        if isinstance(s, Tensor) and s.ndim == 1 and 1 <= len(s) <= self.full_rank:
            r = len(s)
            if r != self.rank:
                U, V = self.U.new_zeros(len(self.U), r), self.V.new_zeros(len(self.V), r)
                self.set_factors(U, self.s.new_zeros(r), V)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def rank(self) -> int:
        """Current rank r."""
        return self.s.numel()

    @property
    def full_rank(self) -> int:
        """min(m, n): the rank at which nothing is lost."""
        return min(self.U.shape[0], self.V.shape[0])

    def matrix(self) -> Tensor:
        """The dense matrix ``U diag(s) V^T``, (m, n); for export and tests, not for training."""
        return (self.U * self.s) @ self.V.mT

    def merged_weight(self) -> Tensor:
        """The dense weight in torch's layout, computed from the factors each time."""
        return self.from_matrix(self.matrix())

    def output_directions(self) -> Tensor:
        """A matrix (out, q) whose columns span all that the layer can put out, by channel."""
        return self.U

    @property
    def weight(self) -> Tensor:
        """:meth:`merged_weight`, for code that reads a layer's weight instead of calling the layer
        (a tied decoder, for one). Gradients reach the factors through it.

        It cannot be written to: assigning raises AttributeError, changing it in place RuntimeError.
        """
        return read_only(self.merged_weight())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(MESSAGE)
        super().__setattr__(name, value)


def factored_layers(model: nn.Module, *, every_name: bool = False) -> dict[str, FactoredLayer]:
    """The factored layers of ``model`` by name: each once, or with ``every_name`` under every name
    that it has."""
    named = model.named_modules(remove_duplicate=not every_name)
    return {name: module for name, module in named if isinstance(module, FactoredLayer)}


def break_even_rank(m: int, n: int) -> int:
    """The largest rank whose factors hold fewer numbers than the dense matrix: r (m+n+1) < m n."""
    return math.ceil(m * n / (m + n + 1)) - 1


def check_rank(name: str, rank: object, more: str = "") -> None:
    """TypeError or ValueError unless ``rank`` is a fraction of full rank or a whole number.
    ``more``: what else the argument ``name`` may be."""
    must = (
        f"{name} must be a fraction in (0, 1] or a whole number of at least 1{more}, got {rank!r}"
    )
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise TypeError(must)
    if not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise ValueError(must)


def absolute_rank(rank: int | float, full: int) -> int:
    """``rank`` as a number, at most ``full``: a whole number as it is, a fraction in (0, 1] of
    ``full`` rounded up."""
    return min(full, rank) if isinstance(rank, int) else max(1, math.ceil(rank * full - 1e-9))


def plain_layer(
    weight: Tensor, bias: Tensor | None, make: Callable[..., nn.Module], /, *args: Any, **named: Any
) -> nn.Module:
    """``make(*args, **named)`` with copies of ``weight`` and ``bias`` as its parameters.

    It is made on the meta device, so that no initial values are drawn and the random state stays
    the same.
    """
    with torch.device("meta"):
        layer = make(*args, **named)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(layer, name, nn.Parameter(value.detach().contiguous().clone()))
    return layer
