"""From a contraction of tensors to a launch: who plays u, f, w and v, with which strides, tiles and splits."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperkernels.backends.mapped import Mapped
from hyperkernels.call import Call
from hyperkernels.chunking import ceil_div
from hyperkernels.kernels import tuning
from hyperkernels.kernels.chain import contract_rows, contract_sums
from hyperkernels.kernels.generate import generate_rows, generate_sums
from hyperkernels.kernels.operands import Batch, Factor, Features
from hyperkernels.kernels.planes import sum_planes
from hyperkernels.kernels.roles import Roles, roles_of, sizes_of
from hyperkernels.kernels.tiles import Chip, Sizes, Tile, power_of_two, tile_for
from hyperkernels.kernels.windows import Gathered
from hyperkernels.planner import workspace_bytes

ALIGNED = 16  # bytes: what triton asks of an address
PLANES, NUMBERS = 64, 64  # of a tile of `sum_planes`, of the first at most
Kept = dict[tuple, Callable[..., Any]]
NAMES = ("y", "hidden", "chunks", "head", "x")
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
        return Factor(tensor, lead, stride[outer], stride[k], stride[inner], *self.extents, context, *context_strides)


class Launch(NamedTuple):
    """A kernel and what it is called with. `result` is the partial by `name`, of which `sums` holds a plane for each
    split where there are some; `contexts` is that by the contexts of an additive hidden, in planes to be summed. `kept`
    are the compiled kernels of the same recipe, by all that the factors can change of them: `key`."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple
    keywords: dict[str, Any]
    kept: Kept
    key: tuple
    name: str
    result: Tensor
    sums: Tensor | None
    contexts: Tensor | None = None

    def launch(self) -> None:
        launch_kept(self.kernel, self.grid, self.arguments, self.keywords, self.kept, self.key)

    def run(self) -> dict[str, Tensor]:
        self.launch()
        if self.sums is not None:
            self._sum(self.sums, self.result)
        found = {self.name: self.result}
        if self.contexts is not None:
            found["hidden"] = self.result.new_empty(self.contexts.shape[1:])
            self._sum(self.contexts, found["hidden"])
        return found

    def _sum(self, planes: Tensor, out: Tensor) -> None:
        launch_kept(sum_planes, *summing(planes, out), self.kept, (sum_planes, out.device, planes.shape))


def summing(planes: Tensor, out: Tensor) -> tuple[tuple[int, int, int], tuple, dict[str, Any]]:
    """Grid, arguments and keywords of `sum_planes`."""
    blocks = {"BP": min(power_of_two(len(planes)), PLANES), "BN": NUMBERS}
    return (ceil_div(out.numel(), NUMBERS), 1, 1), (planes, out, out.numel(), len(planes)), blocks


def launch_kept(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple, keywords: dict[str, Any], kept: Kept, key: tuple
) -> None:
    """Triton looks at each argument to find the compiled kernel, which costs more than the rest of a launch: what was
    found is kept by the key."""
    again = kept.get(key)
    if again is not None:
        return again(*arguments)
    compiled = kernel[grid](*arguments, **keywords)
    if compiled is not None:  # the interpreter gives None
        constants = tuple(keywords[name] for name in kernel.arg_names[len(arguments) :])
        compiled_for = compiled[grid]
        kept[key] = lambda *arguments: compiled_for(*arguments, *constants)


class Recipe(NamedTuple):
    """What of a launch the tensors have no part in. `tiles` counts those of s, k, o and n; `kept` is `Launch`'s."""

    roles: Roles
    sizes: Sizes
    tile: Tile
    tiles: tuple[int, int, int, int]
    keywords: dict[str, Any]
    u: FeatureView
    f: FactorView
    w: FactorView
    v: FeatureView
    kept: Kept


@lru_cache(maxsize=4096)
def recipe(
    call: Call, order: str, out: str, gathered: bool, chip: Chip, tf32: bool, _workspace: int, tile: Tile | None = None
) -> Recipe:
    roles, sizes = roles_of(call, order, out), sizes_of(call, order, out, gathered)
    tile = tile or tile_for(sizes, chip)[0]
    blocks = ((sizes.S, tile.BS), (sizes.M, tile.BK), (sizes.O, tile.BO), (sizes.N, tile.BN))
    keywords: dict[str, Any] = {
        "ACTIVATION": call.activation,
        "PRECISION": "tf32" if tf32 else "ieee",
        "SPLITS": tile.splits,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": 255,  # else ptxas may take half and spill
        **{block: getattr(tile, block) for block in ("BT", "BK", "BO", "BN", "BD")},
    }
    if order != "generate":
        keywords |= {"BS": tile.BS, "ONE_D": sizes.D <= tile.BD}
    if out != roles.v:
        keywords["BY_CONTEXT"] = sizes.by_context
    elif order != "generate":
        keywords["ONE_S"] = sizes.S <= tile.BS
    return Recipe(
        roles,
        sizes,
        tile,
        tuple(ceil_div(size, block) for size, block in blocks),  # type: ignore[arg-type]
        keywords,
        FeatureView.of(call, roles.u, roles.s),
        FactorView.of(call, roles.f, roles.o, roles.d),
        FactorView.of(call, roles.w, roles.s, roles.n),
        FeatureView.of(call, roles.v, roles.o),
        {},
    )


def prepare(
    call: Call,
    order: str,
    out: str,
    factors: dict[str, Any],
    mapped: Mapped | None,
    chip: Chip,
    tile: Tile | None = None,
) -> Launch:
    """What computes the partial of phi by the slot `out`, of tensors, or of an x or y that is `Gathered`; the tile is
    planned, or tuned where that is asked for."""
    tf32 = call.dtype == torch.float32 and tf32_allowed()
    gathered = any(isinstance(factor, Gathered) for factor in factors.values())
    if tile is None and tuning.enabled():
        tile = tuning.tuned_tile(
            sizes_of(call, order, out, gathered),
            chip,
            "tf32" if tf32 else str(call.dtype),
            lambda tile: prepare(call, order, out, factors, mapped, chip, tile).run,
        )
    roles, sizes, tile, (tiles_s, tiles_k, tiles_o, tiles_n), keywords, view_u, view_f, view_w, view_v, kept = recipe(
        call, order, out, gathered, chip, tf32, workspace_bytes(), tile
    )
    batch, tiles_b = batch_of(call, mapped, tile.BT)
    name = "chunks" if sizes.additive else out
    result = factors[roles.f].new_empty(call.shape(name))
    sums, first, plane = None, result, 0
    if tile.splits > 1:
        sums = result.new_empty(tile.splits, *result.shape, dtype=torch.float32)
        first, plane = sums[0], sums.stride(0)

    def read(view: FactorView, slot: str) -> Factor:
        additive = slot == "hidden" and call.activation
        return view(factors["chunks"], factors["hidden"]) if additive else view(factors[slot])

    u, f = view_u(factors[roles.u]), read(view_f, roles.f)
    contexts = None
    if out == roles.v:
        grid = (tiles_b * tile.splits, tiles_n, tiles_o)
        arguments = (u, f, read(view_w, roles.w), view_v(first), batch, plane)
    else:
        target = view_w(first)
        if sizes.additive:
            planes = tiles_s * tiles_n * (tile.splits if order == "generate" else 1)
            contexts = result.new_empty(planes, call.contexts, call.width, dtype=torch.float32)
        w = read(view_w, out) if sizes.additive else target
        grid = ((call.contexts if sizes.by_context else 1) * tile.splits * tiles_s * tiles_k, tiles_n, 1)
        arguments = (u, f, view_v(factors[roles.v]), w, target, contexts, batch, plane)
    # what else a kernel is called with follows from the call, or was allocated here, and so aligned
    given = (factors[name] for name in NAMES if name in factors)
    tensors = (factor.tensor if isinstance(factor, Gathered) else factor for factor in given)
    key = KERNELS[sizes.kernel], result.device, *((v.data_ptr() % ALIGNED == 0, v.stride()) for v in tensors)
    return Launch(KERNELS[sizes.kernel], grid, arguments, keywords, kept, key, name, result, sums, contexts)
