"""Files that are written completely or not at all, and nested state in safetensors files.

The tensors of the state are the file's tensors. How they nest is JSON in the file's header
(``state``), beside the format's version (``svdalign``) and entries of the caller. No pickle is
used."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ._nested import flatten, unflatten

VERSION = 1


def write(path: str | Path, state: Mapping[str, Any], **header: Any) -> None:
    """Write a nested ``state``; ``header``: further entries of the header, as JSON."""
    tensors: dict[str, Tensor] = {}
    skeleton = flatten(state, (), tensors)
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
    """The state in a file that :func:`write` wrote; ValueError for any other file."""
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
        state = unflatten(json.loads(metadata["state"]), tensors)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: its header does not fit its tensors") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is damaged: its header holds no dict")
    return state


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary file, then give that file the name ``path``.

    A file at ``path`` stays until the new content is on the disk, and for good if ``write`` fails.
    An OSError names ``path``.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        _sync(part)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # a full disk has no name, and a temporary file a bad one
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
