"""Checkpoints: the state of a learner in one file, and what to check before it is taken back.

A checkpoint is nested state (:mod:`svdalign._files`), with the rank of every factored layer in the
file's header (``ranks``). Other tools read its tensors by path, such as ``model.0.U``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._files import read, write
from .engine import Learner
from .factors import factored_layers

__all__ = [
    "load",
    "random_state",
    "ranks",
    "read",
    "restore",
    "restore_random_state",
    "save",
    "write",
]

LEARNED = ("model", "feedback", "transport", "loss")  #: what has tensors by name


def save(learner: Learner, path: str | Path, *, extra: Any = None) -> None:
    """Write all that ``learner`` needs to go on to ``path``, and torch's random state.

    ``extra``: anything of your loop's own made of dicts, lists, numbers, strings and tensors, such
    as ``{"epoch": 3, "scheduler": scheduler.state_dict()}``. A file at ``path`` is replaced in one
    go: at every moment, power cuts included, it is the old one or the new one.

    Raises TypeError for what is no learner, for a value that cannot be written, and for a module's
    extra state that is no tensor; OSError where the disk refuses.
    """
    if not isinstance(learner, Learner):
        raise TypeError(f"learner must be a svdalign.Learner, got {type(learner).__name__}")
    state = {**learner.state_dict(), "random": random_state(), "extra": extra}
    for part in LEARNED:
        for name, value in state[part].items():
            # Whether it fits another learner could not be told before that one has been changed.
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{part} has extra state {name!r}, a {type(value).__name__}; only tensors can "
                    "be saved, such as torch.tensor of its numbers"
                )
    write(path, state, ranks=ranks(learner.model))


def load(path: str | Path, into: Learner | nn.Module | None = None) -> dict[str, Any]:
    """The state that :func:`save` wrote, as nested dicts of tensors on the CPU.

    ``into``: a learner built as the saved one was (same model but for its ranks, same rule, same
    kind of optimizer). It is made to go on where the saved one stopped, bit for bit, and torch's
    random state with it. Or a model built as the saved one was: it gets the weights, and needs no
    optimizer for it. Without ``into`` nothing but the file is read; ``learner.load_state_dict``
    takes the result. A model cannot be rebuilt from the file alone: that would mean running code
    from it.

    Raises FileNotFoundError, and ValueError for a file that is truncated, foreign or of a newer
    format, or does not fit ``into``, TypeError for an ``into`` that is neither; ``into`` is then
    left as it was.
    """
    if not (into is None or isinstance(into, Learner | nn.Module)):
        raise TypeError(
            f"into must be a svdalign.Learner or a torch.nn.Module, got {type(into).__name__}"
        )
    state = read(path)
    if missing := {"model", "feedback", "transport", "optimizer", "steps"} - state.keys():
        raise ValueError(f"{path} holds no learner: {', '.join(sorted(missing))} missing")
    if isinstance(into, Learner):
        restore(into, state, path)
    elif into is not None:
        _check_tensors("model", into, into.state_dict(), state["model"], path)
        into.load_state_dict(state["model"])
    return state


def restore(learner: Learner, state: Mapping[str, Any], path: str | Path) -> None:
    """Make ``learner`` go on from ``state``, which :func:`load` read from ``path``; see there."""
    _check_fits(learner, state, path)
    learner.load_state_dict(dict(state))
    restore_random_state(state["random"])


def ranks(model: nn.Module) -> dict[str, int]:
    """Present rank of every factored layer by its name."""
    return {name: layer.rank for name, layer in factored_layers(model).items()}


def random_state() -> dict[str, Any]:
    """State of torch's generators, of the CPU and of every CUDA device in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Undo :func:`random_state`; devices that are not there are left out."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for device, value in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(value, device)


def _check_fits(learner: Learner, state: Mapping[str, Any], path: str | Path) -> None:
    """ValueError unless ``learner.load_state_dict(state)`` will go through."""
    mine = learner.state_dict()
    try:
        learner.check_units(state)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the learner: {error}") from None
    for part in LEARNED:
        _check_tensors(part, learner.model, mine[part], state.get(part, {}), path)
    sizes = [
        [len(group["params"]) for group in s["optimizer"]["param_groups"]] for s in (mine, state)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{path} does not fit the learner: its optimizer has parameter groups of {sizes[1]} "
            f"parameters, the learner's of {sizes[0]}"
        )


def _check_tensors(
    part: str,
    model: nn.Module,
    have: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    path: str | Path,
) -> None:
    """ValueError unless ``saved`` has the names of ``have`` and their shapes, but for ranks."""
    factors = {
        f"{name}.{factor}" if name else factor
        for name in ranks(model)
        for factor in ("U", "s", "V")
    }
    if odd := sorted(have.keys() ^ saved.keys()):
        raise ValueError(f"{path} does not fit: only one of them has {part} {odd[0]!r}")
    for name, value in have.items():
        wanted, found = tuple(value.shape), tuple(saved[name].shape)
        if part == "model" and name in factors:  # their rank, the last dimension, may differ
            wanted, found = (len(wanted), *wanted[:-1]), (len(found), *found[:-1])
        if wanted != found:
            raise ValueError(
                f"{path} does not fit: {part} {name!r} has shape {tuple(saved[name].shape)} there, "
                f"{tuple(value.shape)} here"
            )
