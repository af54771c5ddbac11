"""Nested state as JSON and tensors, and back.

The state is made of dicts, lists, tuples, tensors, numbers, strings and None. Its tensors go into
one flat dict by path, such as ``model.0.U``; what is left of it is JSON that says how they nest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["flatten", "unflatten"]

KIND = "$"  #: marks a JSON object that stands for something else than a dict of strings


def flatten(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """``value``, which stands at ``path`` of the state, as JSON; its tensors are added to
    ``tensors``. TypeError for what a state cannot hold."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return _flatten_tensor(value, path, tensors)
    if isinstance(value, Mapping):
        items = [(k, flatten(v, (*path, str(k)), tensors)) for k, v in value.items()]
        if all(isinstance(key, str) and key != KIND for key, _ in items):
            return dict(items)
        return {KIND: "dict", "items": [[flatten(k, path, tensors), v] for k, v in items]}
    if isinstance(value, list | tuple):
        listed = [flatten(v, (*path, str(i)), tensors) for i, v in enumerate(value)]
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


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that :func:`flatten` made ``value`` and ``tensors`` of."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(KIND)
    if kind is None:
        return {key: unflatten(item, tensors) for key, item in value.items()}
    if kind == "dict":
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in value["items"]}
    if kind == "tuple":
        return tuple(unflatten(item, tensors) for item in value["items"])
    if kind == "sparse":
        parts = [unflatten(part, tensors) for part in value["parts"]]
        return _sparse(SPARSE[value["layout"]], parts, value["shape"])
    tensor = tensors[value["name"]]
    if (order := value.get("order")) is not None:
        inverse = [order.index(d) for d in range(tensor.ndim)]
        tensor = tensor.permute(order).contiguous().permute(inverse)
    return tensor
