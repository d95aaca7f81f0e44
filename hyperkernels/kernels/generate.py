"""The order generate: tiles of the weight, or of its derivative, that live on chip for one product.

In `chain`'s letters the weight is `W[(n,o),(s,d)] = sum_k w[s,k,n] f[k,o,d]`, and

    generate_rows    v[b,o,n] = sum_{s,d} W[(n,o),(s,d)] u[b,s,d]
    generate_sums    w[s,k,n] = sum_{o,d} dW[(n,o),(s,d)] f[k,o,d],   dW = sum_b v[b,o,n] u[b,s,d]

A program of generate_rows keeps a tile `[b, (n,o)]` of v and walks s and d: a dense layer whose weight tile is made
instead of loaded. One of generate_sums has one s, keeps a tile `[n, k]` of w, walks o and d, and for each of their
tiles the rows.

Flops: `2 B S D O N + 2 S D O N M` for each tile of rows (generate_sums: for each context). Bytes: u and v once per tile
of the others' labels, f and w once per program.
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
def generate_rows(u, f, w, v, batch, partial_stride,
                  ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr, BT: tl.constexpr,
                  BK: tl.constexpr, BO: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Grid: (tiles of rows x SPLITS of s and d, tiles of n, tiles of o). With splits, v has a plane of sums each."""
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    g = context_of(batch, tile, BT)
    entry, token, there = rows_of(batch, tile, g, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    o = tl.program_id(2) * BO + tl.arange(0, BO)
    steps_d = tl.cdiv(u.size_inner, BD)
    steps = u.size_outer * steps_d
    b_v = tl.zeros([BT, BN * BO], tl.float32)
    for step in range(steps * split // SPLITS, steps * (split + 1) // SPLITS):
        s = step // steps_d + tl.arange(0, 1)
        d = step % steps_d * BD + tl.arange(0, BD)
        b_W = tl.zeros([BN, BO * BD], tl.float32)
        for k0 in range(0, w.width, BK):
            k = k0 + tl.arange(0, BK)
            b_w = tl.trans(tl.reshape(load_factor(w, g, s, k, n, ACTIVATION), [BK, BN]))
            b_f = tl.reshape(tl.permute(load_factor(f, g, o, k, d, ACTIVATION), (1, 0, 2)), [BK, BO * BD])
            b_W = dot(b_w, b_f, b_W, PRECISION)
        b_W = tl.trans(rounded(tl.reshape(b_W, [BN * BO, BD]), u.pointer.dtype.element_ty))
        b_u = tl.reshape(load_features(u, entry, token, there, s, d), [BT, BD])
        b_v = dot(b_u, b_W, b_v, PRECISION)
    b_v = tl.permute(tl.reshape(b_v, [BT, BN, BO]), (0, 2, 1))
    store_features(v, entry, token, there, o, n, b_v, v.pointer + split.to(tl.int64) * partial_stride)


@triton.jit
def generate_sums(u, f, v, w, sums, context_sums, batch, partial_stride,
                  ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BY_CONTEXT: tl.constexpr, SPLITS: tl.constexpr,
                  BT: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, BN: tl.constexpr,
                  BD: tl.constexpr):  # fmt: skip
    """Grid: (contexts with BY_CONTEXT x SPLITS of o and d x s x tiles of k, tiles of n).

    `sums` and `context_sums` are `chain.contract_sums`'s, but for a plane of `context_sums` for each split too.
    """
    tiles_k = tl.cdiv(w.width, BK)
    tiles_w = w.size_outer * tiles_k
    outer = tl.program_id(0) % tiles_w // tiles_k
    split, own = tl.program_id(0) // tiles_w % SPLITS, tl.program_id(0) // tiles_w // SPLITS
    s = outer + tl.arange(0, 1)
    k = tl.program_id(0) % tiles_k * BK + tl.arange(0, BK)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    steps_d = tl.cdiv(u.size_inner, BD)
    steps = tl.cdiv(v.size_outer, BO) * steps_d
    begin_g, end_g = own, own + 1
    if not BY_CONTEXT:
        begin_g, end_g = 0, batch.contexts
    b_w = tl.zeros([BN, BK], tl.float32)
    b_chunks = tl.zeros([1, BK, BN], tl.float32)
    for g in range(begin_g, end_g):
        first, end = tiles_of(batch, g, BT)
        for step in range(steps * split // SPLITS, steps * (split + 1) // SPLITS):
            o = step // steps_d * BO + tl.arange(0, BO)
            d = step % steps_d * BD + tl.arange(0, BD)
            b_W = tl.zeros([BN * BO, BD], tl.float32)
            for tile in range(first, end):
                entry, token, there = rows_of(batch, tile, g, BT)
                b_u = tl.reshape(load_features(u, entry, token, there, s, d), [BT, BD])
                b_v = tl.permute(load_features(v, entry, token, there, o, n), (2, 1, 0))
                b_W = dot(tl.reshape(b_v, [BN * BO, BT]), b_u, b_W, PRECISION)
            b_W = rounded(tl.reshape(b_W, [BN, BO * BD]), u.pointer.dtype.element_ty)
            b_f = tl.reshape(tl.permute(load_factor(f, g, o, k, d, ACTIVATION), (0, 2, 1)), [BO * BD, BK])
            b_w = dot(b_W, b_f, b_w, PRECISION)
        if w.context is not None:
            plane = (split * w.size_outer + outer) * tl.num_programs(1) + tl.program_id(1)
            p_dcontext = context_sums + (plane.to(tl.int64) * batch.contexts + g) * w.width
            b_dhidden = tl.reshape(tl.trans(b_w), [1, BK, BN])
            b_chunks += pull_back(w, g, s, k, n, b_dhidden, p_dcontext, ACTIVATION)
            b_w = tl.zeros([BN, BK], tl.float32)
    if w.context is None:
        b_chunks = tl.reshape(tl.trans(b_w), [1, BK, BN])
    store_factor(sums, own, s, k, n, b_chunks, sums.pointer + split.to(tl.int64) * partial_stride)
