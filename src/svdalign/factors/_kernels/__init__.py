"""The arithmetic of a fused convolution: autograd functions that save little and work by parts.

Each saves the map of ``r`` channels alone and computes the maps of ``N`` channels again, some
samples at a time, where its backward pass needs them. Outputs and gradients of ``N`` channels that
only these functions read are lazy (:mod:`svdalign._lazy`): they are never written as a whole.
"""

from .expand import expand
from .moments import moments
from .reduce import reduce

__all__ = ["expand", "moments", "reduce"]
