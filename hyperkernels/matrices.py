"""Generated weights as matrices, and sums over their chunks by `m x m` matrices: what `algebra` is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from hyperkernels.chunking import Grid
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.weight import GeneratedWeight


class Matrix(NamedTuple):
    """A generated weight as a matrix: hidden `[G, I, J, m]`, head `[m, rows, cols]` or `[I*J, m, rows, cols]`, the
    positions of a kernel among its columns, and a head_bias among its heads; and a key of what the head is made of."""

    hidden: Tensor
    head: Tensor
    grid: Grid
    key: tuple[int, ...]

    @classmethod
    def of(cls, weight: GeneratedWeight, name: str = "weight") -> Matrix:
        if not isinstance(weight, GeneratedWeight):
            raise TypeError(f"{name}: got {type(weight).__name__}, wanted a GeneratedWeight")
        hidden = weight.hidden
        dense = hidden.materialize() if isinstance(hidden, AdditiveHidden) else hidden
        dense = dense if dense.dim() == 4 else dense[None]
        N, K, *kernel = (*weight.shape, 1) if weight.dim() == 1 else weight.shape
        per_chunk = weight.head.dim() == 4 + len(kernel)
        first = per_chunk + 2
        head, bias = weight.head.flatten(first), weight.settings["head_bias"]
        key = (id(weight.head), id(bias))
        if bias is not None:
            bias = bias.flatten(bias.dim() - 1 - len(kernel))
            if bias.dim() == 3 and not per_chunk:
                head = head.expand(len(bias), *head.shape)
            width = head.dim() - 3
            bias = bias.expand(*head.shape[:width], *bias.shape[-2:]).unsqueeze(width)
            head = torch.cat([head, bias], width)
            dense = torch.cat([dense, torch.ones_like(dense[..., :1])], -1)
        rows, cols = head.shape[-2:]
        scaled = weight.scale * dense if weight.scale != 1 else dense
        return cls(scaled, head, Grid(N, K * prod(kernel), rows, cols), key)


class Part(NamedTuple):
    """Chunks that are cropped alike: hidden `[G, C, m]`, what is left of the head, `[m, n]` or `[C, m, n]`, and a key
    that is equal where that is."""

    hidden: Tensor
    head: Tensor
    key: tuple[int, ...]


def parts_of(matrix: Matrix) -> Iterator[Part]:
    """The whole chunks, the last row of chunks, the last column, and the corner, where they are cropped."""
    hidden, head, grid, of = matrix
    I, J = grid.I, grid.J
    for i, r in cropped_alike(I, grid.rows, grid.out_features):
        for j, q in cropped_alike(J, grid.cols, grid.in_features):
            own = head.unflatten(0, (I, J))[i, j].flatten(0, 1) if head.dim() == 4 else head
            key = (*of, r, q, *((i.start, j.start) if head.dim() == 4 else ()))
            yield Part(hidden[:, i, j].flatten(1, 2), own[..., :r, :q].flatten(-2), key)


def cropped_alike(count: int, size: int, extent: int) -> list[tuple[slice, int]]:
    """Which of `count` chunks have how many of `size` rows left, or columns."""
    last = extent - (count - 1) * size
    if last == size:
        return [(slice(0, count), size)]
    return [(slice(0, count - 1), size)] * (count > 1) + [(slice(count - 1, count), last)]


def mixed(hidden: Tensor, grams: Tensor) -> Tensor:
    """Hidden `[G, C, m]` times `[m, m']`, or one for each chunk."""
    return torch.einsum("gcm,cmn->gcn", hidden, grams) if grams.dim() == 3 else hidden @ grams


def pairs(a: Matrix, b: Matrix) -> Iterator[tuple[Tensor, Tensor]]:
    """`<W, W'>` is the sum over these of their products: `[G, C*m']` of a, and of b."""
    for left, right in zip(parts_of(a), parts_of(b)):
        yield mixed(left.hidden, left.head @ right.head.mT).flatten(1), right.hidden.flatten(1)


def sum_of_squares(matrices: Iterable[Matrix]) -> Tensor:
    """`sum_l ||M_l||^2`, `[G]`: of chunks that read the same head `P P^T` is made once."""
    groups: dict[tuple[int, ...], list[Part]] = {}
    for matrix in matrices:
        for part in parts_of(matrix):
            groups.setdefault(part.key, []).append(part)
    found = []
    for parts in groups.values():
        head = parts[0].head
        hidden = torch.cat([part.hidden for part in parts], 1) if len(parts) > 1 else parts[0].hidden
        found.append((mixed(hidden, head @ head.mT) * hidden).sum((1, 2)))
    return torch.stack(found).sum(0).clamp_min(0)


def inner(left: Matrix, right: Matrix) -> Tensor:
    if min(len(left.hidden), len(right.hidden)) > 1 and len(left.hidden) != len(right.hidden):
        raise ValueError(f"b: got {len(right.hidden)} contexts, wanted a's {len(left.hidden)}, or one")
    return torch.stack([(u * v).sum(1) for u, v in pairs(left, right)]).sum(0)


def squared_distances(couples: Iterable[tuple[Matrix, Matrix]]) -> Tensor:
    """`sum_l ||W_l - W'_l||^2`, `[G]`; heads that are the same are told apart once."""
    found, differences, heads = [], [], {}
    for left, right in couples:
        if left.head.shape != right.head.shape:
            found.append(inner(left, left) + inner(right, right) - 2 * inner(left, right))
            continue
        key = (*left.key, *right.key)
        if key not in heads:
            heads[key] = torch.cat([left.head, left.head - right.head], left.head.dim() - 3)
        own, others = torch.broadcast_tensors(left.hidden, right.hidden)
        differences.append(Matrix(torch.cat([own - others, others], -1), heads[key], left.grid, key))
    if differences:
        found.append(sum_of_squares(differences))
    return torch.stack(found).sum(0).clamp_min(0)
