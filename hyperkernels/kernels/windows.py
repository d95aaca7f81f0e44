"""A convolution as a linear layer whose features are gathered: the kernels see only a linear layer.

y has a row for each position p, and each row's features are x's at the positions that the kernel reads for p, `(s, q)`
to a chunk: `y[(t,p), n] = sum W[n, (j,s,q)] x[t, j*cols+q, h(p,s)]`. Differentiated by x there is a row for each of its
positions h, and y is gathered, zeros between its positions where the window strides: `dx[(t,h), c] = sum W[(i,s,r), c]
dy[t, i*rows+r, p(h,s)]`. What is gathered is copied once, with the zeros around it and between, its channels side by
side: that is its room.
"""

from __future__ import annotations

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
    """One dimension of a room, of a length: the tensor's position n is put at `begin + n * apart`, and what output o
    and the kernel's position s read lies at `first + o * by_output + s * by_kernel`."""

    length: int
    begin: int
    apart: int
    first: int
    by_output: int
    by_kernel: int


def axes(window: Window, out: str) -> list[Axis]:
    """The dimensions of x's room, or of y's where the partial by x is wanted."""
    found = []
    for kernel, step, pad, dilation, size, outputs in zip(*window, window.output_size):
        if out == "x":  # h + pad = p * step + s * dilation
            before = max(0, dilation * (kernel - 1) - pad)
            length = before + max(size + pad, (outputs - 1) * step + 1)
            found.append(Axis(length, before, step, before + pad, 1, -dilation))
        else:
            found.append(Axis(size + 2 * pad, pad, 1, 0, step, dilation))
    return found


def linear_call(call: Call, out: str) -> Call:
    """The linear layer whose partial by `out` is the convolution's, row by position; without a window, the call."""
    window, grid = call.window, call.grid
    if window is None:
        return call
    s, h, p = prod(window.kernel), prod(window.size), prod(window.output_size)
    if out == "x":
        grid = Grid(grid.I * grid.rows * s, grid.in_features, grid.rows * s, grid.cols)
    else:
        grid = Grid(grid.out_features, grid.J * grid.cols * s, grid.rows, grid.cols * s)
    return call._replace(grid=grid, tokens=call.tokens * (h if out == "x" else p), window=None)


def copied(call: Call, out: str) -> int:
    """How many numbers the copies hold: the room, and the rows of the other of x and y."""
    if call.window is None:
        return 0
    grid = call.grid
    channels, other = (grid.I * grid.rows, "x") if out == "x" else (grid.J * grid.cols, "y")
    room = call.entries * call.tokens * prod(axis.length for axis in axes(call.window, out)) * channels
    return room + prod(call.shape(other))


def linear_factors(call: Call, out: str, factors: dict[str, Tensor]) -> dict[str, Tensor | Gathered]:
    """What `linear_call` is given: one of x and y gathered, rows of the other, and head with `(s, q)`, or `(s, r)`; the
    same for every `out` but x."""
    if call.window is None:
        return dict(factors)
    found: dict[str, Tensor | Gathered] = {}
    for name, value in factors.items():
        if name == ("y" if out == "x" else "x"):
            found[name] = _gathered(call, out, value)
        elif name == "y":
            found[name] = value.transpose(2, 3).reshape(len(value), -1, value.shape[2])
        elif name == "head":
            found[name] = value.permute(0, 3, 1, 2).flatten(1, 2) if out == "x" else value.transpose(2, 3).flatten(2)
        elif name != "x":
            found[name] = value
    return found


def from_rows(call: Call, name: str, result: Tensor) -> Tensor:
    """A result of `linear_call`, laid out as the convolution's."""
    if call.window is None or name in ("hidden", "chunks"):
        return result
    if name == "head":
        return result.unflatten(2, (-1, call.grid.cols)).transpose(2, 3).contiguous()
    return result.unflatten(1, (call.tokens, -1)).transpose(2, 3).contiguous()


def _gathered(call: Call, out: str, value: Tensor) -> Gathered:
    """In its room, with the tables: where rows begin in an entry, by token and position, and how far on from there its
    features are, by chunk, s and channel. They are made anew in each call: kept, they would hold a device's memory."""
    window, grid = call.window, call.grid
    assert window is not None
    if out == "x":
        sizes, outputs, chunks, channels = window.output_size, window.size, grid.I, grid.rows
    else:
        sizes, outputs, chunks, channels = window.size, window.output_size, grid.J, grid.cols
    own, width = axes(window, out), chunks * channels
    room = value.new_zeros(*value.shape[:2], *(axis.length for axis in own), width)
    places = tuple(slice(a.begin, a.begin + (n - 1) * a.apart + 1, a.apart) for a, n in zip(own, sizes))
    room[(slice(None), slice(None), *places, slice(value.shape[2]))] = value.unflatten(3, sizes).movedim(2, -1)
    strides = [prod(axis.length for axis in own[n + 1 :]) * width for n in range(len(own))]
    image = own[0].length * strides[0]

    def count(n: int) -> Tensor:
        return torch.arange(n, device=value.device)

    def offsets(extents: tuple[int, ...], first: list[int], steps: list[int]) -> Tensor:
        found = count(1)
        for n, start, step, stride in zip(extents, first, steps, strides):
            found = (found[:, None] + (start + count(n) * step) * stride).flatten()
        return found

    rows = offsets(outputs, [axis.first for axis in own], [axis.by_output for axis in own])
    places_of_s = offsets(window.kernel, [0] * len(own), [axis.by_kernel for axis in own])
    columns = (count(chunks) * channels)[:, None, None] + places_of_s[:, None] + count(channels)
    columns = columns.flatten() if image >= 1 << 31 else columns.flatten().to(torch.int32)
    return Gathered(room, (count(value.shape[1])[:, None] * image + rows).flatten(), columns)
