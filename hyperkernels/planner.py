"""Which order evaluates a call, at what cost, in blocks of what size: closed form, no timing at run time.

What an order is, and which intermediate it forms, is told in `call.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from hyperkernels.call import ORDERS, PAIRS, Call
from hyperkernels.chunking import Grid, ceil_div


class Machine(NamedTuple):
    """The cost model's constants: what a well-shaped product, main memory and the cache level that blocks are cut
    for sustain, and the size of a block that stays in that level."""

    flops_per_s: float
    memory_bytes_per_s: float
    cache_bytes_per_s: float
    block_bytes: int


MACHINES = {
    "cpu": Machine(1.3e11, 1.5e10, 5e10, 4 << 20),
    "cuda": Machine(4e14, 3.5e12, 6e12, 64 << 20),
}

_workspace_bytes = 64 << 20


def _machine(call: Call) -> Machine:
    return MACHINES.get(call.device, MACHINES["cpu"])


def set_workspace_mib(mib: int) -> None:
    """Bound the workspace of each call, beyond its inputs and outputs, to `mib` MiB; 64 to begin with.

    The least a call can do with is one chunk, or one token's share of an intermediate, neither larger than
    `head` or one context's `hidden`; a smaller bound is held as nearly as that allows.

    Raises:
        ValueError: `mib` is not a positive integer.

    Example:
        >>> import hyperkernels as hk
        >>> hk.set_workspace_mib(64)
    """
    global _workspace_bytes
    if not isinstance(mib, int) or mib < 1:
        raise ValueError(f"mib: got {mib!r}, wanted a positive integer")
    _workspace_bytes = mib << 20
    plan_contraction.cache_clear()
    _step.cache_clear()
    block_sizes.cache_clear()


class Step(NamedTuple):
    """Form the intermediate of `order` from the pair `forms`; each output in `outputs` consumes it."""

    order: str
    forms: tuple[str, str]
    outputs: tuple[str, ...]
    flops: int
    bytes_moved: int
    workspace_bytes: int


class Cost(NamedTuple):
    order: str
    flops: int
    bytes_moved: int
    workspace_bytes: int
    time_us: float


@dataclass(frozen=True)
class Plan:
    """What will run, and what was weighed against it: `candidates[output]` is each order's cost for that output
    on its own."""

    call: Call
    wanted: tuple[str, ...]
    steps: tuple[Step, ...]
    candidates: dict[str, tuple[Cost, ...]]

    def order_of(self, slot: str) -> str:
        return next(step.order for step in self.steps if slot in step.outputs)

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def bytes_moved(self) -> int:
        return sum(step.bytes_moved for step in self.steps)


@lru_cache(maxsize=4096)
def plan_contraction(call: Call, wanted: tuple[str, ...], order: str | None = None) -> Plan:
    """The cheapest orders for the partials of phi by the slots in `wanted`, sharing intermediates between them."""
    orders = ORDERS if order is None else (order,)
    choices = [tuple(_steps(call, wanted, choice)) for choice in product(orders, repeat=len(wanted))]
    steps = min(choices, key=lambda steps: sum(_time_us(call, step) for step in steps))
    candidates = {slot: tuple(_alone(call, slot, name) for name in ORDERS) for slot in wanted}
    return Plan(call, wanted, steps, candidates)


def _steps(call: Call, wanted: tuple[str, ...], orders: tuple[str, ...]) -> Iterator[Step]:
    """Outputs whose order and pair agree consume one intermediate."""
    shared: dict[tuple[str, tuple[str, str]], list[str]] = {}
    for slot, order in zip(wanted, orders):
        left, right = PAIRS[order]
        shared.setdefault((order, right if slot in left else left), []).append(slot)
    for (order, forms), outputs in shared.items():
        yield _step(call, order, forms, tuple(outputs))


@lru_cache(maxsize=4096)
def _step(call: Call, order: str, forms: tuple[str, str], outputs: tuple[str, ...]) -> Step:
    consumers = next(pair for pair in PAIRS[order] if pair != forms)
    labels, sizes = call.labels, call.sizes

    def flops(pair: tuple[str, str]) -> int:
        return 2 * call.numbers(labels[pair[0]] + labels[pair[1]])

    def numbers(slot: str) -> int:
        if slot == "hidden" and call.activation:
            return call.numbers("gk") + call.numbers("ijk")
        return call.numbers(labels[slot])

    blocks = sizes | block_sizes(call, order)
    touched = sum(numbers(slot) for slot in forms) + len(outputs) * sum(numbers(slot) for slot in consumers)
    return Step(
        order,
        forms,
        outputs,
        flops(forms) + len(outputs) * flops(consumers),
        call.dtype.itemsize * touched,
        formed_bytes(call, order, blocks) + passing_bytes(call, blocks),
    )


def _time_us(call: Call, step: Step) -> float:
    """Arithmetic, memory traffic and the traffic of the intermediate (written, copied into the next product's
    layout, read) do not overlap: each product is a call of its own."""
    machine = _machine(call)
    formed = call.numbers(call.intermediate(step.order)) * call.dtype.itemsize
    seconds = (
        step.flops / machine.flops_per_s
        + step.bytes_moved / machine.memory_bytes_per_s
        + (1 + 3 * len(step.outputs)) * formed / machine.cache_bytes_per_s
    )
    return 1e6 * seconds


def _alone(call: Call, slot: str, order: str) -> Cost:
    (step,) = _steps(call, (slot,), (order,))
    return Cost(order, step.flops, step.bytes_moved, step.workspace_bytes, _time_us(call, step))


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
    return "ij" + own if call.per_chunk_heads else own


@lru_cache(maxsize=4096)
def block_sizes(call: Call, order: str) -> dict[str, int]:
    """Halve the labels in turn until x and y pass through half the workspace, and what a block forms fits the cache
    level that it is meant for, or the other half. Labels that stay whole are left out."""
    blocks = call.sizes
    half = _workspace_bytes // 2
    for label in "gt":
        while blocks[label] > 1 and passing_bytes(call, blocks) > half:
            blocks[label] = ceil_div(blocks[label], 2)
    limit = min(half, _machine(call).block_bytes)
    for label in split_labels(call, order):
        while blocks[label] > 1 and formed_bytes(call, order, blocks) > limit:
            blocks[label] = ceil_div(blocks[label], 2)
    return {label: size for label, size in blocks.items() if size < call.sizes[label]}


def default_chunk(out_features: int, in_features: int, width: int) -> tuple[int, int]:
    """The cheapest `(rows, cols)` whose generated weight can still have full rank.

    Among powers of two (and the whole extent), minimise FLOPs beside a dense layer's: `width*rows/N + width/cols`
    in head_first, and never more than the 1 of generate, subject to
    `width * min(I, J) * min(rows, cols) >= min(N, K)`; of equals, the one with the fewest parameters. Where no
    chunk allows full rank, the one that allows the highest.

    Example:
        >>> default_chunk(4096, 4096, 32)
        (8, 256)
    """

    def extents(n: int) -> list[int]:
        return [1 << p for p in range(n.bit_length()) if 1 << p < n] + [n]

    def key(chunk: tuple[int, int]) -> tuple[float, ...]:
        grid = Grid(out_features, in_features, *chunk)
        flops = width * chunk[0] / out_features + width / chunk[1]
        padded = grid.I * chunk[0] * grid.J * chunk[1] / (out_features * in_features)
        parameters = width * (grid.I * grid.J + prod(chunk))
        return (-grid.rank_bound(width), min(flops * padded, 1.0), parameters)

    return min(product(extents(out_features), extents(in_features)), key=key)
