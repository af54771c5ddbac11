"""Parameters and buffers of a learner's model and feedback by one name, ``model.…`` and
``feedback.…``."""

from __future__ import annotations

from torch import Tensor, nn

from ..engine import Learner


def names(learner: Learner) -> dict[Tensor, str]:
    """Every parameter's name."""
    parts = {"model": learner.model, "feedback": learner.feedback}
    return {p: f"{part}.{n}" for part, m in parts.items() for n, p in m.named_parameters()}


def get(learner: Learner, name: str) -> Tensor:
    """The parameter or buffer of this name."""
    module, leaf = _module(learner, name)
    found: Tensor | None = module._parameters.get(leaf)
    found = module._buffers[leaf] if found is None else found
    assert found is not None
    return found


def put(learner: Learner, name: str, value: Tensor) -> None:
    """Put another tensor in the place of this parameter or buffer."""
    module, leaf = _module(learner, name)
    old = module._parameters.get(leaf)
    if old is None:
        module._buffers[leaf] = value
    else:
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        module._parameters[leaf] = new
        part, _, path = name.partition(".")
        if part == "model":
            learner._parameters[path] = new


def _module(learner: Learner, name: str) -> tuple[nn.Module, str]:
    part, _, path = name.partition(".")
    root: nn.Module = learner.model if part == "model" else learner.feedback
    owner, _, leaf = path.rpartition(".")
    return root.get_submodule(owner), leaf
