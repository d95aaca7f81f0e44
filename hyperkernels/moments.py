"""Second moments of hidden over its chunks, `u^T u`, and Gram matrices of heads, `P P^T`: what squares of generated
weights are made of, `||sum_k h_k (x) p_k||^2 = sum_kl (H^T H)[k,l] (P P^T)[k,l]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperkernels.backends import native_moments
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.watched import transformed, wrapped


def unrounded(run: Callable[..., Any]) -> Callable[..., Any]:
    """Outside of autocast, which would take products, and squares with them, in half precision."""

    @wraps(run)
    def full(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return run(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return run(*args, **kwargs)

    return full


class Layer(NamedTuple):
    """A hidden layer by its chunks: formed `[G, C, m]`, or additive `[G, C, 1, m]`; times a scale `[C, 1]`, or none."""

    hidden: Tensor | AdditiveHidden
    scale: Tensor | None

    def formed(self) -> Tensor:
        hidden = self.hidden.materialize()[:, :, 0] if isinstance(self.hidden, AdditiveHidden) else self.hidden
        return hidden if self.scale is None else self.scale * hidden


def gram(*heads: Tensor) -> Tensor:
    """`P P^T`, `[*, m, m]` of `[*, m, numbers]`, or of two with `[P; P - P']` in its place, `[*, 2 m, 2 m]`."""
    if not transformed():
        return Gram.apply(*heads)  # type: ignore[return-value]
    vectors = _apart(*heads)
    return vectors @ vectors.mT


def _apart(head: Tensor, other: Tensor | None = None) -> Tensor:
    return head if other is None else torch.cat([head, head - other], -2)


class Gram(torch.autograd.Function):
    """`gram`, whose backward is one product."""

    @staticmethod
    def forward(ctx, *heads):
        vectors = _apart(*heads)
        ctx.save_for_backward(*heads, *[vectors] * (len(heads) > 1))
        return vectors @ vectors.mT

    @staticmethod
    @unrounded
    def backward(ctx, d):
        *heads, vectors = ctx.saved_tensors
        side = d + d.mT
        if not heads:
            return side @ vectors
        if torch.is_grad_enabled():  # this is to be differentiated again
            vectors = _apart(*heads)
        own, apart = side.chunk(2, -2)
        needs = ctx.needs_input_grad
        return (own + apart) @ vectors if needs[0] else None, -apart @ vectors if needs[1] else None


def side_by_side(*layers: Layer) -> Tensor:
    """u, formed: of one layer h, `[G, C, m]`, of two `[h - h', h']`, `[G, C, 2 m]`."""
    hidden = layers[0].formed()
    if len(layers) == 1:
        return hidden
    hidden, others = torch.broadcast_tensors(hidden, layers[1].formed())
    return torch.cat([hidden - others, others], -1)


def moments(*layers: Layer) -> Tensor:
    """`sum_c u[g,c]^T u[g,c]` of every context: of one layer u = h, `[G, m, m]`, of two u = `[h - h', h']`, `[G, 2 m,
    2 m]`, by which nearly equal ones lose no digits. Of additive layers u is formed in cache, and again in backward."""
    if not _in_cache(layers):
        return gram(side_by_side(*layers).mT)
    hiddens: list[Any] = [layer.hidden for layer in layers]
    tensors = [value for h, layer in zip(hiddens, layers) for value in (h.context, h.chunks, layer.scale)]
    return Moments.apply(hiddens[0].activation, *tensors)  # type: ignore[return-value]


def _in_cache(layers: Sequence[Layer]) -> bool:
    """Whether the native engine takes them: additive, alike, with scales that do not learn."""
    hiddens = [layer.hidden for layer in layers if isinstance(layer.hidden, AdditiveHidden)]
    if len(hiddens) < len(layers) or transformed():
        return False
    kinds = {(h.shape, h.activation, h.dtype, h.device.type) for h in hiddens}
    if len(kinds) > 1 or not native_moments.supports(hiddens[0]):
        return False
    scales = [layer.scale for layer in layers if layer.scale is not None]
    learns = torch.is_grad_enabled() and any(scale.requires_grad for scale in scales)
    return not learns and not wrapped(*scales, *[t for h in hiddens for t in (h.context, h.chunks)])


def _threes(values: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    return list(zip(values[::3], values[1::3], values[2::3]))


class Moments(torch.autograd.Function):
    """`moments` of additive layers, by an activation and each one's context, chunks and scale."""

    @staticmethod
    def forward(ctx, activation, *tensors):
        ctx.activation = activation
        ctx.save_for_backward(*tensors)
        return native_moments.Run(_threes(tensors), activation).moments()

    @staticmethod
    @unrounded
    def backward(ctx, d):
        tensors: Any = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # this is to be differentiated again
            tensors = [value if value is None else value.view_as(value) for value in tensors]  # one may be in both
            layers = [Layer(AdditiveHidden(c, h, ctx.activation), scale) for c, h, scale in _threes(tensors)]
            wanted = [tensor for tensor, needed in zip(tensors, needs) if needed]
            found = iter(torch.autograd.grad(gram(side_by_side(*layers).mT), wanted, d, create_graph=True))
            return None, *[next(found) if needed else None for needed in needs]
        run = native_moments.Run(_threes(tensors), ctx.activation)
        pairs = run.pull_back(d + d.mT, [context or chunks for context, chunks, _ in _threes(needs)])
        return None, *[grad for pair in pairs for grad in (*(pair or (None, None)), None)]
