"""The form's partials by torch matrix products, in the planned order, in blocks of bounded size.

Any device and floating dtype. A step forms its intermediate block by block (`einsum` over one pair of factors) and
each output consumes it (`einsum` with the partner); the grid of blocks runs over labels of the intermediate, so an
output is either written (it has every split label) or accumulated, in fp32 or wider, in a fixed sequence: the result
is the same from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from hyperkernels.chunking import from_chunks, to_chunks
from hyperkernels.hidden import ACTIVATIONS, additive_pre
from hyperkernels.planner import PAIRS, Call, Plan, Step

Block = dict[str, slice]


def supports(call: Call, order: str | None) -> tuple[bool, str]:
    return True, "torch matmuls run anywhere"


class Group(NamedTuple):
    """Contexts that hold equally many rows of x: `contexts [g]` and `rows [g, t]`, or None for all, in place."""

    contexts: Tensor | None
    rows: Tensor | None
    sizes: dict[str, int]


def contract(
    call: Call, plan: Plan, factors: dict[str, Tensor], chunks: Tensor | None, context_ids: Tensor | None
) -> list[Tensor]:
    """The partials of phi by `plan.wanted`, in that order; with an activation the hidden one is (dcontext, dchunks)."""
    run = _Run(call, plan, factors, chunks)
    for group in _groups(call, context_ids):
        for step in plan.steps:
            for block in _blocks(step, group.sizes):
                run.block(step, group, block)
    return run.results()


def _groups(call: Call, context_ids: Tensor | None) -> Iterator[Group]:
    if context_ids is None:
        if call.entries and call.tokens:
            yield Group(None, None, call.sizes)
        return
    counts = torch.bincount(context_ids, minlength=call.contexts)
    starts = counts.cumsum(0) - counts
    entries = torch.argsort(context_ids, stable=True)
    tokens = torch.arange(call.tokens, device=entries.device)
    for count in counts.unique().tolist():
        if count and call.tokens:
            contexts = (counts == count).nonzero().squeeze(1)
            members = entries[starts[contexts, None] + torch.arange(count, device=entries.device)]
            rows = (members[..., None] * call.tokens + tokens).flatten(1)
            yield Group(contexts, rows, call.sizes | {"g": len(contexts), "t": rows.shape[1]})


def _blocks(step: Step, sizes: dict[str, int]) -> Iterator[Block]:
    """The grid of blocks; a group of more or fewer tokens than planned keeps the planned block of rows x contexts."""
    split = dict(step.blocks)
    ranges = []
    for label, size in split.items():
        count = ceil(sizes[label] / size)
        ranges.append([(label, slice(n * size, min((n + 1) * size, sizes[label]))) for n in range(count)])
    for choice in product(*ranges):
        yield dict(choice)


class _Run:
    """One call: its factors, its outputs as they fill, and where a block lies in each."""

    def __init__(self, call: Call, plan: Plan, factors: dict[str, Tensor], chunks: Tensor | None) -> None:
        self.call, self.plan, self.labels, self.grid = call, plan, call.labels, call.grid
        self.activation = ACTIVATIONS[call.activation] if call.activation else None
        self.factors = {slot: self._in_place(slot, factor) for slot, factor in factors.items()}
        self.chunks = chunks
        grid, m, device = call.grid, call.width, next(iter(factors.values())).device
        lead = (call.entries * call.tokens,) if call.mapped else (call.entries, call.tokens)
        shapes = {
            "y": (*lead, grid.I, grid.rows),
            "x": (*lead, grid.J, grid.cols),
            "hidden": (call.contexts, m) if self.activation else (call.contexts, grid.I, grid.J, m),
            "head": (grid.I, grid.J, m, grid.rows, grid.cols) if call.per_chunk_heads else (m, grid.rows, grid.cols),
            "chunks": (grid.I, grid.J, m),
        }
        wide = torch.promote_types(call.dtype, torch.float32)
        self.outputs: dict[str, Tensor] = {}
        for slot in plan.wanted:
            for name in (slot, "chunks") if slot == "hidden" and self.activation else (slot,):
                once = self._written_once(slot)
                create, dtype = (torch.empty, call.dtype) if once else (torch.zeros, wide)
                self.outputs[name] = create(shapes[name], dtype=dtype, device=device)

    def _in_place(self, slot: str, factor: Tensor) -> Tensor:
        """A view (x and y by rows where rows are gathered, a head per chunk on its grid)."""
        if slot in "xy" and self.call.mapped:
            return factor.flatten(0, 1)
        if slot == "head" and self.call.per_chunk_heads:
            return factor.unflatten(0, (self.grid.I, self.grid.J))
        return factor

    def _written_once(self, slot: str) -> bool:
        """Whether each element is the business of exactly one block, so that nothing need be zero to begin with."""
        if not (self.call.entries and self.call.tokens):
            return False
        if slot in ("hidden", "head") and (self.call.mapped or self.activation):
            return False
        step = next(step for step in self.plan.steps if slot in step.outputs)
        return all(label in self.labels[slot] for label, _ in step.blocks)

    def block(self, step: Step, group: Group, block: Block) -> None:
        labels = self.labels
        formed_labels = self.call.intermediate(step.order)
        a, b = step.forms
        formed = torch.einsum(
            f"{labels[a]},{labels[b]}->{formed_labels}", self._fetch(a, group, block), self._fetch(b, group, block)
        )
        pair = next(pair for pair in PAIRS[step.order] if pair != step.forms)
        for slot in step.outputs:
            partner = pair[1] if slot == pair[0] else pair[0]
            partial = torch.einsum(
                f"{formed_labels},{labels[partner]}->{labels[slot]}", formed, self._fetch(partner, group, block)
            )
            self._store(slot, group, block, partial)

    def _lead(self, slot: str, group: Group, block: Block) -> tuple[slice | Tensor, ...]:
        """Index of the block along the leading dimensions of `slot`: contexts, or contexts and tokens, or rows."""
        g, t = block.get("g", slice(None)), block.get("t", slice(None))
        if slot in ("x", "y"):
            return (g, t) if group.rows is None else (group.rows[g, t],)
        return (g,) if group.contexts is None else (group.contexts[g],)

    def _tail(self, slot: str, block: Block) -> tuple[slice, ...]:
        return tuple(block.get(label, slice(None)) for label in self.labels[slot] if label not in "gt")

    def _fetch(self, slot: str, group: Group, block: Block) -> Tensor:
        factor, tail = self.factors[slot], self._tail(slot, block)
        if slot == "head":
            return factor[tail]
        factor = factor[self._lead(slot, group, block)]
        if slot in ("x", "y"):
            return to_chunks(factor, self.grid.cols if slot == "x" else self.grid.rows)[(..., *tail)]
        if self.activation:
            return self.activation.apply_(self._pre(factor, tail))
        return factor[(slice(None), *tail)]

    def _pre(self, context: Tensor, tail: tuple[slice, ...]) -> Tensor:
        assert self.chunks is not None
        return additive_pre(context, self.chunks[tail])

    def _store(self, slot: str, group: Group, block: Block, partial: Tensor) -> None:
        tail = self._tail(slot, block)
        if slot == "head":
            self._add(slot, tail, partial)
            return
        lead = self._lead(slot, group, block)
        if slot == "hidden" and self.activation:
            dpre = self.activation.grad(partial, self._pre(self.factors["hidden"][lead], tail))
            wide = self.outputs["chunks"].dtype
            self._add("hidden", lead, dpre.sum((1, 2), dtype=wide))
            self._add("chunks", tail, dpre.sum(0, dtype=wide))
            return
        self._add(slot, (*lead, *tail), partial)

    def _add(self, name: str, index: tuple[slice | Tensor, ...], partial: Tensor) -> None:
        out = self.outputs[name]
        if self._written_once("hidden" if name == "chunks" else name):
            out[index] = partial
        else:
            out[index] += partial

    def results(self) -> list[Tensor]:
        call, grid = self.call, self.grid
        extent = {"y": grid.out_features, "x": grid.in_features}
        results = []
        for slot, out in self.outputs.items():
            if slot in extent:
                out = from_chunks(out, extent[slot]).reshape(call.entries, call.tokens, extent[slot])
            elif slot == "head" and call.per_chunk_heads:
                out = out.flatten(0, 1)
            results.append(out.to(call.dtype).contiguous())
        return results
