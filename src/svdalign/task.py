"""The task: what the targets mean. Accuracy and alignment depend on it.

It is found once, from the network's output, the first batch of targets, and the loss. The loss may
be any function: it is called on small random outputs, on the CPU, to see which targets it accepts.
A loss for class indices accepts 0 to C - 1 and raises an error for C.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ._autocast import outside_autocast

Loss = Callable[[Tensor, Tensor], Tensor]

Kind = Literal["classes", "binary", "labels", "numbers", "other"]
KINDS: tuple[str, ...] = get_args(Kind)


def class_axis(shape: Sequence[int]) -> int:
    """The axis of classes in an output of ``shape``, by convention: 1 of (B, C, H, W) and
    (B, C, D, H, W), else the last."""
    return 1 if len(shape) > 3 else max(0, len(shape) - 1)


def width(shape: Sequence[int]) -> int:
    """The number of classes in an output of ``shape``, 1 for (B,)."""
    return Output(tuple(shape)).classes


@dataclass(frozen=True)
class Output:
    """A network's output: its ``shape`` for the example batch, and the ``axis`` of its classes, by
    default that of :func:`class_axis`. All further axes but the batch's are places: tokens, pixels,
    voxels."""

    shape: tuple[int, ...]
    axis: int = -1

    def __post_init__(self) -> None:
        if self.axis < 0:
            object.__setattr__(self, "axis", class_axis(self.shape))

    @property
    def classes(self) -> int:
        """The size of the axis of classes; 1 for (B,)."""
        return self.shape[self.axis] if len(self.shape) > 1 else 1

    @property
    def places(self) -> tuple[int, ...]:
        """Sizes of the axes of places."""
        return tuple(n for axis, n in enumerate(self.shape) if axis not in (0, self.axis))


@dataclass(frozen=True)
class Task:
    """What the targets of a network's ``output`` are.

    ``kind``: ``"classes"``, one class for each sample, token or pixel, as indices or as
    probabilities; ``"binary"``, yes or no by the sign of one logit; ``"labels"``, several labels a
    sample, each 0 or 1; ``"numbers"``, real values; ``"other"``, anything else, such as ids for a
    loss that compares samples. ``ignored``: class indices that the loss ignores. ``in_place``:
    whether the target at each position is for the output at that position, which it is not for a
    loss that shifts tokens itself.
    """

    kind: Kind
    output: Output
    ignored: tuple[int, ...] = ()
    in_place: bool = True

    def __str__(self) -> str:
        each = {3: "token", 4: "pixel", 5: "voxel"}.get(len(self.output_shape), "sample")
        text = {
            "classes": f"one of {self.classes} classes for each {each}",
            "binary": f"yes or no for each {each}",
            "labels": f"any of {self.classes} labels for each {each}",
            "numbers": f"{self.classes} real number{'s'[: self.classes > 1]} for each {each}",
            "other": "targets that only the loss understands",
        }[self.kind]
        return text + (f", classes {list(self.ignored)} ignored" if self.ignored else "")

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the network's output for the example."""
        return self.output.shape

    @property
    def classes(self) -> int:
        """The number of classes in the output."""
        return self.output.classes

    @property
    def one_class_a_sample(self) -> bool:
        """Whether each sample, as a whole, is of one class."""
        return self.kind == "classes" and len(self.output_shape) == 2

    def are_indices(self, y: Tensor) -> bool:
        """Whether these targets are class indices, not probabilities."""
        return self.kind == "classes" and _whole(y) and y.ndim + 1 == len(self.output_shape)

    def accuracy(self, z: Tensor, y: Tensor) -> Tensor | None:
        """Share of the targets ``y`` that the output ``z`` predicts correctly, 0-dim. Ignored
        targets do not count (NaN if all are ignored). None for a task without right and wrong."""
        if self.kind == "binary" and z.numel() == y.numel():
            return ((z.flatten() > 0) == (y.flatten() > 0)).float().mean()
        if not (self.are_indices(y) and self.in_place and z.ndim == y.ndim + 1):
            return None
        answers = z.argmax(self.output.axis)
        if answers.shape != y.shape:
            return None
        counted = self.counted(y)
        return ((answers == y) & counted).sum() / counted.sum()

    def counted(self, y: Tensor) -> Tensor:
        """Which class indices count. A loss that accepts an index outside [0, C - 1] ignores it."""
        counted = (y >= 0) & (y < self.classes)
        for index in self.ignored:
            counted = counted & (y != index)
        return counted

    def check_dtype(self, y: Tensor, loss: Loss, dtype: torch.dtype) -> None:
        """ValueError for targets of another dtype than the output's ``dtype`` where ``loss`` has a
        gradient only for that."""
        if self.kind == "classes" or y.dtype == dtype or y.ndim == 0:
            return
        z = torch.zeros(len(y), *self.output_shape[1:], dtype=dtype, device="cpu")
        loss = _on_cpu(loss)
        if not _takes(loss, z, y) and _takes(loss, z, y.to(dtype)):
            raise ValueError(f"y must be of {dtype} for this loss, got {y.dtype}: convert y to it")

    def check(self, y: Tensor, loss: Loss) -> None:
        """ValueError for targets ``y`` that ``loss`` does not accept. Reads their values."""
        if self.kind == "binary":
            low, high = (float(value) for value in y.aminmax())
            if low < 0 or high > 1:
                raise ValueError(
                    f"y must be 0 or 1 as in the first batch, got values in [{low:g}, {high:g}]; "
                    "give the learner task='numbers' or task='other' if the task is another one"
                )
        if self.kind != "classes":
            return
        C, shape, axis = self.classes, self.output_shape, self.output.axis

        def refuses(index: Tensor) -> bool:
            return not _takes(_on_cpu(loss), *_samples(self.output, index.reshape(1)))

        if self.are_indices(y):
            low, high = (int(value) for value in y.aminmax())
            if y.dtype != torch.int64 and refuses(y.new_zeros(())):
                raise ValueError(f"y must hold class indices (torch.int64), got {y.dtype}")
            if low < 0 or high >= C:
                odd = y[(y < 0) | (y >= C)].unique()  # type: ignore[no-untyped-call]
                if any(map(refuses, odd[:9])):
                    raise ValueError(
                        f"y must hold class indices in [0, {C - 1}], got values in [{low}, {high}]"
                        "; give the learner task='other' if y is no index into the output"
                        + f"; {FOR_TOKENS}"
                        * (len(shape) == 3 and axis == 1)
                    )
        elif y.ndim != len(shape) or y.shape[axis] != C:
            raise ValueError(
                "y must hold class indices (torch.int64), one axis less than the output's "
                f"{shape}, or probabilities of the output's shape, got {y.dtype} of shape "
                f"{tuple(y.shape)}"
            )
        elif _whole(y) and not _takes(_on_cpu(loss), torch.zeros(y[:2].shape), y[:2]):
            raise ValueError(
                f"y must hold class indices or probabilities, got one-hot {y.dtype}: give "
                f"y.argmax({axis}) or y.float()"
            )


def find_class_axis(loss: Loss, shape: Sequence[int], known: int) -> int:
    """The axis of classes in an output of ``shape``: the one for which ``loss`` accepts class
    indices, else ``known``, that of the network's last layer. ValueError if the two differ and are
    of the same size: the loss would run, but on the wrong axis."""
    loss = _on_cpu(loss)
    for axis in dict.fromkeys((known, 1, len(shape) - 1)) if len(shape) > 2 else ():
        output = Output(tuple(shape), axis)
        index = torch.zeros(1, dtype=torch.int64, device="cpu")
        if output.classes > 1 and _takes(loss, *_samples(output, index)):
            if axis != known and shape[axis] == shape[known]:
                where = "come last" if known == len(shape) - 1 else f"are in axis {known}"
                raise ValueError(
                    f"loss must be one for an output of shape {tuple(shape)}, whose classes {where}"
                    + f"; {FOR_TOKENS}" * (known == 2)
                )
            return axis
    return known


def find_task(loss: Loss, output: Output, y: Tensor, kind: Kind | None) -> Task:
    """The task of the targets ``y`` for ``output``; of ``kind`` if given."""
    C, axis, ndim, loss = output.classes, output.axis, len(output.shape), _on_cpu(loss)
    if kind is None:
        yes_or_no = bool(((y == 0) | (y == 1)).all())
        if _whole(y) and C > 1 and y.ndim + 1 == ndim:
            kind = "other" if _takes_indices(loss, output, y) is False else "classes"
        elif y.ndim == ndim and C > 1 and y.shape[axis] == C:
            distribution = bool((y >= 0).all()) and bool(((y.sum(axis) - 1).abs() < 1e-2).all())
            kind = "classes" if distribution else "labels" if yes_or_no else "numbers"
        elif C == 1 and yes_or_no and _is_binary(loss, output, y):
            kind = "binary"
        else:
            kind = "numbers" if y.is_floating_point() else "other"
    if kind != "classes":
        return Task(kind, output)
    return Task(kind, output, *_ignored_and_in_place(loss, output))


def _whole(y: Tensor) -> bool:
    return not (y.is_floating_point() or y.is_complex())


# --- what a loss takes --------------------------------------------------------------------------

#: What to write for classes of tokens.
FOR_TOKENS = (
    "for a class a token, "
    "loss=lambda z, y: torch.nn.functional.cross_entropy(z.flatten(0, 1), y.flatten())"
)

#: Up to so many classes each is tried, of more only a few.
_MANY = 256


def _takes_indices(loss: Loss, output: Output, y: Tensor) -> bool | None:
    """Whether ``loss`` accepts the class indices 0 to C - 1 and not C; None if it refuses even 0,
    which says nothing."""
    taken = [
        _takes(loss, *_samples(output, _like(y, index)))
        for index in (0, output.classes - 1, output.classes)
    ]
    return taken == [True, True, False] if taken[0] else None


def _ignored_and_in_place(loss: Loss, output: Output) -> tuple[tuple[int, ...], bool]:
    """The classes for which ``loss`` has no gradient, and whether all others give a gradient at the
    target's own position, at every position."""
    C = output.classes
    classes = range(C) if C <= _MANY else sorted({0, 1, 2, 3, *_ignore_index(loss, C), C - 1})
    indices = torch.tensor(list(classes), device="cpu")
    gradient = _gradient(loss, *_samples(output, indices))
    if gradient is None:
        return (), False
    by_class = gradient.movedim(output.axis, -1) if gradient.ndim > 1 else gradient[:, None]
    taught = by_class.ne(0).any(-1).reshape(len(gradient), -1)[: len(indices)]
    learned = taught.any(1)
    return tuple(indices[~learned].tolist()), bool(taught[learned].all())


def _ignore_index(loss: Loss, classes: int) -> set[int]:
    keywords = loss.keywords if isinstance(loss, functools.partial) else {}
    index = keywords.get("ignore_index", getattr(loss, "ignore_index", None))
    return {index} if isinstance(index, int) and 0 <= index < classes else set()


def _is_binary(loss: Loss, output: Output, y: Tensor) -> bool:
    """Whether ``loss`` pushes a logit up for the target 1 and down for 0, however large it is."""
    for logit in (-4.0, 4.0):
        for target, sign in ((0, 1), (1, -1)):
            z, targets = _samples(output, _like(y, target), y.ndim)
            gradient = _gradient(loss, z + logit, targets)
            if gradient is None or not bool((gradient * sign > 0).all()):
                return False
    return True


def _samples(
    output: Output, values: Tensor, target_ndim: int | None = None
) -> tuple[Tensor, Tensor]:
    """A small random output and its targets. Each sample has one of ``values`` as its target at all
    places; a single value is repeated. The numbers of samples, classes and places differ, so that a
    loss that mistakes one axis for another raises an error."""
    C = output.classes
    n = len(values) if len(values) > 1 else 3 if C == 2 else 2
    few = {1: 7 if C == 4 else 4, 2: 4, 3: 2}.get(len(output.places), 2)
    shape = [n, *[few] * len(output.places)]
    if len(output.shape) > 1:
        shape.insert(output.axis, C)
    generator = torch.Generator("cpu").manual_seed(0)
    z = 1e-3 * torch.randn(shape, generator=generator, device="cpu")
    y = values.cpu().reshape(-1, *[1] * (len(shape) - 1)).expand(n, *shape[1:])
    if target_ndim is None or target_ndim < len(shape):
        y = y.select(output.axis, 0)
    return z, y.contiguous()


def _like(y: Tensor, value: int) -> Tensor:
    """One target of the dtype of ``y``, on the CPU whatever the default device is."""
    return torch.tensor([value], dtype=y.dtype, device="cpu")


def _takes(loss: Loss, z: Tensor, y: Tensor) -> bool:
    return _gradient(loss, z, y) is not None


def _gradient(loss: Loss, z: Tensor, y: Tensor) -> Tensor | None:
    """Gradient of ``loss`` in ``z``, on the CPU; None if it does not take ``z`` and ``y``."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        outside_autocast(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        z.requires_grad_()
        try:
            (gradient,) = torch.autograd.grad(loss(z, y.cpu()), z)
        except Exception:  # the loss is the user's own: it can refuse in any way
            return None
    return gradient


def _on_cpu(part: Any) -> Any:
    """A loss, or a tensor that it was given, on the CPU in single precision. Modules are copied:
    losses can have statistics, which are not to change."""
    if isinstance(part, functools.partial):
        keywords = {name: _on_cpu(value) for name, value in part.keywords.items()}
        return functools.partial(_on_cpu(part.func), *map(_on_cpu, part.args), **keywords)
    if isinstance(part, nn.Module):
        return copy.deepcopy(part).cpu().float()
    if isinstance(part, Tensor):
        return part.detach().cpu().float() if part.is_floating_point() else part.cpu()
    return part
