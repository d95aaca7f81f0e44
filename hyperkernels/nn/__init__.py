"""Layers."""

from hyperkernels.nn.ambient import context
from hyperkernels.nn.linear import HyperLinear
from hyperkernels.nn.trunk import Trunk

__all__ = ["HyperLinear", "Trunk", "context"]
