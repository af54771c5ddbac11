"""The arithmetic of fused layers: autograd functions that save little memory.

Each saves only the map of ``r`` channels. Maps of ``N`` channels are computed again in the backward
pass, some samples at a time. Outputs and gradients of ``N`` channels that only these functions read
are lazy (:mod:`svdalign._lazy`): they are never stored as a whole.
"""

from .expand import expand
from .moments import moments
from .perceptron import expand_tokens, reduce_tokens
from .reduce import reduce

__all__ = ["expand", "expand_tokens", "moments", "reduce", "reduce_tokens"]
