"""Layers."""

from hyperkernels.nn.ambient import context
from hyperkernels.nn.conv import HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d
from hyperkernels.nn.linear import HyperLinear
from hyperkernels.nn.trunk import Trunk

__all__ = ["HyperConv1d", "HyperConv2d", "HyperConv3d", "HyperConvTranspose2d", "HyperLinear", "Trunk", "context"]
