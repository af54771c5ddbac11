"""Nested state as JSON and tensors, and back.

The state is made of dicts, lists, tuples, tensors, numbers, strings and None. Its tensors go into
one flat dict by path, such as ``model.0.U``; the rest becomes JSON, with the names of the tensors
in their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_KIND = "$"  #: the key of a JSON object that stands for anything but a dict with strings as keys


def flatten(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """``value``, which is at ``path`` in the state, as JSON; its tensors are added to ``tensors``.
    TypeError for a value of any other type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return _flatten_tensor(value, path, tensors)
    if isinstance(value, Mapping):
        items = [(k, flatten(v, (*path, str(k)), tensors)) for k, v in value.items()]
        if all(isinstance(key, str) and key != _KIND for key, _ in items):
            return dict(items)
        return {_KIND: "dict", "items": [[flatten(k, path, tensors), v] for k, v in items]}
    if isinstance(value, list | tuple):
        listed = [flatten(v, (*path, str(i)), tensors) for i, v in enumerate(value)]
        return listed if isinstance(value, list) else {_KIND: "tuple", "items": listed}
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
            _KIND: "sparse",
            "layout": str(value.layout),
            "shape": [*value.shape],
            "parts": parts,
        }
    name = ".".join(path)
    while name in tensors:  # {"a": {"b": x}, "a.b": y}
        name += "'"
    # Torch chooses kernels by the order of a tensor's dimensions in memory, and kernels differ in
    # the last bit. To go on bit for bit, a run needs that order back.
    order = sorted(range(value.ndim), key=value.stride, reverse=True)
    tensors[name] = value.contiguous()
    entry: dict[str, Any] = {_KIND: "tensor", "name": name}
    if not value.is_contiguous() and value.permute(order).is_contiguous():
        entry["order"] = order
    return entry


_SPARSE: dict[str, torch.layout] = {
    str(layout): layout
    for layout in (
        torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc
    )
}  # fmt: skip


def _parts_of_sparse(value: Tensor) -> tuple[Tensor, ...]:
    """The indices and values of a sparse tensor; for the COO layout also whether it is
    coalesced."""
    if value.layout == torch.sparse_coo:
        return value._indices(), value._values(), torch.tensor(value.is_coalesced())
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return value.crow_indices(), value.col_indices(), value.values()
    return value.ccol_indices(), value.row_indices(), value.values()


def _sparse(layout: torch.layout, parts: list[Tensor], shape: list[int]) -> Tensor:
    # With checks: in a damaged file, indices out of range would read outside the memory.
    if layout == torch.sparse_coo:
        indices, values, coalesced = parts
        return torch.sparse_coo_tensor(
            indices, values, shape, is_coalesced=bool(coalesced), check_invariants=True
        )
    compressed, plain, values = parts
    return torch.sparse_compressed_tensor(
        compressed, plain, values, shape, layout=layout, check_invariants=True
    )


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`flatten`."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind is None:
        return {key: unflatten(item, tensors) for key, item in value.items()}
    if kind == "dict":
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in value["items"]}
    if kind == "tuple":
        return tuple(unflatten(item, tensors) for item in value["items"])
    if kind == "sparse":
        parts = [unflatten(part, tensors) for part in value["parts"]]
        return _sparse(_SPARSE[value["layout"]], parts, value["shape"])
    tensor = tensors[value["name"]]
    if (order := value.get("order")) is not None:
        inverse = [order.index(d) for d in range(tensor.ndim)]
        tensor = tensor.permute(order).contiguous().permute(inverse)
    return tensor
