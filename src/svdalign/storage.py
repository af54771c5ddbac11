"""Checkpoints: the state of a learner in one file, which is checked before it is loaded.

A checkpoint is nested state (:mod:`svdalign._files`); the file's header also has the rank of every
factored layer (``ranks``). Other tools read the tensors by path, such as ``model.0.U``.
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

_LEARNED = ("model", "feedback", "transport", "loss")  #: the parts that are dicts of named tensors


def save(learner: Learner, path: str | Path, *, extra: Any = None) -> None:
    """Write to ``path`` everything that ``learner`` needs to go on, and torch's random state.

    A file that exists at ``path`` is replaced at once: at any moment, even in a power cut, it is
    the old file or the new one.

    Args:
        learner: the one to save: model, feedback, optimizer state, number of steps.
        path: of the file, in the safetensors format; its folder must exist.
        extra: anything that your loop needs, made of dicts, lists, numbers, strings and tensors,
            such as ``{"epoch": 3, "scheduler": scheduler.state_dict()}``.

    Raises:
        TypeError: if ``learner`` is none; for a value that cannot be written, and for a module's
            extra state that is no tensor.
        OSError: if the file cannot be written.
    """
    if not isinstance(learner, Learner):
        raise TypeError(f"learner must be a svdalign.Learner, got {type(learner).__name__}")
    state = {**learner.state_dict(), "random": random_state(), "extra": extra}
    for part in _LEARNED:
        for name, value in state[part].items():
            # It could not be checked on loading before the learner has been changed.
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{part} has extra state {name!r}, a {type(value).__name__}; only tensors can "
                    "be saved, such as torch.tensor of its numbers"
                )
    write(path, state, ranks=ranks(learner.model))


def load(path: str | Path, into: Learner | nn.Module | None = None) -> dict[str, Any]:
    """The state that :func:`save` wrote.

    A model cannot be rebuilt from the file alone: that would mean running code from it.

    Args:
        path: of the file.
        into: a learner built like the saved one (the same model, whose ranks may differ, the same
            rule, the same kind of optimizer). It goes on where the saved one stopped, bit for bit;
            torch's random state is restored as well. Or a model built like the saved one, which
            gets the weights and needs no optimizer. With None the file is only read.

    Returns:
        Nested dicts of tensors on the CPU, which ``learner.load_state_dict`` takes; what was given
        as ``extra`` is in it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is truncated, was not written by :func:`save`, has a newer
            format or does not fit ``into``, which is then left as it was.
        TypeError: for an ``into`` that is neither learner nor model.
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
    """Load into ``learner`` the ``state`` that :func:`load` has read from ``path``."""
    _check_fits(learner, state, path)
    learner.load_state_dict(dict(state))
    restore_random_state(state["random"])


def ranks(model: nn.Module) -> dict[str, int]:
    """The present rank of every factored layer, by name."""
    return {name: layer.rank for name, layer in factored_layers(model).items()}


def random_state() -> dict[str, Any]:
    """The state of torch's random generators, of the CPU and of every CUDA device in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set the state that :func:`random_state` returned; for devices that exist."""
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
    for part in _LEARNED:
        _check_tensors(part, learner.model, mine[part], state.get(part, {}), path)
    sizes = [
        [len(group["params"]) for group in s["optimizer"]["param_groups"]] for s in (mine, state)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{path} does not fit the learner: its optimizer has parameter groups of {sizes[1]} "
            f"parameters, the learner's of {sizes[0]}"
        )
    here, there = (set(s["optimizer"]["param_groups"][0]) for s in (mine, state))
    if here - there and there - here:  # newer versions of one kind only add settings
        raise ValueError(
            f"{path} does not fit the learner: its optimizer is of another kind, with "
            f"{', '.join(sorted(there - here))} in place of {', '.join(sorted(here - there))}"
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
