"""The form's partials by torch's matrix products and convolutions, in the planned order, in blocks of bounded size.

Any device and floating dtype. A step forms its intermediate block by block (`einsum` over one pair of factors) and
each output consumes it (`einsum` with the partner); the grid of blocks runs over labels of the intermediate, so an
output is either written (it has every split label) or accumulated, in fp32 or wider, in a fixed sequence: the result
is the same from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from hyperkernels.backends.mapped import Mapped
from hyperkernels.backends.products import multiply
from hyperkernels.backends.torch_blocks import block_sizes, split_labels
from hyperkernels.call import PAIRS, Call, result_names, slot_of
from hyperkernels.chunking import to_chunks
from hyperkernels.hidden import ACTIVATIONS, additive_pre
from hyperkernels.planner import Plan, Step

Block = dict[str, slice]


def supports(call: Call, order: str | None) -> tuple[bool, str]:
    return True, "torch matmuls run anywhere"


class Group(NamedTuple):
    """Contexts that hold equally many rows of x: `contexts [g]` and `rows [g, t]`, or None for all, in place; and the
    call that they are by themselves."""

    contexts: Tensor | None
    rows: Tensor | None
    call: Call


def contract(call: Call, plan: Plan, factors: dict[str, Tensor], context_ids: Tensor | None) -> list[Tensor]:
    """The partials of phi by `plan.wanted`, in that order; with an activation the hidden one is (dcontext, dchunks)."""
    run = _Run(call, plan, factors)
    for group in _groups(call, context_ids):
        for step in plan.steps:
            for block in _blocks(group.call, step.order):
                run.block(step, group, block)
    return run.results()


def _groups(call: Call, context_ids: Tensor | None) -> Iterator[Group]:
    if context_ids is None:
        yield Group(None, None, call)
        return
    counts, starts, entries = Mapped.of(context_ids, call.contexts)
    tokens = torch.arange(call.tokens, device=entries.device)
    for count in counts.unique().tolist():
        if count:
            contexts = (counts == count).nonzero().squeeze(1)
            members = entries[starts[contexts, None] + torch.arange(count, device=entries.device)]
            rows = (members[..., None] * call.tokens + tokens).flatten(1)
            g, t = rows.shape
            yield Group(contexts, rows, call._replace(contexts=g, entries=g, tokens=t))


def _blocks(call: Call, order: str) -> Iterator[Block]:
    ranges, sizes = [], call.sizes
    for label, size in block_sizes(call, order).items():
        starts = range(0, sizes[label], size)
        ranges.append([(label, slice(start, min(start + size, sizes[label]))) for start in starts])
    for choice in product(*ranges):
        yield dict(choice)


class _Run:
    """One call: its factors, its outputs as they fill, and where a block lies in each."""

    def __init__(self, call: Call, plan: Plan, factors: dict[str, Tensor]) -> None:
        self.call, self.plan, self.labels, self.grid = call, plan, call.labels, call.grid
        self.activation = ACTIVATIONS[call.activation] if call.activation else None
        self.factors = {name: self._in_place(name, factor) for name, factor in factors.items()}
        self.like = next(iter(factors.values()))
        grid = call.grid
        self.whole = call._replace(grid=grid._replace(out_features=grid.I * grid.rows, in_features=grid.J * grid.cols))
        self.wide = torch.promote_types(call.dtype, torch.float32)
        self.names = result_names(plan.wanted, call.activation)
        self.written_once = {name for name in self.names if self._is_written_once(slot_of(name))}
        self.outputs: dict[str, Tensor] = {}

    def _in_place(self, name: str, tensor: Tensor) -> Tensor:
        """A view: x and y by rows where rows are gathered, a head per chunk on its grid."""
        if name in ("x", "y") and self.call.mapped:
            return tensor.flatten(0, 1)
        if name == "head" and self.call.per_chunk_heads:
            return tensor.unflatten(0, (self.grid.I, self.grid.J))
        return tensor

    def _is_written_once(self, slot: str) -> bool:
        """Whether each element is the business of exactly one block, so that nothing need be zero to begin with."""
        call = self.call
        if slot in ("hidden", "head") and (call.mapped or self.activation):
            return False
        order = self.plan.order_of(slot)
        # each group of contexts has blocks of its own, where they are mapped
        split = {"g", "t", *split_labels(call, order)} if call.mapped else block_sizes(call, order).keys()
        return split <= set(self.labels[slot])

    def block(self, step: Step, group: Group, block: Block) -> None:
        labels = self.labels
        formed_labels = self.call.intermediate(step.order)
        a, b = step.forms
        window = self.call.window
        parts = self._fetch(a, group, block), self._fetch(b, group, block)
        formed = multiply(window, labels[a], labels[b], formed_labels, *parts)
        pair = next(pair for pair in PAIRS[step.order] if pair != step.forms)
        for slot in step.outputs:
            partner = pair[1] if slot == pair[0] else pair[0]
            parts = formed, self._fetch(partner, group, block)
            self._store(slot, group, block, multiply(window, formed_labels, labels[partner], labels[slot], *parts))

    def _lead(self, slot: str, group: Group, block: Block) -> tuple[slice | Tensor, ...]:
        """Index of the block along the leading dimensions of `slot`: contexts, or contexts and tokens, or rows."""
        g, t = block.get("g", slice(None)), block.get("t", slice(None))
        if slot == "head":
            return ()
        if slot == "hidden":
            return (g,) if group.contexts is None else (group.contexts[g],)
        return (g, t) if group.rows is None else (group.rows[g, t],)

    def _tail(self, slot: str, block: Block) -> tuple[slice, ...]:
        return tuple(block.get(label, slice(None)) for label in self.labels[slot] if label not in "gt")

    def _chunked(self, slot: str, tensor: Tensor) -> Tensor:
        if slot not in ("x", "y"):
            return tensor
        return to_chunks(tensor, self.grid.cols if slot == "x" else self.grid.rows, -2 if self.call.window else -1)

    def _fetch(self, slot: str, group: Group, block: Block) -> Tensor:
        lead, tail = self._lead(slot, group, block), self._tail(slot, block)
        if slot == "hidden" and self.activation:
            return self.activation.apply_(self._pre(lead, tail))
        factor = self.factors[slot]
        if slot == "head":
            return factor[tail]
        return self._chunked(slot, factor[lead])[(..., *tail)]

    def _pre(self, lead: tuple[slice | Tensor, ...], tail: tuple[slice, ...]) -> Tensor:
        return additive_pre(self.factors["hidden"][lead], self.factors["chunks"][tail])

    def _store(self, slot: str, group: Group, block: Block, partial: Tensor) -> None:
        lead, tail = self._lead(slot, group, block), self._tail(slot, block)
        if slot == "hidden" and self.activation:
            dpre = self.activation.grad(partial, self._pre(lead, tail))
            self._add("hidden", lead, dpre.sum((1, 2), dtype=self.wide))
            self._add("chunks", tail, dpre.sum(0, dtype=self.wide))
        else:
            self._add(slot, (*lead, *tail), partial)

    def _add(self, name: str, index: tuple[slice | Tensor, ...], partial: Tensor) -> None:
        once = name in self.written_once
        if once and all(isinstance(part, slice) and part == slice(None) for part in index):  # one block is all of it
            self.outputs[name] = self._in_place(name, partial.reshape(self.whole.shape(name)).contiguous())
            return
        out = self._chunked(name, self._output(name))
        if once:
            out[index] = partial
        else:
            out[index] += partial

    def _output(self, name: str) -> Tensor:
        """Where the result fills, block by block."""
        if name not in self.outputs:
            shape, once = self.whole.shape(name), name in self.written_once
            new = self.like.new_empty(shape) if once else self.like.new_zeros(shape, dtype=self.wide)
            self.outputs[name] = self._in_place(name, new)
        return self.outputs[name]

    def results(self) -> list[Tensor]:
        call = self.call
        results = []
        for name in self.names:
            out, shape = self._output(name), call.shape(name)
            if out.numel() != prod(shape):  # copied: the strides of its own shape
                cropped = out.flatten(0, -3 if call.window else -2)[:, : shape[2]].reshape(shape)
                results.append(out.new_empty(shape, dtype=call.dtype).copy_(cropped))
            else:
                results.append(out.reshape(shape).to(call.dtype))
        return results
