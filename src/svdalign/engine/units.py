"""What a unit is.

A unit ends at an *exit*: a module whose output is detached before later modules read it, so that no
gradient passes unless the engine carries it. Everything that the output depends on since the
previous exits belongs to the unit, norms, embeddings, functional activations and skips included.
This follows from the autograd graph of a trial run, not from names. The model's ``forward`` runs
unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layout import AS_IT_IS, Layout

OUTPUT = "output"  #: name of the last unit, from the last exit to the network's output


@dataclass(frozen=True)
class Feature:
    """A tensor on which a rule puts a unit's loss: the ``index``-th in the output of the unit's
    module. Rules see it in ``layout``, where its shape for the example is ``shape``."""

    index: int
    shape: tuple[int, ...]
    layout: Layout = AS_IT_IS


@dataclass(frozen=True)
class Unit:
    """One piece of the network that learns on its own.

    ``name``: unique in its plan. ``exit``: path of the module whose output ends the unit, at its
    ``call``-th call (from 0) in a forward pass. ``parameters``: names of the parameters that its
    output depends on, frozen ones too. ``features``: the tensors of that output on which its loss
    is put; one, unless no single one depends on all ``parameters``. ``inplace``: the model changes
    the output in place later, so that it must be given a copy.
    """

    name: str
    exit: str
    call: int
    parameters: tuple[str, ...]
    features: tuple[Feature, ...]
    inplace: bool = False

    @property
    def features_shape(self) -> tuple[int, ...]:
        """The shape of the first feature."""
        return self.features[0].shape


@dataclass(frozen=True)
class Plan:
    """The units in order of execution; the last one, :attr:`output`, is taught by the task itself.

    ``output_axis``: the axis of classes in the output.
    ``unreached``: trainable parameters that no unit's output depends on for the example.
    ``blocks``: paths of the residual or transformer blocks, or layers where there are none, with
    the norms and activations that share a module with one, in order of execution but for the last.
    ``batch_axes``: axes of an input tensor that may be its batch, as long as the first axis of the
    output; empty where that is not known.
    """

    units: tuple[Unit, ...]
    output_shape: tuple[int, ...]
    output_axis: int
    unreached: tuple[str, ...]
    blocks: tuple[str, ...]
    batch_axes: tuple[int, ...] = ()

    @property
    def output(self) -> Unit:
        """The unit from the last exit to the network's output."""
        return self.units[-1]

    @property
    def exits(self) -> tuple[str, ...]:
        """Paths of the modules to hook, each once."""
        return tuple(dict.fromkeys(unit.exit for unit in self.units[:-1]))
