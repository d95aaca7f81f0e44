"""The trunk: the part of a hypernetwork that turns a context and a chunk's embedding into `hidden`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hyperkernels.hidden import ACTIVATIONS, AdditiveHidden, check_activation
from hyperkernels.nn.ambient import check_context


class Trunk(nn.Module):
    """`hidden[g,i,j] = activation(A z[g] + B embedding[i,j] + b)`: one layer on `[context, chunk embedding]`.

    With the head that follows it, a two-layer MLP. The layer is separable, so a conditional trunk returns
    `AdditiveHidden` and a context per sample costs one vector each; a static one (no context) returns
    `hidden [I, J, m]`.

    Args:
        chunks: `(I, J)`, the grid of chunks to embed.
        width: m.
        context_features: size of z; None for a static trunk.
        embedding_features: size of a chunk's learned embedding; `width` by default.
        activation: see `AdditiveHidden`.

    Raises:
        ValueError: a size below 1, or an unknown activation.

    Example:
        >>> import torch, hyperkernels as hk
        >>> hk.nn.Trunk((4, 2), 8)().shape, hk.nn.Trunk((4, 2), 8, context_features=3)(torch.randn(5, 3)).shape
        (torch.Size([4, 2, 8]), (5, 4, 2, 8))
    """

    def __init__(
        self,
        chunks: tuple[int, int],
        width: int,
        *,
        context_features: int | None = None,
        embedding_features: int | None = None,
        activation: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        features = width if embedding_features is None else embedding_features
        sizes = {"width": width, "embedding_features": features}
        if context_features is not None:
            sizes["context_features"] = context_features
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: got {size!r}, wanted a positive integer")
        self.activation = activation
        self.context_features = context_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Parameter(torch.empty(*chunks, features, **factory))
        self.chunk_layer = nn.Linear(features, width, **factory)
        self.context_layer = nn.Linear(context_features, width, bias=False, **factory) if context_features else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Unit variance from each summand, for a z of unit variance."""
        nn.init.normal_(self.embedding)
        nn.init.zeros_(self.chunk_layer.bias)
        for layer in (self.chunk_layer, self.context_layer):
            if layer is not None:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, context: Tensor | None = None) -> Tensor | AdditiveHidden:
        chunks = self.chunk_layer(self.embedding)
        if self.context_layer is None:
            return ACTIVATIONS[self.activation].apply_(chunks)
        if context is None:
            raise ValueError("context: got None, wanted [G, context_features]: this trunk is conditional")
        z = check_context(context, "context", self.context_features)
        return AdditiveHidden(self.context_layer(z), chunks, self.activation)

    def extra_repr(self) -> str:
        I, J, features = self.embedding.shape
        return f"chunks={I}x{J}, embedding_features={features}, activation={self.activation}"
