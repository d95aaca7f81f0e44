"""The form, and what one call of it is: slots, labels, orders, shapes.

The form is `phi = sum y[g,t,i,r] hidden[g,i,j,k] head[k,r,q] x[g,t,j,q]`, and every operation of the engine is the
partial derivative of phi by one of the four slots. Four factors can be paired in three ways, and each way is an
order of evaluation: one pair forms an intermediate, one member of the other pair consumes it, and what comes out
belongs to the remaining slot.

| order          | pairs                            | intermediate   |
|----------------|----------------------------------|----------------|
| `generate`     | (hidden, head) and (x, y)        | `[g,i,j,r,q]`  |
| `head_first`   | (head, x) and (hidden, y)        | `[g,t,j,k,r]`  |
| `hidden_first` | (hidden, x) and (head, y)        | `[g,t,i,k,q]`  |

So an order is a program and its derivatives: head_first forms `t` from (head, x) for y and dhidden, and its twin
from (hidden, dy) once for both dx and dhead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import NamedTuple

import torch

from hyperkernels.chunking import Grid, ceil_div

SLOTS = ("y", "hidden", "head", "x")
OUTPUT = {"y": "y", "hidden": "dhidden", "head": "dhead", "x": "dx"}
PAIRS = {
    "generate": (("hidden", "head"), ("x", "y")),
    "head_first": (("head", "x"), ("hidden", "y")),
    "hidden_first": (("hidden", "x"), ("head", "y")),
}
ORDERS = tuple(PAIRS)

LABELS = {
    per_chunk_heads: {"y": "gtir", "hidden": "gijk", "head": "ijkrq" if per_chunk_heads else "krq", "x": "gtjq"}
    for per_chunk_heads in (False, True)
}


@cache
def _intermediate(order: str, per_chunk_heads: bool) -> str:
    """The labels that one pair of an order shares with the other."""
    (a, b), (c, d) = PAIRS[order]
    labels = LABELS[per_chunk_heads]
    shared = set(labels[a] + labels[b]) & set(labels[c] + labels[d])
    return "".join(label for label in "gtijkrq" if label in shared)


class Call(NamedTuple):
    """Everything a plan depends on. `entries` leading entries of x hold `tokens` rows each; without `mapped`,
    entry g uses context g, so a context shared by all is one entry that holds every token."""

    grid: Grid
    width: int
    contexts: int
    entries: int
    tokens: int
    per_chunk_heads: bool = False
    mapped: bool = False
    activation: str = ""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def labels(self) -> dict[str, str]:
        return LABELS[self.per_chunk_heads]

    def intermediate(self, order: str) -> str:
        return _intermediate(order, self.per_chunk_heads)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a factor, and so of the partial by it; with an activation `hidden` is the context `[G, m]`."""
        grid, chunks = self.grid, (self.grid.I, self.grid.J, self.width)
        return {
            "y": (self.entries, self.tokens, grid.out_features),
            "x": (self.entries, self.tokens, grid.in_features),
            "hidden": (self.contexts, self.width) if self.activation else (self.contexts, *chunks),
            "chunks": chunks,
            "head": (*((grid.I * grid.J,) if self.per_chunk_heads else ()), self.width, grid.rows, grid.cols),
        }[name]

    @property
    def sizes(self) -> dict[str, int]:
        """Extent of each label; with `mapped`, the mean number of tokens per context in use."""
        contexts = min(self.contexts, max(self.entries, 1))
        tokens = ceil_div(self.entries * self.tokens, max(contexts, 1))
        grid = self.grid
        return {"g": contexts, "t": tokens, "i": grid.I, "j": grid.J, "k": self.width, "r": grid.rows, "q": grid.cols}

    def numbers(self, labels: str) -> int:
        """How many numbers the labels span, over all contexts in use and all tokens."""
        sizes = self.sizes
        lead = self.entries * self.tokens if "t" in labels else sizes["g"] if "g" in labels else 1
        return lead * prod(sizes[label] for label in set(labels) - {"g", "t"})


def slot_of(name: str) -> str:
    """The slot that a factor fills: `chunks` fills that of `hidden`, together with the context."""
    return "hidden" if name == "chunks" else name


def result_names(wanted: Sequence[str], activation: str) -> list[str]:
    """The factors by which the partials are taken: with an activation, hidden is the context and the chunks."""
    names = []
    for slot in wanted:
        names += [slot, "chunks"] if slot == "hidden" and activation else [slot]
    return names


def check_order(order: str | None) -> None:
    if order is not None and order not in ORDERS:
        raise ValueError(f"order: got {order!r}, wanted None or one of {', '.join(ORDERS)}")
