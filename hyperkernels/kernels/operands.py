"""What the kernels read: x and y row by row, hidden and head, tile by tile.

A tile of rows is `[token, outer, inner]` and one of a factor `[outer, k, inner]`, the width in the middle; their sizes
are powers of two, and what lies past an end is zero but in an additive hidden.
"""

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

from hyperkernels.kernels.activations import activate, slope

# The interpreter holds bf16 as integers and multiplies those: there, products are taken of fp32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


class Batch(NamedTuple):
    """Which rows of x and y use which context. Rows come context by context, `rows` of each, and row n is token
    `n % tokens` of entry `n // tokens`.

    Mapped, the rows of context g are `starts[g]` to `starts[g + 1]`, tile n has rows of `context_of_tile[n]` alone,
    those of g begin with `first_tile[g]`, and row n belongs to `entries[n // tokens]`.
    """

    contexts: int
    rows: int
    tokens: int
    starts: Any = None
    entries: Any = None
    context_of_tile: Any = None
    first_tile: Any = None


class Features(NamedTuple):
    """x or y `[entry, token, feature]`: feature `n_outer * outer + n_inner * inner`, if it is below `limit`. With
    `rows` and `columns`, tables by token and by feature, those say where in an entry it lies, not the strides."""

    pointer: Any
    stride_entry: int
    stride_token: int
    stride_feature: int
    size_outer: int
    size_inner: int
    outer: int
    inner: int
    limit: int
    rows: Any = None
    columns: Any = None


class Factor(NamedTuple):
    """hidden or head `[context, outer, k, inner]`; an additive hidden's chunks, and its `context [context, k]`, else
    None."""

    pointer: Any
    context: Any
    stride_context: int
    stride_outer: int
    stride_k: int
    stride_inner: int
    size_outer: int
    width: int
    size_inner: int
    context_stride: int
    context_stride_k: int


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x to the nearest of DTYPE; the interpreter would cut bf16 off."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def tiles_of(batch, g, BT: tl.constexpr):
    """The tiles of context g: the first, and past the last."""
    if batch.starts is None:
        tiles = tl.cdiv(batch.rows, BT)
        first, end = g * tiles, (g + 1) * tiles
    else:
        first, end = tl.load(batch.first_tile + g), tl.load(batch.first_tile + g + 1)
    return first, end


@triton.jit
def context_of(batch, tile, BT: tl.constexpr):
    if batch.starts is None:
        g = tile // tl.cdiv(batch.rows, BT)
    else:
        g = tl.minimum(tl.load(batch.context_of_tile + tile), batch.contexts - 1)
    return g.to(tl.int64)


@triton.jit
def rows_of(batch, tile, g, BT: tl.constexpr):
    """The entry and the token of a tile's rows, and whether there is such a row: `[BT]` each."""
    if batch.starts is None:
        begin = g * batch.rows + tile % tl.cdiv(batch.rows, BT) * BT
        end = (g + 1) * batch.rows
    else:
        begin = tl.load(batch.starts + g) + (tile - tl.load(batch.first_tile + g)) * BT
        end = tl.load(batch.starts + g + 1)
    row = begin + tl.arange(0, BT).to(tl.int64)
    there = row < end
    entry = row // batch.tokens
    if batch.starts is not None:
        entry = tl.load(batch.entries + entry, mask=there, other=0)
    return entry, row % batch.tokens, there


@triton.jit
def feature_tile(tensor, entry, token, there, outer, inner):
    """Offsets `[token, outer, inner]`, and which of them there are: a chunk at the edge may be cropped."""
    feature = outer[:, None] * tensor.outer + inner[None, :] * tensor.inner
    inside = (outer[:, None] < tensor.size_outer) & (inner[None, :] < tensor.size_inner) & (feature < tensor.limit)
    if tensor.rows is None:
        row, column = token * tensor.stride_token, feature * tensor.stride_feature
    else:
        row = tl.load(tensor.rows + token, mask=there, other=0)
        column = tl.load(tensor.columns + feature, mask=inside, other=0)
    row += entry * tensor.stride_entry
    return row[:, None, None] + column[None, :, :], there[:, None, None] & inside[None, :, :]


@triton.jit
def load_features(tensor, entry, token, there, outer, inner):
    offset, mask = feature_tile(tensor, entry, token, there, outer, inner)
    return tl.load(tensor.pointer + offset, mask=mask, other=0)


@triton.jit
def store_features(tensor, entry, token, there, outer, inner, value, p_plane):
    offset, mask = feature_tile(tensor, entry, token, there, outer, inner)
    tl.store(p_plane + offset, rounded(value, tensor.pointer.dtype.element_ty), mask=mask)


@triton.jit
def factor_tile(factor, outer, k, inner):
    """Offsets `[outer, k, inner]` within a context, and which of them there are."""
    outer, k, inner = outer[:, None, None], k[None, :, None], inner[None, None, :]
    mask = (outer < factor.size_outer) & (k < factor.width) & (inner < factor.size_inner)
    offset = outer.to(tl.int64) * factor.stride_outer + k.to(tl.int64) * factor.stride_k
    offset = offset + inner.to(tl.int64) * factor.stride_inner
    return offset, mask


@triton.jit
def pre_activation(factor, g, outer, k, inner):
    """`chunks + context`, in fp32, of an additive hidden."""
    offset, mask = factor_tile(factor, outer, k, inner)
    chunks = tl.load(factor.pointer + offset, mask=mask, other=0).to(tl.float32)
    at = factor.context + tl.cast(g, tl.int64) * factor.context_stride + k.to(tl.int64) * factor.context_stride_k
    context = tl.load(at, mask=k < factor.width, other=0).to(tl.float32)
    return chunks + context[None, :, None], mask


@triton.jit
def load_factor(factor, g, outer, k, inner, ACTIVATION: tl.constexpr):
    """A tile of a factor; where it has a `context`, of `activation(chunks + context)`. Past an end that is not zero,
    but what it is multiplied by is."""
    if factor.context is None:
        offset, mask = factor_tile(factor, outer, k, inner)
        return tl.load(factor.pointer + tl.cast(g, tl.int64) * factor.stride_context + offset, mask=mask, other=0)
    else:
        pre, _ = pre_activation(factor, g, outer, k, inner)
        return rounded(activate(pre, ACTIVATION), factor.pointer.dtype.element_ty)


@triton.jit
def store_factor(factor, g, outer, k, inner, value, p_plane):
    offset, mask = factor_tile(factor, outer, k, inner)
    p_factor = p_plane + tl.cast(g, tl.int64) * factor.stride_context + offset
    tl.store(p_factor, rounded(value, factor.pointer.dtype.element_ty), mask=mask)


@triton.jit
def pull_back(factor, g, outer, k, inner, dhidden, p_dcontext, ACTIVATION: tl.constexpr):
    """From the derivative by an additive hidden, `[outer, k, inner]`, that by its pre-activation. The sum over outer
    and inner, which is the context's, is stored."""
    pre, mask = pre_activation(factor, g, outer, k, inner)
    d = dhidden * tl.where(mask, slope(pre, ACTIVATION), 0)
    tl.store(p_dcontext + k, tl.sum(tl.sum(d, 2), 0), mask=k < factor.width)
    return d
