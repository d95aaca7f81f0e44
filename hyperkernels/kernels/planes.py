"""The sum of what programs summed apart: `out[n] = sum_p planes[p,n]`, in fp32, the same order each time.

Grid: blocks of BN numbers; a program walks the planes, a tile `[BP, BN]` at a time. Flops: one for each number of each
plane. Bytes: each plane once, and out.
"""

import triton
import triton.language as tl

from hyperkernels.kernels.operands import rounded


@triton.jit
def sum_planes(planes, out, count, n_planes, BP: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    there = n < count
    b_out = tl.zeros([BN], tl.float32)
    for p0 in range(0, n_planes, BP):
        p = (p0 + tl.arange(0, BP)).to(tl.int64)
        mask = (p < n_planes)[:, None] & there[None, :]
        b_out += tl.sum(tl.load(planes + p[:, None] * count + n[None, :], mask=mask, other=0.0), 0)
    tl.store(out + n, rounded(b_out, out.dtype.element_ty), mask=there)
