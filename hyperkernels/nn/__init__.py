"""Layers."""

from hyperkernels.nn.ambient import context, recompute_in_context
from hyperkernels.nn.conv import HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d
from hyperkernels.nn.encoders import Descriptors, Noise, Tasks
from hyperkernels.nn.hyper_model import HyperModel
from hyperkernels.nn.hypernet import HyperNet
from hyperkernels.nn.linear import HyperLinear
from hyperkernels.nn.residual import HyperResidual
from hyperkernels.nn.rnn import HyperLSTMCell, HyperRNNCell
from hyperkernels.nn.trunk import ColumnTrunk, FreeTrunk, Trunk, TrunkLayer
from hyperkernels.nn.trunks import AttentionTrunk, CNNTrunk, MLPTrunk, RNNTrunk

__all__ = [
    "AttentionTrunk",
    "CNNTrunk",
    "ColumnTrunk",
    "Descriptors",
    "FreeTrunk",
    "HyperConv1d",
    "HyperConv2d",
    "HyperConv3d",
    "HyperConvTranspose2d",
    "HyperLSTMCell",
    "HyperLinear",
    "HyperModel",
    "HyperNet",
    "HyperRNNCell",
    "HyperResidual",
    "MLPTrunk",
    "Noise",
    "RNNTrunk",
    "Tasks",
    "Trunk",
    "TrunkLayer",
    "context",
    "recompute_in_context",
]
