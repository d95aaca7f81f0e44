"""A convolution as a linear layer whose features are gathered: the kernels know of no other.

y has a row for each position p, and each row's features are x's at the positions that the kernel reads for p, `(s, q)`
to a chunk: `y[(t,p), n] = sum W[n, (j,s,q)] x[t, j*cols+q, h(p,s)]`. Differentiated by x there is a row for each of its
positions h, and y is gathered, zeros between its positions where the window strides: `dx[(t,h), c] = sum W[(i,s,r), c]
dy[t, i*rows+r, p(h,s)]`. What is gathered is copied once, with the zeros around it, its channels side by side.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from hyperkernels.call import Call, Window
from hyperkernels.chunking import Grid


class Gathered(NamedTuple):
    """Feature n of token t of an entry lies at `tensor[entry].flatten()[rows[t] + columns[n]]`."""

    tensor: Tensor
    rows: Tensor
    columns: Tensor


class Axis(NamedTuple):
    """One dimension of the room `[length]` that is gathered from: position n of the tensor is put at `begin + n *
    apart`, and what output o and the kernel's s read lies at `first + o * step + s * reach`."""

    length: int
    begin: int
    apart: int
    first: int
    step: int
    reach: int


def axes(window: Window, out: str) -> list[Axis]:
    """Of x, or where the partial by x is wanted, of y."""
    found = []
    for kernel, step, pad, dilation, size, outputs in zip(*window, window.output_size):
        reach = dilation * (kernel - 1)
        if out == "x":  # h + pad = p * step + s * dilation
            before = max(0, reach - pad)
            length = before + max(size + pad, (outputs - 1) * step + 1)
            found.append(Axis(length, before, step, before + pad, 1, -dilation))
        else:
            found.append(Axis(size + 2 * pad, pad, 1, 0, step, dilation))
    return found


def linear_call(call: Call, out: str) -> Call:
    """That whose partial by the slot is the convolution's; without a window, the call itself."""
    window, grid = call.window, call.grid
    if window is None:
        return call
    s, h, p = prod(window.kernel), prod(window.size), prod(window.output_size)
    if out == "x":
        grid = Grid(grid.I * grid.rows * s, grid.in_features, grid.rows * s, grid.cols)
    else:
        grid = Grid(grid.out_features, grid.J * grid.cols * s, grid.rows, grid.cols * s)
    return call._replace(grid=grid, tokens=call.tokens * (h if out == "x" else p), window=None)


def linear_factors(call: Call, out: str, factors: dict[str, Tensor]) -> dict[str, Tensor | Gathered]:
    """What `linear_call` is given: one of x and y gathered, rows of the other, and head with `(s, q)`, or `(s, r)`."""
    window = call.window
    if window is None:
        return dict(factors)
    gathered = "y" if out == "x" else "x"
    found: dict[str, Tensor | Gathered] = dict(factors)
    for name, value in factors.items():
        if name == gathered:
            found[name] = _gathered(call, out, value)
        elif name in ("x", "y"):
            found[name] = value.transpose(2, 3).reshape(len(value), -1, value.shape[2])
        elif name == "head":
            turned = value.permute(0, 3, 1, 2).flatten(1, 2) if out == "x" else value.transpose(2, 3).flatten(2)
            found[name] = turned
    return found


def from_rows(call: Call, out: str, result: Tensor) -> Tensor:
    """The partial as the convolution has it, of that of `linear_call`."""
    window, grid = call.window, call.grid
    if window is None or out in ("hidden", "chunks"):
        return result
    if out == "head":
        return result.unflatten(2, (-1, grid.cols)).transpose(2, 3).contiguous()
    return result.unflatten(1, (call.tokens, -1)).transpose(2, 3).contiguous()


def _gathered(call: Call, out: str, value: Tensor) -> Gathered:
    window, grid = call.window, call.grid
    assert window is not None
    sizes, chunks, channels = (
        (window.output_size, grid.I, grid.rows) if out == "x" else (window.size, grid.J, grid.cols)
    )
    own = axes(window, out)
    room = value.new_zeros(*value.shape[:2], *(axis.length for axis in own), chunks * channels)
    places = tuple(slice(a.begin, a.begin + (n - 1) * a.apart + 1, a.apart) for a, n in zip(own, sizes))
    room[(slice(None), slice(None), *places, slice(value.shape[2]))] = value.unflatten(3, sizes).movedim(2, -1)
    outputs = window.size if out == "x" else window.output_size
    tables = _tables(tuple(own), outputs, window.kernel, value.shape[1], chunks, channels, value.device)
    return Gathered(room, *tables)


@lru_cache(maxsize=256)
def _tables(
    own: tuple[Axis, ...],
    outputs: tuple[int, ...],
    kernel: tuple[int, ...],
    tokens: int,
    chunks: int,
    channels: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Where rows begin in an entry, by token and position, and how far on its features are, by chunk, s and channel."""
    width = chunks * channels
    strides = [prod(axis.length for axis in own[n + 1 :]) * width for n in range(len(own))]
    image = prod(axis.length for axis in own) * width

    def offsets(extents: tuple[int, ...], first: list[int], steps: list[int]) -> Tensor:
        lines = [(f + torch.arange(n) * step) * stride for n, f, step, stride in zip(extents, first, steps, strides)]
        return sum(line[(..., *[None] * (len(lines) - 1 - n))] for n, line in enumerate(lines)).flatten()  # type: ignore

    rows = offsets(outputs, [axis.first for axis in own], [axis.step for axis in own])
    places = offsets(kernel, [0] * len(own), [axis.reach for axis in own])
    rows = torch.arange(tokens)[:, None] * image + rows
    columns = (torch.arange(chunks) * channels)[:, None, None] + places[:, None] + torch.arange(channels)
    return rows.flatten().to(device), columns.flatten().to(device, torch.int32)
