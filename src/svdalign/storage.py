"""State on disk: one safetensors file a checkpoint, read without pickle, written all or nothing.

A file holds nested dicts, lists, tuples, tensors, numbers, strings and None. The tensors are the
file's tensors; how they nest is JSON in its header (``state``), beside the format's version
(``svdalign``) and the rank of every factored layer (``ranks``). Other tools read the tensors by
path, such as ``model.0.U``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .engine import Learner
from .factors import FactoredLayer

__all__ = [
    "load",
    "random_state",
    "ranks",
    "read",
    "replace_file",
    "restore",
    "restore_random_state",
    "save",
    "write",
]

VERSION = 1
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
    return {n: m.rank for n, m in model.named_modules() if isinstance(m, FactoredLayer)}


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


# --- files --------------------------------------------------------------------------------------


def write(path: str | Path, state: Mapping[str, Any], **header: Any) -> None:
    """Write a nested ``state``; ``header`` is JSON that goes beside it."""
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(state, (), tensors)
    storages: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses tensors that share memory
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages:
            tensors[name] = tensor.clone()
        storages.add(storage)
    metadata = {"svdalign": str(VERSION), "state": json.dumps(skeleton)}
    metadata |= {key: json.dumps(value) for key, value in header.items()}
    # Not save_file: it goes through a temporary file of its own, which a kill would leave behind.
    content = safetensors.torch.save(tensors, metadata)
    replace_file(path, lambda part: part.write_bytes(content))


def read(path: str | Path) -> dict[str, Any]:
    """The state in a file of :func:`write`; ValueError if it is not a whole one."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            version = metadata.get("svdalign", "")
            if not version.isdecimal() or "state" not in metadata:
                raise ValueError(f"{path} was not written by svdalign")
            if int(version) > VERSION:
                raise ValueError(
                    f"{path} has format {version}, of a newer svdalign; this one reads format "
                    f"{VERSION} at most"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None
    try:
        state = _unflatten(json.loads(metadata["state"]), tensors)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: its header does not fit its tensors") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is damaged: its header holds no dict")
    return state


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Make ``path`` what ``write`` puts into the temporary file that it is given, all or nothing.

    What was at ``path`` stays until the new content is on the disk, for good if ``write`` fails.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        _sync(part)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- nested state as JSON and tensors -----------------------------------------------------------

KIND = "$"  #: marks a JSON object that stands for something else than a dict of strings


def _flatten(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return _flatten_tensor(value, path, tensors)
    if isinstance(value, Mapping):
        items = [(k, _flatten(v, (*path, str(k)), tensors)) for k, v in value.items()]
        if all(isinstance(key, str) and key != KIND for key, _ in items):
            return dict(items)
        return {KIND: "dict", "items": [[_flatten(k, path, tensors), v] for k, v in items]}
    if isinstance(value, list | tuple):
        listed = [_flatten(v, (*path, str(i)), tensors) for i, v in enumerate(value)]
        return listed if isinstance(value, list) else {KIND: "tuple", "items": listed}
    raise TypeError(
        f"{'.'.join(path)} is a {type(value).__name__}; only dicts, lists, tuples, tensors, "
        "numbers, strings and None can be written"
    )


def _flatten_tensor(value: Tensor, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    value = value.detach()
    if value.layout != torch.strided:
        parts = [
            _flatten_tensor(part, (*path, str(i)), tensors)
            for i, part in enumerate(_parts_of_sparse(value))
        ]
        return {
            KIND: "sparse",
            "layout": str(value.layout),
            "shape": [*value.shape],
            "parts": parts,
        }
    name = ".".join(path)
    while name in tensors:  # {"a": {"b": x}, "a.b": y}
        name += "'"
    # The order of a tensor's dimensions in memory decides which of torch's kernels works on it, and
    # kernels differ in their last bit: a run that goes on bit for bit needs it back.
    order = sorted(range(value.ndim), key=value.stride, reverse=True)
    tensors[name] = value.contiguous()
    entry: dict[str, Any] = {KIND: "tensor", "name": name}
    if not value.is_contiguous() and value.permute(order).is_contiguous():
        entry["order"] = order
    return entry


SPARSE: dict[str, torch.layout] = {
    str(layout): layout
    for layout in (
        torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc
    )
}  # fmt: skip


def _parts_of_sparse(value: Tensor) -> tuple[Tensor, ...]:
    """Indices and values of a sparse tensor, and of the COO layout whether it is coalesced."""
    if value.layout == torch.sparse_coo:
        return value._indices(), value._values(), torch.tensor(value.is_coalesced())
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return value.crow_indices(), value.col_indices(), value.values()
    return value.ccol_indices(), value.row_indices(), value.values()


def _sparse(layout: torch.layout, parts: list[Tensor], shape: list[int]) -> Tensor:
    # Invariants are checked, for indices out of range in a damaged file would reach past memory.
    if layout == torch.sparse_coo:
        indices, values, coalesced = parts
        return torch.sparse_coo_tensor(
            indices, values, shape, is_coalesced=bool(coalesced), check_invariants=True
        )
    compressed, plain, values = parts
    return torch.sparse_compressed_tensor(
        compressed, plain, values, shape, layout=layout, check_invariants=True
    )


def _unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(KIND)
    if kind is None:
        return {key: _unflatten(item, tensors) for key, item in value.items()}
    if kind == "dict":
        return {_unflatten(k, tensors): _unflatten(v, tensors) for k, v in value["items"]}
    if kind == "tuple":
        return tuple(_unflatten(item, tensors) for item in value["items"])
    if kind == "sparse":
        parts = [_unflatten(part, tensors) for part in value["parts"]]
        return _sparse(SPARSE[value["layout"]], parts, value["shape"])
    tensor = tensors[value["name"]]
    if (order := value.get("order")) is not None:
        inverse = [order.index(d) for d in range(tensor.ndim)]
        tensor = tensor.permute(order).contiguous().permute(inverse)
    return tensor


# --- does it fit --------------------------------------------------------------------------------


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
