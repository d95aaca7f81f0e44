"""How the torch backend cuts a step into blocks, and what the step costs there."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

from hyperkernels.call import Call
from hyperkernels.chunking import ceil_div
from hyperkernels.planner import Cost, Step, workspace_bytes


class Machine(NamedTuple):
    """The cost model's constants: what a well-shaped product, main memory and the cache level that blocks are cut
    for sustain, the size of a block that stays in that level, and what a product costs beside."""

    flops_per_s: float
    memory_bytes_per_s: float
    cache_bytes_per_s: float
    block_bytes: int
    product_us: float


MACHINES = {
    "cpu": Machine(1.3e11, 1.5e10, 5e10, 4 << 20, 10.0),
    "cuda": Machine(4e14, 3.5e12, 6e12, 64 << 20, 10.0),
}


def _machine(call: Call) -> Machine:
    return MACHINES.get(call.device, MACHINES["cpu"])


def estimate(call: Call, step: Step) -> Cost:
    """Arithmetic, memory traffic and the traffic of the intermediate (written, copied into the next product's layout,
    read) do not overlap: each product is a call of its own."""
    machine = _machine(call)
    formed = call.numbers(call.intermediate(step.order)) * call.dtype.itemsize
    seconds = (
        step.flops / machine.flops_per_s
        + step.bytes_moved / machine.memory_bytes_per_s
        + (1 + 3 * len(step.outputs)) * formed / machine.cache_bytes_per_s
    )
    calls_us = machine.product_us * (1 + len(step.outputs))
    return Cost(1e6 * seconds + calls_us, workspace(call, step.order))


def workspace(call: Call, order: str) -> int:
    blocks = call.sizes | block_sizes(call, order)
    return formed_bytes(call, order, blocks) + passing_bytes(call, blocks)


def block_count(call: Call, order: str) -> int:
    return prod(ceil_div(call.sizes[label], size) for label, size in block_sizes(call, order).items())


def _bytes(call: Call, blocks: dict[str, int], labels: str) -> int:
    return prod(blocks[label] for label in labels) * call.dtype.itemsize


def formed_bytes(call: Call, order: str, blocks: dict[str, int]) -> int:
    """What a block forms: the intermediate twice (as it comes, and in the next product's layout), and those operands
    that are formed or gathered for the block rather than viewed in place."""
    total = 2 * _bytes(call, blocks, call.intermediate(order))
    if call.activation or call.mapped:
        total += 3 * _bytes(call, blocks, call.labels["hidden"])
    if call.per_chunk_heads:
        total += 2 * _bytes(call, blocks, call.labels["head"])
    return total


def passing_bytes(call: Call, blocks: dict[str, int]) -> int:
    """A block's rows of x and y, which cropping pads, products rearrange and results come in."""
    return sum(_bytes(call, blocks, call.labels[slot]) for slot in ("x", "y"))


def split_labels(call: Call, order: str) -> str:
    """The labels that may be split to make a block's intermediate smaller, first to last."""
    own = {"generate": "gij", "head_first": "gtr", "hidden_first": "gtq"}[order]
    if call.window and order != "generate":
        own += "k"  # an image has many positions
    return "ij" + own if call.per_chunk_heads else own


def block_sizes(call: Call, order: str) -> dict[str, int]:
    """Halve the labels in turn until x and y pass through half the workspace, and what a block forms fits the cache
    level that it is meant for, or the other half. Labels that stay whole are left out."""
    return _block_sizes(call, order, workspace_bytes() // 2)


@lru_cache(maxsize=4096)
def _block_sizes(call: Call, order: str, half: int) -> dict[str, int]:
    blocks = call.sizes
    for label in "gt":
        while blocks[label] > 1 and passing_bytes(call, blocks) > half:
            blocks[label] = ceil_div(blocks[label], 2)
    limit = half if call.window else min(half, _machine(call).block_bytes)
    for label in split_labels(call, order):
        while blocks[label] > 1 and formed_bytes(call, order, blocks) > limit:
            blocks[label] = ceil_div(blocks[label], 2)
    return {label: size for label, size in blocks.items() if size < call.sizes[label]}
