"""Training on several processes: units side by side, or samples side by side.

Both wrap an ordinary :class:`svdalign.Learner`, made alike on every process (same seed), and use
``torch.distributed``, which ``torchrun`` sets up (:func:`meet`).

**Layers.** A unit at horizon 0 needs nothing from the units after it. So one process can train the
first units on batch t while the next process trains the units that follow on batch t - 1.
Activations and targets go forward, nothing comes back, no process waits for a later one, and no
old weights are kept. See :class:`LayerParallel`.

**Data.** Every process trains all units, on samples of its own. A unit's gradients are complete
when it retires, so they are averaged while the next unit runs. See :class:`DataParallel`.
"""

from ..engine.balance import balanced
from .balance import unit_seconds
from .layers import LayerParallel
from .link import PeerError
from .meeting import meet
from .samples import DataParallel

__all__ = ["DataParallel", "LayerParallel", "PeerError", "balanced", "meet", "unit_seconds"]
