"""Trunks of other architectures: a deeper MLP for each chunk, and networks in which chunks see each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperkernels.chunking import check_sizes
from hyperkernels.hidden import ACTIVATIONS, check_activation
from hyperkernels.nn.trunk import context_for, embedded


class Tokens(nn.Module):
    """`token[g,c] = A z[g] + B embedding[c] + b`, through `mix`: what these trunks have in common.

    A trunk is called as `trunk(embedding [C, e], context=None)`, z `[G, context_features]`, and returns hidden
    `[C, m]`, or `[G, C, m]`.
    """

    def __init__(
        self, size: int, embedding_features: int, context_features: int | None, factory: dict[str, Any]
    ) -> None:
        super().__init__()
        check_sizes(width=size, embedding_features=embedding_features, context_features=context_features)
        self.context_features = context_features
        self.chunk_layer = nn.Linear(embedding_features, size, **factory)
        self.context_layer = nn.Linear(context_features, size, bias=False, **factory) if context_features else None

    def forward(self, embedding: Tensor, context: Tensor | None = None) -> Tensor:
        z, tokens = context_for(context, self.context_features), embedded(self.chunk_layer, embedding)
        if self.context_layer is None:
            return self.mix(tokens[None])[0]
        return self.mix(tokens + self.context_layer(z)[:, None])

    def mix(self, tokens: Tensor) -> Tensor:
        """Of `[G, C, size]`, hidden `[G, C, m]`."""
        raise NotImplementedError


class MLPTrunk(Tokens):
    """`hidden[g,c] = MLP([z[g], embedding[c]])`, the activation after every layer; the head is the layer that follows.

    Args:
        layers: the widths of the layers; the last is the hypernetwork's width m.
        embedding_features, context_features: sizes of a chunk's embedding and of z; no context_features, no z.
        activation: as of `AdditiveHidden`.
        dropout: the probability with which a hidden number is left out in training, after every layer.

    Memory: hidden for all contexts and chunks, `[G, C, m]`; a `TrunkLayer` keeps them apart.

    Example:
        >>> import torch, hyperkernels as hk
        >>> trunk = hk.nn.MLPTrunk((10, 10), 96, context_features=96)
        >>> trunk(torch.randn(12, 96), torch.randn(5, 96)).shape
        torch.Size([5, 12, 10])
    """

    def __init__(
        self,
        layers: Sequence[int],
        embedding_features: int,
        *,
        context_features: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation(activation)
        if not isinstance(layers, Sequence) or not layers:
            raise ValueError(f"layers: got {layers!r}, wanted at least one width")
        for width in layers:
            check_sizes(layers=width)
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout!r}, wanted 0 to 1")
        factory = {"device": device, "dtype": dtype}
        super().__init__(layers[0], embedding_features, context_features, factory)
        self.activation, self.dropout = activation, dropout
        self.layers = nn.ModuleList(nn.Linear(a, b, **factory) for a, b in pairwise(layers))

    def mix(self, tokens: Tensor) -> Tensor:
        apply_ = ACTIVATIONS[self.activation].apply_
        tokens = F.dropout(apply_(tokens), self.dropout, self.training)
        for layer in self.layers:
            tokens = F.dropout(apply_(layer(tokens)), self.dropout, self.training)
        return tokens

    def extra_repr(self) -> str:
        return f"activation={self.activation}, dropout={self.dropout}"


class CNNTrunk(Tokens):
    """Chunks in their order as a sequence, `depth` convolutions over it, relu after each: neighbours see each other.

    Args:
        width: m.
        embedding_features, context_features: as of `MLPTrunk`.
        kernel_size: chunks that a convolution sees, odd.
        depth: how many convolutions.
    """

    def __init__(
        self,
        width: int,
        embedding_features: int,
        *,
        context_features: int | None = None,
        kernel_size: int = 3,
        depth: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(width, embedding_features, context_features, factory)
        check_sizes(kernel_size=kernel_size, depth=depth)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size}, wanted an odd number")
        convolutions = (nn.Conv1d(width, width, kernel_size, padding="same", **factory) for _ in range(depth))
        self.layers = nn.ModuleList(convolutions)

    def mix(self, tokens: Tensor) -> Tensor:
        signal = tokens.mT
        for layer in self.layers:
            signal = F.relu(layer(signal))
        return signal.mT


class RNNTrunk(Tokens):
    """Chunks in their order as a sequence, through a GRU: each is generated knowing those before it.

    Args: `width`, `embedding_features`, `context_features` as of `CNNTrunk`; `depth`, the GRU's layers.
    """

    def __init__(
        self,
        width: int,
        embedding_features: int,
        *,
        context_features: int | None = None,
        depth: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(width, embedding_features, context_features, factory)
        check_sizes(depth=depth)
        self.layer = nn.GRU(width, width, depth, batch_first=True, **factory)

    def mix(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens)[0]


class AttentionTrunk(Tokens):
    """Chunks as tokens that attend to each other: a transformer encoder of `depth` layers.

    Args: `width`, `embedding_features`, `context_features` as of `CNNTrunk`; `heads`, which must divide width; `depth`;
    `dropout`.
    """

    def __init__(
        self,
        width: int,
        embedding_features: int,
        *,
        context_features: int | None = None,
        heads: int = 4,
        depth: int = 1,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(width, embedding_features, context_features, factory)
        check_sizes(heads=heads, depth=depth)
        if width % heads:
            raise ValueError(f"heads: got {heads}, wanted a divisor of width {width}")
        given = {"dropout": dropout, "batch_first": True, **factory}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, heads, 2 * width, **given) for _ in range(depth))

    def mix(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens
