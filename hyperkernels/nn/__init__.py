"""Layers."""

from hyperkernels.nn.ambient import context
from hyperkernels.nn.conv import HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d
from hyperkernels.nn.encoders import Descriptors, Noise, Tasks
from hyperkernels.nn.hyper_model import HyperModel
from hyperkernels.nn.hypernet import HyperNet
from hyperkernels.nn.linear import HyperLinear
from hyperkernels.nn.rnn import HyperLSTMCell, HyperRNNCell
from hyperkernels.nn.trunk import ColumnTrunk, Trunk, TrunkLayer
from hyperkernels.nn.trunks import AttentionTrunk, CNNTrunk, MLPTrunk, RNNTrunk

__all__ = [
    "AttentionTrunk",
    "CNNTrunk",
    "ColumnTrunk",
    "Descriptors",
    "HyperConv1d",
    "HyperConv2d",
    "HyperConv3d",
    "HyperConvTranspose2d",
    "HyperLSTMCell",
    "HyperLinear",
    "HyperModel",
    "HyperNet",
    "HyperRNNCell",
    "MLPTrunk",
    "Noise",
    "RNNTrunk",
    "Tasks",
    "Trunk",
    "TrunkLayer",
    "context",
]
