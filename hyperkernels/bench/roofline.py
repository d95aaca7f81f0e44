"""The least time that a contraction's arithmetic and its bytes allow."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from hyperkernels.call import PAIRS, Call


class Roofline(NamedTuple):
    flops: int
    bytes_moved: int
    time_us: float
    bound: str


def roofline(call: Call, order: str, outputs: tuple[str, ...], flops_per_s: float, bytes_per_s: float) -> Roofline:
    """Of the partials by `outputs`, each forming its own intermediate: the flops of `order`, and every tensor read or
    written once."""
    pairs = sum(2 * call.numbers(call.labels[a] + call.labels[b]) for a, b in PAIRS[order])
    names = ("x", "y", "hidden", "head", *(("chunks",) if call.activation else ()))
    flops = len(outputs) * pairs
    moved = len(outputs) * call.dtype.itemsize * sum(prod(call.shape(name)) for name in names)
    compute_us, memory_us = 1e6 * flops / flops_per_s, 1e6 * moved / bytes_per_s
    return Roofline(flops, moved, max(compute_us, memory_us), "compute" if compute_us > memory_us else "memory")
