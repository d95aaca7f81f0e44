"""Two products in one pass over the rows, for the orders head_first and hidden_first: every contraction of the form.

An intermediate `t[b,s,k,o] = sum_d u[b,s,d] f[k,o,d]` is formed on chip, tile by tile, and consumed at once:

    contract_rows    v[b,o,n] = sum_{s,k} t[b,s,k,o] w[s,k,n]
    contract_sums    w[s,k,n] = sum_{b,o} t[b,s,k,o] v[b,o,n]

| contraction, order   | u [b,s,d]   | f [k,o,d]      | w [s,k,n]      | v [b,o,n]   |
|----------------------|-------------|----------------|----------------|-------------|
| y, head_first        | x [b,j,q]   | head [k,r,q]   | hidden [j,k,i] | y [b,r,i]   |
| dhidden, head_first  | x [b,j,q]   | head [k,r,q]   | dhidden        | dy [b,r,i]  |
| dx, head_first       | dy [b,r,i]  | hidden [k,j,i] | head [r,k,q]   | dx [b,j,q]  |
| dhead, head_first    | dy [b,r,i]  | hidden [k,j,i] | dhead          | x [b,j,q]   |

hidden_first exchanges `(i, j)` with `(r, q)` and hidden with head. What differs from row to row is strides.

A program of contract_rows keeps a tile `[(b,o), n]` of v in registers and walks s and k; one of contract_sums keeps a
tile `[(s,k), n]` of w and walks the rows and o. t is multiplied as `[(b,s), d] x [d, (o,k)]`, turned on chip to
`[(b,o), (s,k)]`, and multiplied again: two products of tensor-core size for each step.

Flops: `2 B S D M O + 2 B S M O N` for B rows, each of the first product again for every tile of n (contract_sums: of k
or s too). Bytes, of contract_rows: u for every tile of n and o (and every step, unless one tile of it is held),
f for every tile of rows and n, w for every tile of rows and o, v once.
"""

import triton
import triton.language as tl

from hyperkernels.kernels.operands import (
    context_of,
    dot,
    load_factor,
    load_features,
    pull_back,
    rounded,
    rows_of,
    store_factor,
    store_features,
    tiles_of,
)


@triton.jit
def form(u, f, entry, token, there, g, s, k, o, held,
         ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ONE_D: tl.constexpr,
         BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """A tile `[token, s, o, k]` of t. `held` is u's, or None."""
    b_t = tl.zeros([BT * BS, BO * BK], tl.float32)
    if ONE_D:
        d = tl.arange(0, BD)
        b_u = tl.reshape(load_features(u, entry, token, there, s, d), [BT * BS, BD]) if held is None else held
        b_f = tl.trans(tl.reshape(load_factor(f, g, o, k, d, ACTIVATION), [BO * BK, BD]))
        b_t = dot(b_u, b_f, b_t, PRECISION)
    else:
        for d0 in range(0, u.size_inner, BD):
            d = d0 + tl.arange(0, BD)
            b_u = tl.reshape(load_features(u, entry, token, there, s, d), [BT * BS, BD])
            b_f = tl.trans(tl.reshape(load_factor(f, g, o, k, d, ACTIVATION), [BO * BK, BD]))
            b_t = dot(b_u, b_f, b_t, PRECISION)
    return rounded(tl.reshape(b_t, [BT, BS, BO, BK]), u.pointer.dtype.element_ty)


@triton.jit
def contract_rows(u, f, w, v, batch, partial_stride,
                  ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ONE_D: tl.constexpr, ONE_S: tl.constexpr,
                  SPLITS: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
                  BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Grid: (tiles of rows x SPLITS of s and k, tiles of n, tiles of o). With splits, v has a plane of sums each."""
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    g = context_of(batch, tile, BT)
    entry, token, there = rows_of(batch, tile, g, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    o = tl.program_id(2) * BO + tl.arange(0, BO)
    held = None
    if ONE_D and ONE_S:
        held = load_features(u, entry, token, there, tl.arange(0, BS), tl.arange(0, BD))
        held = tl.reshape(held, [BT * BS, BD])
    steps_k = tl.cdiv(w.width, BK)
    steps = tl.cdiv(w.size_outer, BS) * steps_k
    b_v = tl.zeros([BT * BO, BN], tl.float32)
    for step in range(steps * split // SPLITS, steps * (split + 1) // SPLITS):
        s = step // steps_k * BS + tl.arange(0, BS)
        k = step % steps_k * BK + tl.arange(0, BK)
        b_t = form(u, f, entry, token, there, g, s, k, o, held, ACTIVATION, PRECISION, ONE_D, BT, BS, BK, BO, BD)
        b_t = tl.reshape(tl.permute(b_t, (0, 2, 1, 3)), [BT * BO, BS * BK])
        b_w = tl.reshape(load_factor(w, g, s, k, n, ACTIVATION), [BS * BK, BN])
        b_v = dot(b_t, b_w, b_v, PRECISION)
    b_v = tl.reshape(b_v, [BT, BO, BN])
    store_features(v, entry, token, there, o, n, b_v, v.pointer + split.to(tl.int64) * partial_stride)


@triton.jit
def contract_sums(u, f, v, w, sums, context_sums, batch, partial_stride,
                  ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ONE_D: tl.constexpr, BY_CONTEXT: tl.constexpr,
                  SPLITS: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
                  BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Grid: (contexts with BY_CONTEXT x SPLITS of the rows x tiles of s x tiles of k, tiles of n).

    `sums` is w's derivative, a plane for each split. Where w is an additive hidden, with a `context`, it is that of its
    chunks, and `context_sums [tile of s, tile of n, context, k]` has what belongs to the contexts.
    """
    tiles_k = tl.cdiv(w.width, BK)
    tiles_w = tl.cdiv(w.size_outer, BS) * tiles_k
    tile_s = tl.program_id(0) % tiles_w // tiles_k
    split = tl.program_id(0) // tiles_w % SPLITS
    s = tile_s * BS + tl.arange(0, BS)
    k = tl.program_id(0) % tiles_k * BK + tl.arange(0, BK)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    steps_o = tl.cdiv(v.size_outer, BO)
    _, tiles = tiles_of(batch, batch.contexts - 1, BT)
    own = tl.program_id(0) // tiles_w // SPLITS  # 0 unless BY_CONTEXT
    if BY_CONTEXT:
        first, end = tiles_of(batch, own, BT)
        begin_g, end_g = own, own + 1
        begin, end = first + (end - first) * split // SPLITS, first + (end - first) * (split + 1) // SPLITS
    elif w.context is not None:  # a context's rows stay together
        begin_g, end_g = batch.contexts * split // SPLITS, batch.contexts * (split + 1) // SPLITS
        begin, end = 0, tiles
    else:
        begin, end = tiles * split // SPLITS, tiles * (split + 1) // SPLITS
        begin_g, end_g = context_of(batch, begin, BT), context_of(batch, tl.maximum(end, 1) - 1, BT) + 1
    b_w = tl.zeros([BS * BK, BN], tl.float32)
    b_chunks = tl.zeros([BS, BK, BN], tl.float32)
    for g in range(begin_g, end_g):
        first_tile, end_tile = tiles_of(batch, g, BT)
        for step in range(tl.maximum(first_tile, begin) * steps_o, tl.minimum(end_tile, end) * steps_o):
            entry, token, there = rows_of(batch, step // steps_o, g, BT)
            o = step % steps_o * BO + tl.arange(0, BO)
            b_t = form(u, f, entry, token, there, g, s, k, o, None, ACTIVATION, PRECISION, ONE_D, BT, BS, BK, BO, BD)
            b_t = tl.reshape(tl.permute(b_t, (1, 3, 0, 2)), [BS * BK, BT * BO])
            b_v = tl.reshape(load_features(v, entry, token, there, o, n), [BT * BO, BN])
            b_w = dot(b_t, b_v, b_w, PRECISION)
        if w.context is not None:
            plane = (tile_s * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * batch.contexts + g
            b_dhidden = tl.reshape(b_w, [BS, BK, BN])
            b_chunks += pull_back(w, g, s, k, n, b_dhidden, context_sums + plane * w.width, ACTIVATION)
            b_w = tl.zeros([BS * BK, BN], tl.float32)
    if w.context is None:
        b_chunks = tl.reshape(b_w, [BS, BK, BN])
    store_factor(sums, own, s, k, n, b_chunks, sums.pointer + split.to(tl.int64) * partial_stride)
