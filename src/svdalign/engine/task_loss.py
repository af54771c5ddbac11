"""The user's loss on the network's output."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from ..task import FOR_TOKENS, Loss
from .checks import check_scalar, check_trained
from .ownership import leaves_of

#: What torch raises for outputs and targets that do not go together.
_TORCHS = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError)


class TaskLoss:
    """``loss(z, y)`` of the network's output ``z``, with errors that say what it was given.

    ``parameters``: trainable weights that the loss has of its own, which ``optimizer`` has to
    train. Those of a module are known from the start, others from the first :meth:`teach`.
    """

    def __init__(self, loss: Loss, model: nn.Module, optimizer: Optimizer) -> None:
        self._loss, self._model, self._optimizer = loss, model, optimizer
        self._taught = False
        self.parameters: tuple[Tensor, ...] = ()
        if isinstance(loss, nn.Module):
            of_model = set(model.parameters())
            own = [p for p in loss.parameters() if p.requires_grad and p not in of_model]
            self.parameters = check_trained(own, optimizer)

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        try:
            loss = self._loss(z, y)
        except Exception as error:
            if type(error) not in _TORCHS:
                raise  # out of memory, or an error of the loss's own
            raise ValueError(
                f"loss cannot take an output of shape {tuple(z.shape)} with y of shape "
                f"{tuple(y.shape)}, {y.dtype}: {error}" + f"; {FOR_TOKENS}" * (z.ndim == 3)
            ) from error
        must = "loss must be 0-dim and depend on the output"
        return check_scalar(must, loss, gradient=z.requires_grad)

    def teach(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of an output ``z`` in the network's graph."""
        loss = self(z, y)
        if not self._taught:
            of_model = {*leaves_of([z]), *self._model.parameters()}
            own = [p for p in leaves_of([loss]) if p not in of_model]
            self.parameters = check_trained(own, self._optimizer)
            self._taught = True
        return loss
