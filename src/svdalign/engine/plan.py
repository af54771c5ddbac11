"""The plan of a model's units: where they end (:mod:`.cuts`) and what belongs to each
(:mod:`.ownership`)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._structures import leaves
from . import cuts
from .balance import balanced_ends, pieces_of
from .cuts import Call, Units
from .forward import evaluating
from .layout import AS_IT_IS, Layout, channel_axis, layout_of
from .ownership import Trial
from .units import OUTPUT, Feature, Plan, Unit


def make_plan(model: nn.Module, units: Units, example: Any, *, whole: bool = False) -> Plan:
    """Cut ``model`` into units and assign its parameters.

    ``units``: ``"layer"`` ends a unit after every layer with a weight matrix and the norm,
    activation and pooling modules that follow it; ``"block"`` after every residual or transformer
    block (after every layer where there are none); ``"stage"`` after every run of blocks of one
    feature shape; ``"balanced"`` makes two units of blocks that hold about equal memory, of which
    the last has the classifier, ``"balanced-3"`` three, and so on; an int after that many blocks; a
    list of module names after each of these; a callable ``(name, module) -> bool`` after each
    module for which it is true. ``example``: a batch that the model can run on. ``whole``: allow a
    plan of one unit for a model of several layers, which is backpropagation.

    The layers after the last of these ends belong to the output's own unit, which learns from the
    task. A unit ends only where its output has the batch as an axis. Layers that are dropped at
    random in training get units as well.

    Raises ValueError for a specification that names no place to cut, for one that leaves a model of
    several layers in one piece (unless ``whole``), for a model whose units share a piece of their
    graphs that cannot be told apart or whose output needs no gradient, for a callable that ends a
    unit where none can end, and for checkpointing that hides a unit's graph.
    """
    if isinstance(units, list | tuple):
        units = _named(model, units)
    example, calls = _run(model, example)
    mode, calls = _mode_that_runs_all(model, example, calls)
    pieces = pieces_of(units)
    ends = cuts.exits(model, units if pieces is None else "block", calls)
    if pieces is not None:
        ends = balanced_ends(model, example, cuts.in_order(calls, ends), pieces)
    outputs = [
        (c.path, c.module, tuple(c.output.shape)) for c in calls if isinstance(c.output, Tensor)
    ]
    known = {call.path for call in calls}
    passed_over: dict[str, tuple[int, ...]] = {}
    for _ in range(2 * len(known) + 2):
        trial = Trial(model, ends)
        try:
            with mode():
                z = trial.run(example)
        except RuntimeError as error:  # without cuts it has run
            if not whole:
                raise ValueError(
                    f"units={units!r}: model does not run in units, as one does not whose forward "
                    f"takes gradients of its own across them ({error}); choose larger units, or "
                    "horizon=None for backpropagation"
                ) from error
            if not ends:
                raise
            ends = frozenset()
            continue
        if trial.shared is not None:
            if trial.shared in ends or trial.shared not in known:
                raise ValueError(
                    f"units={units!r}: the inside of unit {trial.owner!r} is used again outside "
                    "it; choose larger units, for example units='block'"
                )
            ends = ends | {trial.shared}
            continue
        idle = {p for p in ends if not any(s.parameters for s in trial.segments if s.exit == p)}
        if not idle and ends and not trial.output_parameters:
            idle = {trial.segments[-1].exit}
        layouts, odd = [], {}
        for segment in trial.segments:
            found = [
                layout_of(segment.exit, f.shape, tuple(z.shape), outputs) for f in segment.features
            ]
            layouts.append([layout or AS_IT_IS for layout in found])
            if None in found:
                odd[segment.exit] = segment.features[found.index(None)].shape
        if odd and callable(units):
            path, shape = next(iter(odd.items()))
            raise ValueError(
                f"units ends a unit at {path!r}, whose output of shape {shape} does not keep the "
                f"batch of the network's output, {tuple(z.shape)}, as an axis"
            )
        if not idle and not odd:
            if not ends and not whole:
                _refuse_one_piece(model, units, calls, passed_over, tuple(z.shape))
            axis = channel_axis("", tuple(z.shape), outputs)
            return _plan(model, trial, layouts, z, axis, example, calls)
        passed_over |= odd
        ends = ends - idle - odd.keys()
    raise ValueError(
        f"units={units!r} does not settle on this model; pass a callable (name, module) -> bool"
    )


def _named(model: nn.Module, names: Sequence[str]) -> Callable[[str, nn.Module], bool]:
    """A specification that ends units at the modules of these names."""
    known = [name for name, _ in model.named_modules() if name]
    if not names or (unknown := [name for name in names if name not in known]):
        what = f"no module {', '.join(map(repr, unknown))}" if names else "an empty list"
        raise ValueError(f"units must name modules of the model, got {what}; it has {known}")
    return lambda name, module: name in names


def _run(model: nn.Module, example: Any) -> tuple[Any, list[Call]]:
    """The first samples of ``example``, two if that will do, and the calls of a run over them.

    It is all of the example where the model does not run on so few, or calls other modules for one
    more (it may loop over that axis). An axis of another meaning, tokens or layers, must not be
    taken for the batch: so many samples are taken that no first axis of three is that long by
    itself.
    """
    if isinstance(example, Tensor) and len(example) > 3:
        with contextlib.suppress(Exception):  # the model's own, of whatever kind
            two, three = (cuts.trace(model, example[:n]) for n in (2, 3))
            if [call.path for call in two] == [call.path for call in three]:
                fixed = _first_axes(two) & _first_axes(three)
                n = next(n for n in itertools.count(2) if n not in fixed)
                if n == 2:
                    return example[:2], two
                return example[:n], cuts.trace(model, example[:n])
    return example, cuts.trace(model, example)


def _first_axes(calls: Sequence[Call]) -> set[int]:
    tensors = (value for call in calls for value in leaves(call.output))
    return {len(t) for t in tensors if isinstance(t, Tensor) and t.ndim == 3}


def _mode_that_runs_all(
    model: nn.Module, example: Any, calls: list[Call]
) -> tuple[Callable[[], AbstractContextManager[None]], list[Call]]:
    """A maker of contexts in which ``model`` runs all its layers, and its calls there. The context
    is evaluation mode if training drops layers at random, otherwise it does nothing."""
    if model.training:
        with contextlib.suppress(Exception), evaluating(model):  # not all models can be evaluated
            evaluated = cuts.trace(model, example)
            if _with_parameters(evaluated) > _with_parameters(calls):
                return partial(evaluating, model), evaluated
    return contextlib.nullcontext, calls


def _with_parameters(calls: Sequence[Call]) -> set[str]:
    return {call.path for call in calls if next(call.module.parameters(), None) is not None}


def _plan(
    model: nn.Module,
    trial: Trial,
    layouts: Sequence[Sequence[Layout]],
    z: Tensor,
    output_axis: int,
    example: Any,
    calls: Sequence[Call],
) -> Plan:
    last = Unit(OUTPUT, "", 0, trial.output_parameters, (Feature(0, tuple(z.shape)),))
    found = {name for unit in (*trial.segments, last) for name in unit.parameters}
    unreached = [n for n, p in model.named_parameters() if p.requires_grad and n not in found]
    units = (*trial.finished(layouts), last)
    # Not the last one: its backward pass comes right after its forward pass.
    blocks = cuts.in_order(calls, cuts.blocks_and_neighbours(model, cuts.layers(calls), calls))[:-1]
    shape = example.shape if isinstance(example, Tensor) else ()
    batch_axes = tuple(axis for axis, n in enumerate(shape[:2]) if z.shape[:1] == (n,))
    if batch_axes[:1] != (0,):  # with both axes of that length, the batch may be the second
        batch_axes = ()
    return Plan(units, tuple(z.shape), output_axis, tuple(unreached), tuple(blocks), batch_axes)


def _refuse_one_piece(
    model: nn.Module,
    units: Units,
    calls: list[Call],
    passed_over: Mapping[str, tuple[int, ...]],
    output_shape: tuple[int, ...],
) -> None:
    """ValueError if ``model`` has several layers: with one unit that would be backpropagation."""
    layers = cuts.layers(calls)
    if len(layers) > 1:
        blocks = len(cuts.in_order(calls, cuts.blocks(model, layers)))
        packed = any(
            isinstance(value, PackedSequence)
            for call in calls
            for value in (call.output if isinstance(call.output, tuple) else ())
        )
        cause, remedy = "", "choose smaller units, or "
        if packed:
            cause = ", as no unit can end at a module that returns a PackedSequence"
        elif passed_over:
            path, shape = next(iter(passed_over.items()))
            cause, remedy = (
                f", as the batch of the network's output, {output_shape}, is no axis of what "
                f"modules return, such as {shape} of {path!r}",
                "",
            )
        raise ValueError(
            f"units={units!r} leaves this model of {len(layers)} layers, {blocks} blocks, in one "
            f"piece, to be trained by backpropagation{cause}; {remedy}horizon=None if that is "
            "wanted"
        )
