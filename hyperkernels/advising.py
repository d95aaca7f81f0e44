"""`advise`: which strategy, chunk and width for a layer, at what cost; and when a plain layer does better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from hyperkernels.backends import choose_backend, plan_call
from hyperkernels.backends.torch_blocks import MACHINES
from hyperkernels.call import Call
from hyperkernels.chunking import Grid, ceil_div, check_sizes
from hyperkernels.planner import default_chunk

WIDTHS = (4, 8, 16, 32, 64, 128)
CALL_US, DENSE_CALL_US = 60, 10  # what an eager call costs beside its contraction


@dataclass(frozen=True)
class Proposal:
    """One way to generate a layer: parameters of head, chunk embeddings and trunk (m for each feature of a context come
    on top), FLOPs beside the dense layer's, the largest rank, and how many times as fast as a dense layer the planner
    expects y to be."""

    strategy: str
    chunk: tuple[int, int]
    width: int
    parameters: int
    flops: float
    rank: int
    speed: float

    @property
    def cells(self) -> tuple[str, ...]:
        """For people."""
        chunk, numbers = f"{self.chunk[0]}x{self.chunk[1]}", f"{self.parameters:,}"
        return self.strategy, chunk, f"{self.width}", numbers, f"{self.flops:.2f}", f"{self.rank}", f"{self.speed:.1f}x"


COLUMNS = ("strategy", "chunk", "m", "parameters", "FLOPs", "rank", "speed")


@dataclass(frozen=True)
class Advice:
    """Proposals, best first; `str()` is a table of them, and in words what to make of it."""

    shape: tuple[int, int]
    contexts: int
    tokens: int
    proposals: tuple[Proposal, ...]
    words: str

    @property
    def best(self) -> Proposal | None:
        return self.proposals[0] if self.proposals else None

    def __str__(self) -> str:
        N, K = self.shape
        lines = [
            f"{N}x{K}, {self.contexts} context{'s' * (self.contexts != 1)}, {self.tokens} tokens; dense: "
            f"{N * K * self.contexts:,} weights"
        ]
        for row in (COLUMNS, *(proposal.cells for proposal in self.proposals)):
            cells = (f"{cell:>{width}}" for cell, width in zip(row[1:], (12, 4, 12, 7, 6, 7)))
            lines.append(" ".join([f"{row[0]:12}", *cells]))
        return "\n".join([*lines, self.words])


def advise(
    shape: Sequence[int], *, contexts: int = 1, tokens: int = 1, budget: int | None = None, device: str = "cpu"
) -> Advice:
    """Propose how to generate a layer of `shape`, best first: of full rank, faster than dense layers, with the most
    parameters that the budget allows, which is the most that it can express.

    Args:
        shape: `(N, K)`.
        contexts: G; each has a weight of its own.
        tokens: rows of x in all.
        budget: the most parameters; by default a quarter of a layer's weights for one context, and as many as those for
            more.
        device: "cpu" or "cuda", for the cost model.

    Returns:
        An `Advice`: print it. Speeds are the planner's estimates in fp32, of y, without the trunk.

    Raises:
        ValueError: a size is not positive, or the shape not two of them.

    Example:
        >>> import hyperkernels as hk
        >>> print(hk.advise((8, 4)).words)
        A plain layer is the better choice: it has 32 weights, fewer than the parameters of any hypernetwork here.
        >>> hk.advise((4096, 4096), contexts=64, tokens=64).best.strategy
        'chunk'
    """
    if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 2:
        raise ValueError(f"shape: got {shape!r}, wanted (N, K), a layer's out and in features")
    N, K = shape
    if device not in MACHINES:
        raise ValueError(f"device: got {device!r}, wanted one of {', '.join(MACHINES)}")
    check_sizes(N=N, K=K, contexts=contexts, tokens=tokens, budget=budget)
    weights = N * K * contexts
    found = _proposals(N, K, contexts, tokens, device)
    if min(p.parameters for p in found) >= weights:
        words = f"it has {weights:,} weights, fewer than the parameters of any hypernetwork here."
        return Advice((N, K), contexts, tokens, (), f"A plain layer is the better choice: {words}")
    most = N * K // (4 if contexts == 1 else 1) if budget is None else budget
    found = [p for p in found if p.parameters <= most]
    found.sort(key=lambda p: (-p.rank, p.speed < 1, -p.parameters))
    kept: list[Proposal] = []
    for proposal in found:  # of one strategy no more than three
        if sum(p.strategy == proposal.strategy for p in kept) < 3:
            kept.append(proposal)
    return Advice((N, K), contexts, tokens, tuple(kept), _words(N, K, contexts, most, kept))


def _proposals(N: int, K: int, contexts: int, tokens: int, device: str) -> list[Proposal]:
    found = []
    for m in WIDTHS:
        ways = {("chunk", default_chunk(N, K, m)), ("component", (1, K)), ("once", (N, K))}
        for largest in (256, 1024, 4096, 16384):
            ways.add(("chunk", default_chunk(N, K, m, largest=largest)))
        for strategy, (rows, cols) in sorted(ways):
            grid = Grid(N, K, rows, cols)
            trunk = 0 if contexts == 1 else m + 1
            numbers = m * (grid.I * grid.J + prod((rows, cols)) + trunk)
            entries, T = _rows(contexts, tokens)
            activation = "tanh" if contexts > 1 else ""
            call = Call(grid, m, contexts, entries, T, activation=activation, dtype=torch.float32, device=device)
            planned = entries * T
            choose_backend(call)
            plan = plan_call(call, ("y",), None, None)[1]
            ours = sum(step.time_us for step in plan.steps)
            flops = plan.flops / (2 * planned * N * K)
            speed = (DENSE_CALL_US + _dense_us(N, K, contexts, planned, device)) / (CALL_US + ours)
            found.append(Proposal(strategy, (rows, cols), m, numbers, flops, grid.rank_bound(m), speed))
    return found


def _rows(contexts: int, tokens: int) -> tuple[int, int]:
    """Entries and the tokens of each, as many for every context."""
    return (1, tokens) if contexts == 1 else (contexts, ceil_div(tokens, contexts))


def _dense_us(N: int, K: int, contexts: int, tokens: int, device: str) -> float:
    """A dense layer for each context, whose weights lie in memory."""
    machine = MACHINES[device]
    moved = 4 * (contexts * N * K + tokens * (N + K))
    return 1e6 * max(2 * tokens * N * K / machine.flops_per_s, moved / machine.memory_bytes_per_s)


def _words(N: int, K: int, contexts: int, budget: int, kept: list[Proposal]) -> str:
    if not kept:
        return f"Nothing here has {budget:,} parameters or fewer: raise the budget, or take two layers of low rank."
    best = kept[0]
    fewer = f"{N * K * contexts / best.parameters:.0f} times fewer parameters"
    if best.speed < 1:
        return (
            f"Plain layers are the faster choice, by {1 / best.speed:.1f} times: generate for {fewer}, or for contexts "
            "to come, not for speed."
        )
    rank = "of full rank" if best.rank >= min(N, K) else f"of rank {best.rank} at most, of {min(N, K)}"
    return (
        f"Take {best.strategy}, chunks of {best.chunk[0]}x{best.chunk[1]}, m = {best.width}: {rank}, {fewer} than "
        f"{'a plain layer' if contexts == 1 else 'plain layers'}, expected {best.speed:.1f} times as fast."
    )
