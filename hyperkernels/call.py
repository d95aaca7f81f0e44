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

A convolution is the same form with positions: x has a position h, y a position p and head a position s of the kernel,
and the sum is over those where h is the one that the kernel's position s reads for p. Any two tell the third: a pair
that has two of them convolves, and what it forms may have the third.
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

POSITIONS = "hsp"
LINEAR = {"y": "gtir", "hidden": "gijk", "head": "krq", "x": "gtjq"}
CONVOLUTION = {"y": "gtirp", "hidden": "gijk", "head": "krqs", "x": "gtjqh"}
LABELS = {
    (per_chunk_heads, windowed): labels | {"head": "ij" * per_chunk_heads + labels["head"]}
    for per_chunk_heads in (False, True)
    for windowed, labels in ((False, LINEAR), (True, CONVOLUTION))
}


def convolves(labels: str) -> bool:
    """Whether factors of these labels together have two positions, and so tell the third."""
    return len(set(labels) & set(POSITIONS)) == 2


@cache
def _intermediate(order: str, per_chunk_heads: bool, windowed: bool) -> str:
    """The labels that one pair of an order shares with the other."""
    labels = LABELS[per_chunk_heads, windowed]
    one, other = (labels[a] + labels[b] for a, b in PAIRS[order])
    shared = set(one + POSITIONS * convolves(one)) & set(other + POSITIONS * convolves(other))
    return "".join(label for label in "gtijkrq" + POSITIONS if label in shared)


class Window(NamedTuple):
    """How a convolution's kernel moves, dimension by dimension, over images of a size; zeros lie around them."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def output_size(self) -> tuple[int, ...]:
        return tuple((n + 2 * pad - d * (k - 1) - 1) // step + 1 for k, step, pad, d, n in zip(*self))


class Call(NamedTuple):
    """Everything a plan depends on. `entries` leading entries of x hold `tokens` rows each; without `mapped`,
    entry g uses context g, so a context shared by all is one entry that holds every token. With a `window` a row is an
    image of K channels."""

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
    window: Window | None = None

    @property
    def labels(self) -> dict[str, str]:
        return LABELS[self.per_chunk_heads, self.window is not None]

    def intermediate(self, order: str) -> str:
        return _intermediate(order, self.per_chunk_heads, self.window is not None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a factor, and so of the partial by it; with an activation `hidden` is the context `[G, m]`. Positions are
        one dimension, the last."""
        grid, chunks, positions = self.grid, (self.grid.I, self.grid.J, self.width), self.positions
        return {
            "y": (self.entries, self.tokens, grid.out_features, *positions.get("p", ())),
            "x": (self.entries, self.tokens, grid.in_features, *positions.get("h", ())),
            "hidden": (self.contexts, self.width) if self.activation else (self.contexts, *chunks),
            "chunks": chunks,
            "head": (
                *((grid.I * grid.J,) if self.per_chunk_heads else ()),
                *(self.width, grid.rows, grid.cols, *positions.get("s", ())),
            ),
        }[name]

    @property
    def positions(self) -> dict[str, tuple[int, ...]]:
        """Each position's label, and how many there are, as a shape of one dimension; none without a window."""
        window = self.window
        if window is None:
            return {}
        return {"h": (prod(window.size),), "s": (prod(window.kernel),), "p": (prod(window.output_size),)}

    @property
    def sizes(self) -> dict[str, int]:
        """Extent of each label; with `mapped`, the mean number of tokens per context in use."""
        contexts = min(self.contexts, max(self.entries, 1))
        tokens = ceil_div(self.entries * self.tokens, max(contexts, 1))
        grid = self.grid
        chunked = {"i": grid.I, "j": grid.J, "k": self.width, "r": grid.rows, "q": grid.cols}
        return {"g": contexts, "t": tokens, **chunked, **{label: n for label, (n,) in self.positions.items()}}

    def numbers(self, labels: str) -> int:
        """How many numbers the labels span, over all contexts in use and all tokens; of two positions, the kernel's at
        each of y's."""
        sizes = self.sizes
        lead = self.entries * self.tokens if "t" in labels else sizes["g"] if "g" in labels else 1
        own = set(labels) - {"g", "t"}
        if convolves(labels):
            own = own - {"h"} | {"s", "p"}
        return lead * prod(sizes[label] for label in own)


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
