"""`HyperResidual`: a frozen layer and a generated change of its weight."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hyperkernels.deferred import DeferredWeight
from hyperkernels.nn.ambient import context as ambient_context
from hyperkernels.nn.layer import HyperLayer, weight_of
from hyperkernels.weight import form


class HyperResidual(nn.Module):
    """`y = W x + b + D(z) x`, where W and b are those of a dense layer and frozen, and D is generated and never formed.

    An adapter: D is one hyper layer, or two in a row, whose product `B(z) A(z)` is of low rank, a generated LoRA. The
    last one's head is zero, so that at first the layer is the dense one.

    Args:
        base: `nn.Linear`, the `Conv1D` of transformers, or `nn.Conv1d`, `2d`, `3d`; its parameters stop learning.
        change: hyper layers without biases, the first of base's inputs, the last of its outputs.

    Call:
        `layer(x, context=None, context_ids=None)`, as of `HyperLinear`.

    Example:
        >>> import torch, hyperkernels as hk
        >>> base = torch.nn.Linear(64, 32)
        >>> layer = hk.nn.HyperResidual(base, [hk.HyperLinear(64, 32, bias=False, context_features=3, width=4)])
        >>> x = torch.randn(5, 64)
        >>> torch.equal(layer(x, torch.randn(5, 3)), base(x))
        True

    Source: low-rank changes, Hu et al. 2021 (LoRA); generated ones, Mahabadi et al. 2021 (Hyperformer).
    """

    def __init__(self, base: nn.Module, change: Sequence[HyperLayer]) -> None:
        super().__init__()
        if not isinstance(getattr(base, "weight", None), nn.Parameter):
            raise TypeError(f"base: got {type(base).__name__}, wanted a dense layer")
        if not change or not all(isinstance(layer, HyperLayer) and layer.bias is None for layer in change):
            raise ValueError(f"change: got {change}, wanted hyper layers without biases")
        self.base = base.requires_grad_(False)
        self.change = nn.ModuleList(change)
        with torch.no_grad():
            change[-1].head.zero_()

    def forward(self, x: Tensor, context: Tensor | None = None, context_ids: Tensor | None = None) -> Tensor:
        moved = x
        for layer in self.change:
            moved = layer(moved, context, context_ids)
        return self.base(x) + moved

    @property
    def weight(self) -> Tensor:
        """`W + D`, for code that reads a layer's weight; whatever computes with it forms it."""
        base: Any = self.base.weight

        def made() -> Tensor:
            change = self._formed_change()
            return base + (change if weight_of(self.base) is base else change.T)

        return DeferredWeight(self.change[-1].head, base.shape, made)  # type: ignore[arg-type]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @torch.no_grad()
    def to_dense(self, context: Tensor | None = None) -> Any:
        """The base with the change of one context added, trainable."""
        dense = copy.deepcopy(self.base).requires_grad_(True)
        with nullcontext() if context is None else ambient_context(context):
            weight_of(dense).add_(self._formed_change())
        return dense.train(self.training)

    def _formed_change(self) -> Tensor:
        change, *rest = (form(layer.weight) for layer in self.change)  # type: ignore[arg-type]
        for weight in rest:  # of a kernel of one position: the rank's channels to the outputs
            change = (weight.flatten(1) @ change.flatten(1)).unflatten(1, change.shape[1:])
        return change
