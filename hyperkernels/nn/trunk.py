"""The trunk: the part of a hypernetwork that turns a context and a chunk's embedding into `hidden`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hyperkernels.chunking import check_sizes
from hyperkernels.hidden import ACTIVATIONS, AdditiveHidden, check_activation
from hyperkernels.nn.ambient import check_context


class TrunkLayer(nn.Module):
    """`hidden[g,c] = activation(A z[g] + B embedding[c] + b)`: one layer on `[context, chunk embedding]`.

    With the head that follows it, a two-layer MLP. The layer is separable, so a conditional one returns
    `AdditiveHidden` and a context per sample costs one vector each.

    Args:
        width: m.
        embedding_features: size of a chunk's embedding.
        context_features: size of z; None for a static trunk.
        activation: see `AdditiveHidden`.

    Call:
        `trunk(embedding, context=None)`, with embeddings `[C, e]` or, in a grid, `[I, J, e]`, and z `[G,
        context_features]`: hidden `[C, m]` or `[I, J, m]`, of a conditional trunk as `AdditiveHidden`, a row of chunks
        each.

    Raises:
        ValueError: a size below 1, or an unknown activation; no context where one is needed.

    Example:
        >>> import torch, hyperkernels as hk
        >>> trunk = hk.nn.TrunkLayer(8, 4, context_features=3)
        >>> trunk(torch.randn(6, 4), torch.randn(5, 3)).shape
        (5, 6, 1, 8)
    """

    def __init__(
        self,
        width: int,
        embedding_features: int,
        *,
        context_features: int | None = None,
        activation: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        check_sizes(width=width, embedding_features=embedding_features, context_features=context_features)
        self.activation = activation
        self.context_features = context_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.chunk_layer = nn.Linear(embedding_features, width, **factory)
        self.context_layer = nn.Linear(context_features, width, bias=False, **factory) if context_features else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Unit variance from each summand, for an embedding and a z of unit variance. Units k and k + m // 2 see the
        same of z, so that half of hidden's directions have nothing that all chunks have in common."""
        nn.init.zeros_(self.chunk_layer.bias)
        for layer in (self.chunk_layer, self.context_layer):
            if layer is not None:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        if self.context_layer is not None:
            with torch.no_grad():
                half = self.chunk_layer.out_features // 2
                self.context_layer.weight[half : 2 * half] = self.context_layer.weight[:half]

    def forward(self, embedding: Tensor, context: Tensor | None = None) -> Tensor | AdditiveHidden:
        z, chunks = context_for(context, self.context_features), embedded(self.chunk_layer, embedding)
        if self.context_layer is None:
            return ACTIVATIONS[self.activation].apply_(chunks)
        grid = chunks if chunks.dim() == 3 else chunks[:, None]
        return AdditiveHidden(self.context_layer(z), grid, self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class Trunk(nn.Module):
    """A `TrunkLayer` with learned embeddings of its own: a whole hypernetwork but the head, `trunk(context)`.

    Args:
        chunks: `(I, J)`, the grid of chunks to embed.
        embedding_features: size of a chunk's learned embedding; `width` by default.
        width, context_features, activation: as of `TrunkLayer`.

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
        features = width if embedding_features is None else embedding_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layer = TrunkLayer(width, features, context_features=context_features, activation=activation, **factory)
        self.embedding = nn.Parameter(torch.empty(*chunks, features, **factory))
        nn.init.normal_(self.embedding)

    def reset_parameters(self) -> None:
        self.layer.reset_parameters()
        nn.init.normal_(self.embedding)

    def forward(self, context: Tensor | None = None) -> Tensor | AdditiveHidden:
        return self.layer(self.embedding, context)

    def extra_repr(self) -> str:
        I, J, features = self.embedding.shape
        return f"chunks={I}x{J}, embedding_features={features}"


class FreeTrunk(nn.Module):
    """`hidden[g,i,j,:] = chunks[i,j,:] + A z[g]`: no trunk, but a parameter for each number of hidden, which a context
    moves. What a weight was fitted by stays as it is, and learns on.

    Args:
        chunks: `(I, J)`.
        width: m.
        context_features: size of z; None for a static one. A is zero at first.

    Example:
        >>> import torch, hyperkernels as hk
        >>> hk.nn.FreeTrunk((4, 2), 8)().shape, hk.nn.FreeTrunk((4, 2), 8, context_features=3)(torch.randn(5, 3)).shape
        (torch.Size([4, 2, 8]), (5, 4, 2, 8))
    """

    def __init__(
        self,
        chunks: tuple[int, int],
        width: int,
        *,
        context_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(width=width, context_features=context_features)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.context_features = context_features
        self.chunks = nn.Parameter(torch.empty(*chunks, width, **factory))
        self.context_layer = nn.Linear(context_features, width, bias=False, **factory) if context_features else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.chunks)
        if self.context_layer is not None:
            nn.init.zeros_(self.context_layer.weight)

    def forward(self, context: Tensor | None = None) -> Tensor | AdditiveHidden:
        z = context_for(context, self.context_features)
        if self.context_layer is None:  # what counts FLOPs looks for the graph of a module's result, if it may learn
            inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
            return self.chunks.detach() if inference else self.chunks
        return AdditiveHidden(self.context_layer(z), self.chunks, "identity")

    def extra_repr(self) -> str:
        I, J, width = self.chunks.shape
        return f"chunks={I}x{J}, width={width}"


class ColumnTrunk(nn.Module):
    """`hidden[c * columns + q] = A[q] embedding[c] + b[q]`: Ha et al.'s generator of kernels, whose first layer has a
    matrix for each input channel of a chunk, and whose second, the head, is the same for all.

    For chunks of one column, `chunk=(rows, 1)`: `columns` of them side by side have one embedding.

    Args:
        columns: how many columns an embedding stands for; it must divide a target's.
        width: m.
        embedding_features: size of an embedding.

    Call:
        `trunk(embedding [C, embedding_features])`: hidden `[C * columns, m]`. It takes no context.

    Raises:
        ValueError: a size below 1, or a context.

    Example:
        >>> import torch, hyperkernels as hk
        >>> trunk = hk.nn.ColumnTrunk(16, 64, 64)
        >>> net = hk.HyperNet({"kernel": (64, 32, 3, 3)}, chunk=(16, 1), width=64, trunk=trunk, head_bias=True)
        >>> sum(p.numel() for p in net.parameters()) - net.embedding.numel()  # one generator, of any number of kernels
        75920

    Source: Ha, Dai and Le 2016 (HyperNetworks), section 3.1.
    """

    def __init__(
        self,
        columns: int,
        width: int,
        embedding_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(columns=columns, width=width, embedding_features=embedding_features)
        self.chunks_per_embedding, self.context_features = columns, None
        self.weight = nn.Parameter(torch.empty(columns, embedding_features, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(columns, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, embedding: Tensor, context: Tensor | None = None) -> Tensor:
        context_for(context, None)
        return (torch.einsum("ce,qem->cqm", embedding, self.weight) + self.bias).flatten(0, 1)

    def extra_repr(self) -> str:
        columns, features, width = self.weight.shape
        return f"columns={columns}, width={width}, embedding_features={features}"


def context_for(context: Tensor | None, features: int | None) -> Any:
    """What a trunk makes of its context, `[G, features]`, or None of a static one, which takes none."""
    if features is None and context is not None:
        raise ValueError("context: got one, wanted none: this trunk was built without context_features")
    if features is not None and context is None:
        raise ValueError("context: got None, wanted [G, context_features]: this trunk is conditional")
    return None if context is None else check_context(context, "context", features)


def embedded(layer: nn.Linear, embedding: Tensor) -> Tensor:
    """What a trunk makes of the chunks' embeddings first."""
    if embedding.shape[-1] != layer.in_features:
        raise ValueError(f"embedding: got shape {list(embedding.shape)}, wanted {layer.in_features} embedding_features")
    return layer(embedding)


def _takes(function: Any, *given: Any) -> bool:
    try:
        inspect.signature(function).bind(*given)
    except TypeError:
        return False
    except ValueError:  # nobody can tell
        pass
    return True


def check_parts(trunk: nn.Module | None, encoder: nn.Module | None, context_features: int | None) -> None:
    """Of a hypernetwork."""
    for name, module in (("trunk", trunk), ("encoder", encoder)):
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"{name}: got {type(module).__name__}, wanted a torch.nn.Module")
    if trunk is not None and not _takes(trunk.forward, "embedding", "context"):
        got = type(trunk).__name__
        raise TypeError(f"trunk: got {got}, wanted a module that is called as trunk(embedding [C, e], context [G, z])")
    if encoder is not None and context_features is None:
        raise ValueError("encoder: got one, wanted context_features, the size of what it makes")
    makes = getattr(encoder, "features", context_features)
    if makes != context_features:
        raise ValueError(f"encoder: got one of {makes} features, wanted context_features={context_features}")
    takes = getattr(trunk, "context_features", context_features)
    if takes != context_features:
        raise ValueError(f"trunk: got one with context_features={takes}, wanted {context_features}, as is given here")
