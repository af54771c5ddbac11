"""Muon for factors: every direction of a weight turns by the same angle in a step.

An update of SGD or Adam moves the directions with large gradients most. Muon replaces a weight's
momentum by the nearest matrix with orthonormal rows or columns, so that all directions move alike.
The factors ``U`` and ``V`` are orthonormal themselves: there the learning rate is an angle.

Source: Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adam import adam

from .._autocast import outside_autocast
from .factorize import classifier_name
from .layers import factored_layers
from .registry import kind_of
from .stiefel import orthogonalize


class Muon(Optimizer):
    """Muon for the hidden weights of ``model``, AdamW for all other ``params``.

    Hidden weights are the factors ``U`` and ``V`` and the weights of dense layers that could be
    factored, without the classifier (:func:`hidden_weights`). With Nesterov momentum ``M`` of the
    gradient, as a matrix (m, n), a factor steps by

        ``X <- X - lr orthogonalize(M)``,

    a turn of every column by about ``lr`` radians, after which it needs a retraction, as
    :class:`svdalign.Learner` makes one; its scale is ``s``, which AdamW trains. A dense weight is
    turned by the same angle as a whole, ``X <- X - lr ||X||_F / sqrt(min(m, n)) orthogonalize(M)``
    and then scaled back to the norm it had, so that a layer needs a norm or a bias after it::

        Learner(model, optimizer=lambda params: sva.Muon(params, model, lr=0.05), ...)

    Args:
        params: any of the model's parameters and others, such as a learner hands out.
        model: tells which of them are hidden weights.
        lr: the angle of a step, in radians, at least 0.
        adam_lr: AdamW's learning rate; by default a tenth of ``lr``.
        momentum: Muon's, in [0, 1).
        betas: AdamW's two, each in [0, 1).
        weight_decay: AdamW's, decoupled, at least 0.

    Raises:
        TypeError, ValueError: for an argument that does not fit; the message names it.

    Source: Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        model: nn.Module,
        lr: float = 0.05,
        *,
        adam_lr: float | None = None,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        adam_lr = lr / 10 if adam_lr is None else adam_lr
        limits = {"lr": lr, "adam_lr": adam_lr, "weight_decay": weight_decay}
        for name, value in limits.items():
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        for name, value in (("momentum", momentum), *(("betas", beta) for beta in betas)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value!r}")
        given = list(params)
        if not all(isinstance(p, Tensor) for p in given):
            raise TypeError("params must be tensors, without groups: Muon makes its own")
        kinds = {id(p): kind for p, kind in hidden_weights(model)}
        muon = {"lr": lr, "momentum": momentum}
        groups: list[dict[str, Any]] = [
            {"kind": "factor", **muon},
            {"kind": "dense", **muon},
            {"kind": "other", "lr": adam_lr, "betas": betas, "weight_decay": weight_decay},
        ]
        for group in groups:
            group["params"] = [p for p in given if kinds.get(id(p), "other") == group["kind"]]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure``: computes the loss and its gradients anew, the loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with outside_autocast():  # the update of a weight is exact whatever its forward pass is
            for group in self.param_groups:
                trained = [p for p in group["params"] if p.grad is not None]
                if group["kind"] == "other":
                    self._adam(trained, group)
                else:
                    for p in trained:
                        self._turn(p, group)
        return loss

    def _turn(self, X: Tensor, group: dict[str, Any]) -> None:
        gradient, state = X.grad, self.state[X]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(X)
        M = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        ahead = gradient.add(M, alpha=group["momentum"]).flatten(1)
        step = orthogonalize(ahead).reshape(X.shape).mul_(group["lr"])
        if group["kind"] == "factor":
            X.sub_(step)
            return
        norm = torch.linalg.vector_norm(X)
        X.sub_(step.mul_(norm / min(ahead.shape) ** 0.5))
        X.mul_(norm / torch.linalg.vector_norm(X).clamp_min(torch.finfo(X.dtype).tiny))

    def _adam(self, trained: list[Tensor], group: dict[str, Any]) -> None:
        for p in trained:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in trained]
        adam(
            trained,
            [p.grad for p in trained if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
            decoupled_weight_decay=True,
        )


def hidden_weights(model: nn.Module) -> list[tuple[nn.Parameter, str]]:
    """The factors ``U`` and ``V`` of ``model``, each with "factor", and the weights of its dense
    layers that could be factored, each with "dense", but for the classifier, as
    :func:`svdalign.factorize` finds it."""
    layers = {name: layer for name, layer in model.named_modules() if kind_of(layer)}
    factored, classifier = factored_layers(model), classifier_name(layers)
    found: list[tuple[nn.Parameter, str]] = []
    for name, layer in layers.items():
        kind = kind_of(layer)
        if name in factored:
            found += [(factored[name].U, "factor"), (factored[name].V, "factor")]
        elif kind is not None and name != classifier and not kind.refusal(layer):
            found.append((layer.get_parameter("weight"), "dense"))
    return found
