"""Which order evaluates a call, at what cost: closed form, no timing at run time.

What an order is, and which intermediate it forms, is told in `call.py`; how a backend cuts a step, and what time it
takes, is the backend's to estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any, NamedTuple

from hyperkernels.call import ORDERS, PAIRS, Call
from hyperkernels.chunking import Grid

_workspace_bytes = 64 << 20


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


def workspace_bytes() -> int:
    return _workspace_bytes


class Cost(NamedTuple):
    """What a step takes; `by` names the way of doing it, where a backend has more than one."""

    time_us: float
    workspace_bytes: int
    by: str = ""


class Step(NamedTuple):
    """Form the intermediate of `order` from the pair `forms`; each output in `outputs` consumes it."""

    order: str
    forms: tuple[str, str]
    outputs: tuple[str, ...]
    flops: int
    bytes_moved: int
    cost: Cost = Cost(0.0, 0)

    @property
    def time_us(self) -> float:
        return self.cost.time_us


Estimate = Callable[[Call, Step], Cost]


@dataclass(frozen=True)
class Plan:
    """What will run, and what was weighed against it: `candidates[output]` is each order's step for that output
    on its own. In `prepared` a backend keeps what it need not work out again."""

    call: Call
    wanted: tuple[str, ...]
    steps: tuple[Step, ...]
    candidates: dict[str, tuple[Step, ...]]
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def order_of(self, slot: str) -> str:
        return next(step.order for step in self.steps if slot in step.outputs)

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def bytes_moved(self) -> int:
        return sum(step.bytes_moved for step in self.steps)


def plan_contraction(
    call: Call, wanted: tuple[str, ...], order: str | None, estimate: Estimate, shares: bool = True
) -> Plan:
    """The cheapest orders for the partials of phi by the slots in `wanted`; with `shares` they share intermediates."""
    orders = ORDERS if order is None else (order,)
    choices = [tuple(_steps(call, wanted, choice, estimate, shares)) for choice in product(orders, repeat=len(wanted))]
    steps = min(choices, key=lambda steps: sum(step.time_us for step in steps))
    candidates = {
        slot: tuple(step for name in ORDERS for step in _steps(call, (slot,), (name,), estimate, shares))
        for slot in wanted
    }
    return Plan(call, wanted, steps, candidates)


def _steps(
    call: Call, wanted: tuple[str, ...], orders: tuple[str, ...], estimate: Estimate, shares: bool
) -> Iterator[Step]:
    """Outputs whose order and pair agree consume one intermediate, if the backend shares them."""
    together: dict[tuple[str, tuple[str, str], str], list[str]] = {}
    for slot, order in zip(wanted, orders):
        left, right = PAIRS[order]
        together.setdefault((order, right if slot in left else left, "" if shares else slot), []).append(slot)
    for (order, forms, _), outputs in together.items():
        yield _step(call, order, forms, tuple(outputs), estimate)


def _step(call: Call, order: str, forms: tuple[str, str], outputs: tuple[str, ...], estimate: Estimate) -> Step:
    consumers = next(pair for pair in PAIRS[order] if pair != forms)
    labels = call.labels

    def flops(pair: tuple[str, str]) -> int:
        return 2 * call.numbers(labels[pair[0]] + labels[pair[1]])

    def numbers(slot: str) -> int:
        if slot == "hidden" and call.activation:
            return call.numbers("gk") + call.numbers("ijk")
        return call.numbers(labels[slot])

    touched = sum(numbers(slot) for slot in forms) + len(outputs) * sum(numbers(slot) for slot in consumers)
    step = Step(order, forms, outputs, flops(forms) + len(outputs) * flops(consumers), call.dtype.itemsize * touched)
    return step._replace(cost=estimate(call, step))


def default_chunk(
    out_features: int, in_features: int, width: int, positions: int = 1, largest: int | None = None
) -> tuple[int, int]:
    """The cheapest `(rows, cols)` whose generated weight can still have full rank.

    Among powers of two (and the whole extent), minimise FLOPs beside a dense layer's: `width*rows/N + width/cols`
    in head_first, and never more than the 1 of generate, subject to
    `width * min(I, J) * min(rows, cols) >= min(N, K)`; of equals, the one with the fewest parameters. Where no
    chunk allows full rank, the one that allows the highest. A convolution's kernel has `positions`: each column of a
    chunk is as many of the weight's, and rows divide `out_features`, of a group. A chunk has at most `largest` numbers.

    Example:
        >>> default_chunk(4096, 4096, 32)
        (8, 256)
    """

    def extents(n: int) -> list[int]:
        return [1 << p for p in range(n.bit_length()) if 1 << p < n] + [n]

    def key(chunk: tuple[int, int]) -> tuple[float, ...]:
        grid = Grid(out_features, in_features, *chunk)
        flops = width * chunk[0] / out_features + width / (chunk[1] * positions)
        padded = grid.I * chunk[0] * grid.J * chunk[1] / (out_features * in_features)
        parameters = width * (grid.I * grid.J + prod(chunk) * positions)
        return (-grid.rank_bound(width, positions), min(flops * padded, 1.0), parameters)

    rows = [n for n in extents(out_features) if positions == 1 or out_features % n == 0]
    chunks = list(product(rows, extents(in_features)))
    if largest is not None:
        chunks = [chunk for chunk in chunks if prod(chunk) * positions <= largest]
    if not chunks:
        raise ValueError(f"chunk: got at most {largest} numbers, wanted at least the {positions} of one kernel")
    return min(chunks, key=key)
