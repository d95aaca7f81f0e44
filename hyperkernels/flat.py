"""`FlatWeight`: a stretch of one generated parameter vector, whose chunks straddle rows and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hyperkernels.chunking import ceil_div
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.operators import check_context_ids
from hyperkernels.planner import workspace_bytes
from hyperkernels.watched import transformed
from hyperkernels.weight import FORM, FUNCTIONS, AbsentWeight, absent, formed_of, shape_of
from hyperkernels.weight_products import CONVOLUTION


class FlatWeight(AbsentWeight):
    """`W[g].flatten()[n] = scale * v[g, start + n]`, where `v[g, c*size + s] = sum_k hidden[g,c,k] head[k,s] (+
    head_bias[s])` is one vector for all the weights of a network, cut into chunks wherever they fall.

    `F.linear`, `F.conv1d`, `2d` and `3d` take it as a weight and form it row by row of the layer, as many rows at once
    as half the workspace holds; so does backward, which forms them again. Otherwise as `GeneratedWeight`.

    Args:
        hidden: `[C, m]`, `[G, C, m]`, or `AdditiveHidden` `[G, C, 1, m]`.
        head: `[m, size]`.
        shape: the weight's.
        start: where in the vector it begins.
        head_bias: `[size]`, the same for all chunks.
        scale: a number, or a tensor of one.
        context_ids: as for `GeneratedWeight`.

    Raises:
        ValueError: a shape does not fit, or the vector ends before the weight does.

    Example:
        >>> import torch, hyperkernels as hk
        >>> weight = hk.FlatWeight(torch.randn(5, 4), torch.randn(4, 30), (8, 14), 20)
        >>> torch.nn.functional.linear(torch.randn(3, 14), weight).shape
        torch.Size([3, 8])

    Source: the layout of von Oswald et al. 2020 (Continual learning with hypernetworks).
    """

    start: int

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor | AdditiveHidden,
        head: Tensor,
        shape: Sequence[int],
        start: int = 0,
        *,
        head_bias: Tensor | None = None,
        scale: float | Tensor = 1.0,
        context_ids: Tensor | None = None,
    ) -> FlatWeight:
        size, chunks = tuple(hidden.shape), _chunks(hidden)
        flat = size[2] == 1 if isinstance(hidden, AdditiveHidden) else len(size) in (2, 3)
        if not flat or head.dim() != 2 or size[-1] != head.shape[0]:
            raise ValueError(f"head: got shape {list(head.shape)}, wanted [m, size], and hidden {list(size)} [*, C, m]")
        end = start + prod(shape)
        if start < 0 or end > chunks * head.shape[1]:
            raise ValueError(f"shape: got {start} to {end}, wanted numbers of a vector of {chunks * head.shape[1]}")
        if head_bias is not None and head_bias.shape != head.shape[1:]:
            raise ValueError(f"head_bias: got shape {list(head_bias.shape)}, wanted [{head.shape[1]}]")
        weight = absent(cls, head, tuple(shape))
        weight.hidden, weight.head, weight.start, weight.scale = hidden, head, start, scale
        weight.contexts = size[0] if len(size) > 2 else 1
        weight.settings = {"head_bias": head_bias, "context_ids": context_ids}
        return weight

    def hidden_of(self, first: int, last: int) -> Tensor:
        """Of chunks first to last, `[G, last - first, m]`."""
        hidden = self.hidden
        if isinstance(hidden, AdditiveHidden):
            return hidden.with_chunks(hidden.chunks[first:last]).materialize()[:, :, 0]
        return hidden[..., first:last, :] if hidden.dim() == 3 else hidden[None, first:last]


def _chunks(hidden: Tensor | AdditiveHidden) -> int:
    return hidden.shape[1] if isinstance(hidden, AdditiveHidden) else hidden.shape[-2]


def stretches(begin: int, end: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Numbers `begin` to `end` of a vector in chunks of `size`, as `(first, last, a, b)`: of chunks first to last those
    from a to b. What is cut of the first chunk and of the last stands apart.

    >>> list(stretches(5, 23, 6))
    [(0, 1, 5, 6), (1, 3, 0, 6), (3, 4, 0, 5)]
    """
    first, last = begin // size, ceil_div(end, size)
    cuts = [begin] + [c * size for c in sorted({first + 1, last - 1}) if begin < c * size < end] + [end]
    for a, b in pairwise(cuts):
        c, own = a // size, ceil_div(b, size)
        yield (c, own, a - c * size, b - c * size) if own == c + 1 else (c, own, 0, size)


def _span(weight: FlatWeight, begin: int, end: int) -> Tensor:
    """Numbers of the weight, `[G, end - begin]`: of the first and last chunk no more than they have of it."""
    pieces = []
    for first, last, a, b in stretches(begin + weight.start, end + weight.start, weight.head.shape[1]):
        piece = weight.hidden_of(first, last) @ weight.head[:, a:b]
        if weight.settings["head_bias"] is not None:
            piece = piece + weight.settings["head_bias"][a:b]
        pieces.append(piece.flatten(1))
    return weight.scale * torch.cat(pieces, 1)


def _by_rows(weight: FlatWeight, apply: Callable[[Tensor, slice], Tensor], dim: int, groups: int = 1) -> Tensor:
    """`apply(rows [G, n, *], own)` for as many rows of the layer as fit half the workspace, side by side at `dim`;
    backward forms them again. They are whole groups, which `own` tells, or part of one."""
    count, *rest = shape_of(weight)
    width = prod(rest)
    most = max(1, workspace_bytes() // 2 // (weight.contexts * width * weight.head.dtype.itemsize))

    def run(begin: int, end: int) -> Tensor:
        rows = _span(weight, begin * width, end * width)
        of_groups = slice(begin // size, ceil_div(end, size))
        return apply(rows.reshape(len(rows), end - begin, *rest), of_groups)

    size = count // groups
    whole = max(1, most // size) * size
    ends = [(first, min(first + whole, count)) for first in range(0, count, whole)]
    blocks = [(row, min(row + most, end)) for first, end in ends for row in range(first, end, min(most, whole))]
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(run, *block, use_reentrant=False) for block in blocks], dim)
    return torch.cat([run(*block) for block in blocks], dim)


def _entries(weight: FlatWeight, x: Tensor, bias: Tensor | None) -> tuple[FlatWeight, Tensor | None]:
    """Weight and bias with a context for each entry of x, or one for all."""
    ids, hidden, bias = weight.settings["context_ids"], weight.hidden, formed_of(bias)
    if ids is not None and not transformed():
        check_context_ids(ids, weight.contexts)
    if ids is not None and weight.contexts > 1:
        hidden = hidden.of_contexts(ids) if isinstance(hidden, AdditiveHidden) else hidden[ids]
        given = {"head_bias": weight.settings["head_bias"], "scale": weight.scale}
        weight = FlatWeight(hidden, weight.head, shape_of(weight), weight.start, **given)
        bias = bias[ids] if bias is not None and bias.dim() == 2 else bias
    entries = x.shape[0] if x.dim() else 1
    if weight.contexts not in (1, entries):
        raise ValueError(f"x: got {entries} entries, wanted {weight.contexts}, one for each context")
    return weight, bias


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if isinstance(input, AbsentWeight) or not isinstance(weight, FlatWeight):
        return NotImplemented
    weight, bias = _entries(weight, input, bias)
    x = input.reshape(weight.contexts, prod(input.shape[:-1]) // max(weight.contexts, 1), shape_of(weight)[1])
    y = _by_rows(weight, lambda rows, _: x @ rows.mT, -1).reshape(*input.shape[:-1], shape_of(weight)[0])
    if bias is None:
        return y
    return y + (bias if bias.dim() == 1 else bias.reshape(len(bias), *[1] * (y.dim() - 2), -1))


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(input: Tensor, weight: Tensor, bias: Tensor | None = None, *given: Any, **named: Any) -> Any:
        if isinstance(input, AbsentWeight) or not isinstance(weight, FlatWeight):
            return NotImplemented
        if input.dim() == len(shape_of(weight)) - 1:  # one image, and no batch
            return run(input[None], weight, bias, *given, **named)[0]
        settings = dict(zip(CONVOLUTION.split(), given)) | named
        groups, (N, K) = settings.pop("groups", 1), shape_of(weight)[:2]
        if N % groups or input.shape[1] != K * groups:
            raise ValueError(f"input: got shape {list(input.shape)}, wanted {K * groups} channels for {groups} groups")
        weight, bias = _entries(weight, input, bias)

        def apply(rows: Tensor, of: slice) -> Tensor:
            x = input[:, of.start * K : of.stop * K]
            settings["groups"] = of.stop - of.start
            if len(rows) == 1:
                return function(x, rows[0], None, **settings)
            return torch.cat([function(image[None], own, None, **settings) for image, own in zip(x, rows)])

        y = _by_rows(weight, apply, 1, groups)
        return y if bias is None else y + bias[(..., *[None] * (y.dim() - 2))]

    return run


def _form(weight: FlatWeight) -> Tensor:
    shape = shape_of(weight)
    formed = _span(weight, 0, prod(shape))
    return formed.reshape(shape if len(formed) == 1 else (len(formed), *shape))


FUNCTIONS[FlatWeight] = {
    F.linear: _linear,
    **{function: _convolution(function) for function in (F.conv1d, F.conv2d, F.conv3d)},
}
FORM[FlatWeight] = _form
