"""From a contraction of tensors to a launch: who plays u, f, w and v, with which strides, tiles and splits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperkernels.backends.mapped import Mapped
from hyperkernels.call import Call
from hyperkernels.chunking import ceil_div
from hyperkernels.kernels.chain import contract_rows, contract_sums
from hyperkernels.kernels.generate import generate_rows, generate_sums
from hyperkernels.kernels.operands import Batch, Factor, Features
from hyperkernels.kernels.roles import roles_of, sizes_of
from hyperkernels.kernels.tiles import Chip, tile_for

KERNELS = {kernel.__name__: kernel for kernel in (contract_rows, contract_sums, generate_rows, generate_sums)}


def tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # once it is set, the flag may not be read
        return matmul.fp32_precision == "tf32"
    return bool(matmul.allow_tf32)


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


def _features(call: Call, slot: str, tensor: Tensor, outer: str) -> Features:
    grid = call.grid
    chunk, inside, size, limit = (
        ("j", "q", grid.cols, grid.in_features) if slot == "x" else ("i", "r", grid.rows, grid.out_features)
    )
    extents = {chunk: ceil_div(limit, size), inside: size}
    steps = {chunk: size, inside: 1}
    inner = inside if outer == chunk else chunk
    if limit * tensor.stride(-1) >= 1 << 31:  # a row's features are counted in 32 bits
        tensor = tensor.contiguous()
    entry, token, feature = tensor.stride()
    return Features(tensor, entry, token, feature, extents[outer], extents[inner], steps[outer], steps[inner], limit)


def _factor(call: Call, slot: str, tensor: Tensor, outer: str, inner: str, context: Tensor | None = None) -> Factor:
    stride = dict(zip("krq" if slot == "head" else "ijk", tensor.stride()[-3:]))
    lead = tensor.stride(0) if tensor.dim() == 4 else 0
    extents = (call.sizes[outer], call.width, call.sizes[inner])
    factor = Factor(tensor, lead, stride[outer], stride["k"], stride[inner], *extents)
    if context is None:
        return factor
    return factor._replace(context=context, context_stride=context.stride(0), context_stride_k=context.stride(1))


class Launch(NamedTuple):
    """A kernel and what it is called with. `result` is the partial by `name`, of which `sums` holds a plane for each
    split: itself, where there is one. `contexts` is that by the contexts of an additive hidden, in planes to be summed.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    keywords: dict[str, Any]
    name: str
    result: Tensor
    sums: Tensor
    contexts: Tensor | None = None

    def run(self) -> dict[str, Tensor]:
        self.kernel[self.grid](*self.arguments, **self.keywords)
        if len(self.sums) > 1:
            self.result.copy_(self.sums.sum(0))
        found = {self.name: self.result}
        if self.contexts is not None:
            found["hidden"] = self.contexts.sum(0).to(self.result.dtype)
        return found


def prepare(call: Call, order: str, out: str, factors: dict[str, Tensor], mapped: Mapped | None, chip: Chip) -> Launch:
    """What computes the partial of phi by the slot `out`."""
    roles, sizes = roles_of(call, order, out), sizes_of(call, order, out)
    tile, _ = tile_for(sizes, chip)
    batch, tiles = batch_of(call, mapped, tile.BT)
    tiles_s, tiles_k, tiles_o, tiles_n = (
        ceil_div(size, block)
        for size, block in ((sizes.S, tile.BS), (sizes.M, tile.BK), (sizes.O, tile.BO), (sizes.N, tile.BN))
    )
    additive = out == "hidden" and bool(call.activation)
    name = "chunks" if additive else out
    result = factors[roles.u].new_empty(call.shape(name))
    sums = result[None] if tile.splits == 1 else result.new_empty(tile.splits, *result.shape, dtype=torch.float32)

    def factor(slot: str, outer: str, inner: str) -> Factor:
        if slot == "hidden" and call.activation:
            return _factor(call, slot, factors["chunks"], outer, inner, factors["hidden"])
        return _factor(call, slot, factors[slot], outer, inner)

    u, f = _features(call, roles.u, factors[roles.u], roles.s), factor(roles.f, roles.o, roles.d)
    keywords: dict[str, Any] = {
        "ACTIVATION": call.activation,
        "PRECISION": "tf32" if call.dtype == torch.float32 and tf32_allowed() else "ieee",
        "SPLITS": tile.splits,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **{block: getattr(tile, block) for block in ("BT", "BK", "BO", "BN", "BD")},
    }
    if order != "generate":
        keywords |= {"BS": tile.BS, "ONE_D": sizes.D <= tile.BD}
    if out == roles.v:
        if order != "generate":
            keywords["ONE_S"] = sizes.S <= tile.BS
        w, v = factor(roles.w, roles.s, roles.n), _features(call, roles.v, sums[0], roles.o)
        grid, arguments, contexts = (tiles * tile.splits, tiles_n, tiles_o), (u, f, w, v, batch, sums.stride(0)), None
    else:
        keywords["BY_CONTEXT"] = sizes.by_context
        v, target = _features(call, roles.v, factors[roles.v], roles.o), _factor(call, out, sums[0], roles.s, roles.n)
        w, contexts = target, None
        if additive:
            w = factor(out, roles.s, roles.n)
            planes = tiles_s * tiles_n * (tile.splits if order == "generate" else 1)
            contexts = result.new_empty(planes, call.contexts, call.width, dtype=torch.float32)
        grid = ((call.contexts if sizes.by_context else 1) * tile.splits * tiles_s * tiles_k, tiles_n)
        arguments = (u, f, v, w, target, contexts, batch, sums.stride(0))
    return Launch(KERNELS[sizes.kernel], grid, arguments, keywords, name, result, sums, contexts)
