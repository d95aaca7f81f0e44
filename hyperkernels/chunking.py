"""The grid of chunks that a weight matrix is cut into (`W [N, K]` into `I x J` chunks of `rows x cols`)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Grid(NamedTuple):
    """An `out_features x in_features` weight cut into chunks of `rows x cols`; edge chunks are cropped.

    >>> grid = Grid(out_features=10, in_features=7, rows=4, cols=3)
    >>> grid.I, grid.J, grid.rank_bound(width=1)
    (3, 3, 7)
    """

    out_features: int
    in_features: int
    rows: int
    cols: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols} in {self.out_features}x{self.in_features}"

    @property
    def I(self) -> int:  # noqa: E743 - the symbol of the equations
        return ceil_div(self.out_features, self.rows)

    @property
    def J(self) -> int:
        return ceil_div(self.in_features, self.cols)

    def rank_bound(self, width: int, positions: int = 1) -> int:
        """The largest rank a generated weight can have: each of its `width` Kronecker products has at most
        `min(I, J) * min(rows, cols)`; of a kernel `[N, K * positions]` a column of a chunk is `positions`."""
        bound = width * min(self.I, self.J) * min(self.rows, self.cols * positions)
        return min(bound, self.out_features, self.in_features * positions)


def to_chunks(v: Tensor, size: int, dim: int = -1) -> Tensor:
    """`[..., n, ...]` to `[..., ceil(n / size), size, ...]` at the dimension `dim`, counted from the last: a view where
    `size` divides n, else a zero-padded copy."""
    n = v.shape[dim]
    count = ceil_div(n, size)
    if n != count * size:
        v = F.pad(v, (*(0, 0) * (-1 - dim), 0, count * size - n))
    return v.unflatten(dim, (count, size))


def weight_from_chunks(chunks: Tensor, out_features: int, in_features: int) -> Tensor:
    """`[G, I, J, rows, cols, ...]` to `[G, N, K, ...]`."""
    weight = chunks.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return weight[:, :out_features, :in_features]


def check_chunk(chunk: tuple[int, int]) -> tuple[int, int]:
    if not (isinstance(chunk, (tuple, list)) and len(chunk) == 2 and all(isinstance(c, int) and c > 0 for c in chunk)):
        raise ValueError(f"chunk: got {chunk!r}, wanted (rows, cols), positive integers")
    return chunk[0], chunk[1]


def check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{name}: got {size!r}, wanted a positive integer")
