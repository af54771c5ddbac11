"""Which unit a parameter belongs to, found without autograd: by changing it and looking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def owners(
    model: nn.Module, x: Any, exits: Sequence[tuple[str, int]], seed: int = 0
) -> dict[str, set[int]]:
    """Parameter name -> indices of the units whose output it changes while the outputs of all
    earlier units are held at what they were. ``exits``: (module path, number of its call) in order;
    the network's output is the unit after the last of them."""
    index = {exit: i for i, exit in enumerate(exits)}

    def copy(output: Any) -> Any:
        return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, output)

    def run(held: list[Any] | None) -> list[Any]:
        seen: list[Any] = [None] * (len(exits) + 1)
        calls: dict[str, int] = {}

        def hook(path: str):
            def replace(module: nn.Module, args: Any, output: Any) -> Any:
                i = index.get((path, calls.get(path, 0)))
                calls[path] = calls.get(path, 0) + 1
                if i is None:
                    return None
                seen[i] = copy(output)
                return None if held is None else copy(held[i])

            return replace

        handles = [model.get_submodule(p).register_forward_hook(hook(p)) for p, _ in exits]
        torch.manual_seed(seed)
        with torch.no_grad():
            seen[-1] = model(x).clone()
        for handle in handles:
            handle.remove()
        return seen

    clean = run(None)
    found: dict[str, set[int]] = {}
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.5 * torch.randn_like(parameter))
        changed = run(clean)
        found[name] = {
            i for i, (a, b) in enumerate(zip(clean, changed, strict=True)) if not _same(a, b)
        }
        with torch.no_grad():
            parameter.copy_(before)
    return found


def _same(a: Any, b: Any) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(u, v) for u, v in pairs if isinstance(u, Tensor))
