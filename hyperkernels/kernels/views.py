"""How the kernels read tensors: which of their dimensions are which label, and with what strides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hyperkernels.backends.mapped import Mapped
from hyperkernels.call import Call
from hyperkernels.chunking import ceil_div
from hyperkernels.kernels.operands import Batch, Factor, Features
from hyperkernels.kernels.windows import Gathered


def batch_of(call: Call, mapped: Mapped | None, BT: int) -> tuple[Batch, int]:
    """How the rows are addressed, and in how many tiles at most."""
    if mapped is None:
        rows = call.entries * call.tokens // call.contexts
        return Batch(call.contexts, rows, call.tokens), call.contexts * ceil_div(rows, BT)
    tiles = ceil_div(call.entries * call.tokens, BT) + min(call.contexts, call.entries)
    ends = (-(-mapped.counts * call.tokens // BT)).cumsum(0)
    first = torch.cat((ends.new_zeros(1), ends))
    of_tile = torch.searchsorted(ends, torch.arange(tiles, device=ends.device), right=True)
    return Batch(call.contexts, 0, call.tokens, mapped.starts * call.tokens, mapped.entries, of_tile, first), tiles


class FeatureView(NamedTuple):
    """How x or y is read: the extents of the outer and the inner label, how far apart in features theirs are, and where
    a row ends."""

    size_outer: int
    size_inner: int
    outer: int
    inner: int
    limit: int

    @classmethod
    def of(cls, call: Call, slot: str, outer: str) -> FeatureView:
        grid = call.grid
        chunk, size, limit = ("j", grid.cols, grid.in_features) if slot == "x" else ("i", grid.rows, grid.out_features)
        chunks = ceil_div(limit, size)
        return cls(chunks, size, size, 1, limit) if outer == chunk else cls(size, chunks, 1, size, limit)

    def __call__(self, tensor: Tensor | Gathered) -> Features:
        if isinstance(tensor, Gathered):
            return Features(tensor.tensor, tensor.tensor.stride(0), 0, 0, *self, tensor.rows, tensor.columns)
        if self.limit * tensor.stride(-1) >= 1 << 31:  # a row's features are counted in 32 bits
            tensor = tensor.contiguous()
        entry, token, feature = tensor.stride()
        return Features(tensor, entry, token, feature, *self)


class FactorView(NamedTuple):
    """How hidden or head is read: which of its last dimensions are the outer label, the width and the inner one, and
    their extents."""

    dimensions: tuple[int, int, int]
    extents: tuple[int, int, int]

    @classmethod
    def of(cls, call: Call, slot: str, outer: str, inner: str) -> FactorView:
        at = {label: n - 3 for n, label in enumerate("krq" if slot == "head" else "ijk")}
        return cls((at[outer], at["k"], at[inner]), (call.sizes[outer], call.width, call.sizes[inner]))

    def __call__(self, tensor: Tensor, context: Tensor | None = None) -> Factor:
        stride = tensor.stride()
        outer, k, inner = self.dimensions
        lead = stride[0] if len(stride) == 4 else 0
        context_strides = (0, 0) if context is None else context.stride()
        return Factor(tensor, context, lead, stride[outer], stride[k], stride[inner], *self.extents, *context_strides)
