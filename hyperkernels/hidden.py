"""`AdditiveHidden`: the hidden layer of every context and chunk, kept as a summand per context and one per chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Activation(NamedTuple):
    """`apply_(pre)` in place, and the pullback `grad(dvalue, pre)`; both are differentiable torch expressions."""

    apply_: Callable[[Tensor], Tensor]
    grad: Callable[[Tensor, Tensor], Tensor]


def _silu_grad(d: Tensor, pre: Tensor) -> Tensor:
    s = torch.sigmoid(pre)
    return d * s * (1 + pre * (1 - s))


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda pre: pre, lambda d, pre: d),
    "relu": Activation(torch.relu_, lambda d, pre: d * (pre > 0)),
    "gelu": Activation(aten.gelu_, aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda pre: aten.gelu_(pre, approximate="tanh"),
        lambda d, pre: aten.gelu_backward(d, pre, approximate="tanh"),
    ),
    "silu": Activation(aten.silu_, _silu_grad),  # silu_backward has no derivative
    "tanh": Activation(torch.tanh_, lambda d, pre: d * (1 - torch.tanh(pre).square())),
    "sin": Activation(torch.sin_, lambda d, pre: d * torch.cos(pre)),
}


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class AdditiveHidden:
    """`hidden[g,i,j,:] = activation(context[g,:] + chunks[i,j,:])`, never held for all g at once.

    The first layer of a trunk fed `[z, chunk embedding]` is separable: its weight splits into one part that
    sees the context and one that sees the chunk. Kept apart, a context per sample costs `G*m + I*J*m`
    numbers where the hidden layer itself would cost `G*I*J*m`.

    Args:
        context: `[G, m]`, the context's part of the pre-activation, biases included. Floating.
        chunks: `[I, J, m]`, the chunks' part. The dtype and device of `context`.
        activation: one of `hyperkernels.hidden.ACTIVATIONS`: identity, relu, gelu, gelu_tanh, silu, tanh, sin.

    Memory: backward forms hidden again block by block and saves only `context` and `chunks`. Second
    derivatives with respect to either form `[G, I, J, m]`.

    Raises:
        TypeError: `context` or `chunks` is no floating tensor, or their dtypes differ.
        ValueError: a shape, device or activation is wrong.

    Example:
        >>> import torch, hyperkernels as hk
        >>> hidden = hk.AdditiveHidden(torch.randn(5, 8), torch.randn(3, 2, 8), "tanh")
        >>> hk.hyper_linear(torch.randn(5, 7, 6), hidden, torch.randn(8, 4, 3)).shape
        torch.Size([5, 7, 12])
    """

    context: Tensor
    chunks: Tensor
    activation: str

    def __post_init__(self) -> None:
        check_activation(self.activation)
        for name, value, wanted in (("context", self.context, "[G, m]"), ("chunks", self.chunks, "[I, J, m]")):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name}: got {got}, wanted a floating tensor {wanted}")
            if value.dim() != wanted.count(",") + 1:
                raise ValueError(f"{name}: got shape {list(value.shape)}, wanted {wanted}")
        if self.context.shape[-1] != self.chunks.shape[-1]:
            raise ValueError(
                f"chunks: got width {self.chunks.shape[-1]}, wanted context's width {self.context.shape[-1]}"
            )
        if self.context.dtype != self.chunks.dtype:
            raise TypeError(f"chunks: got {self.chunks.dtype}, wanted context's dtype {self.context.dtype}")
        if self.context.device != self.chunks.device:
            raise ValueError(f"chunks: on {self.chunks.device}, wanted context's device {self.context.device}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(G, I, J, m)`: the shape of the hidden layer that this stands for."""
        return (self.context.shape[0], *self.chunks.shape)  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.context.dtype

    @property
    def device(self) -> torch.device:
        return self.context.device

    def to(self, *args: Any, **kwargs: Any) -> AdditiveHidden:
        """As `torch.Tensor.to`, of both summands."""
        context, chunks = self.context.to(*args, **kwargs), self.chunks.to(*args, **kwargs)
        same = context is self.context and chunks is self.chunks
        return self if same else AdditiveHidden(context, chunks, self.activation)

    def with_chunks(self, chunks: Tensor) -> AdditiveHidden:
        """The same contexts, with other chunks: some of these, or in another order."""
        return AdditiveHidden(self.context, chunks, self.activation)

    def of_contexts(self, index: Tensor | slice) -> AdditiveHidden:
        """The same chunks, of the contexts that the index says."""
        return AdditiveHidden(self.context[index], self.chunks, self.activation)

    def materialize(self) -> Tensor:
        """The hidden layer itself, `[G, I, J, m]`, differentiable; what the fast paths avoid."""
        return ACTIVATIONS[self.activation].apply_(additive_pre(self.context, self.chunks))


def additive_pre(context: Tensor, chunks: Tensor) -> Tensor:
    """The pre-activation `[G, I, J, m]` of `AdditiveHidden`, a tensor of its own."""
    return context[:, None, None] + chunks
