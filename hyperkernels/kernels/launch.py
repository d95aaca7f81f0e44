"""From a contraction of tensors to a launch: who plays u, f, w and v, with which tiles and splits."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from hyperkernels.backends.mapped import Mapped
from hyperkernels.call import Call
from hyperkernels.chunking import ceil_div
from hyperkernels.kernels import tuning
from hyperkernels.kernels.chain import contract_rows, contract_sums
from hyperkernels.kernels.generate import generate_rows, generate_sums
from hyperkernels.kernels.operands import INTERPRETED, Factor, Features
from hyperkernels.kernels.planes import sum_planes
from hyperkernels.kernels.roles import Roles, roles_of, sizes_of
from hyperkernels.kernels.spills import compiler_tells, unspilled_tile
from hyperkernels.kernels.tiles import Chip, Sizes, Tile, context_planes, power_of_two, tile_for
from hyperkernels.kernels.views import FactorView, FeatureView, batch_of
from hyperkernels.kernels.windows import Gathered
from hyperkernels.planner import workspace_bytes

ALIGNED = 16  # bytes: what triton asks of an address
MOST_KEPT = 256  # of a recipe: ways that tensors lay in memory
PLANES, NUMBERS = 64, 64  # of a tile of `sum_planes`, of the first at most
Kept = dict[tuple, Callable[..., Any]]
KERNELS = {kernel.__name__: kernel for kernel in (contract_rows, contract_sums, generate_rows, generate_sums)}


def tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # once it is set, the flag may not be read
        return matmul.fp32_precision == "tf32"
    return bool(matmul.allow_tf32)


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

    def spilled(self) -> float:
        """Numbers of a thread that the compiler keeps in memory, for want of registers; infinite where the chip has no
        room for the kernel."""
        compiled = self.kernel.warmup(*self.arguments, grid=self.grid, **self.keywords)
        try:
            compiled._init_handles()  # loads it: nobody else says
        except OutOfResources:
            return inf
        return compiled.n_spills

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
        grid, sizes, blocks = summing(planes.shape)
        key = "planes", out.device, planes.shape
        launch_kept(sum_planes, grid, (planes, out, *sizes), blocks, self.kept, key)


@lru_cache(maxsize=4096)
def summing(planes: torch.Size) -> tuple[tuple[int, int, int], tuple[int, int], dict[str, Any]]:
    """Of `sum_planes` the grid, what follows the tensors, and the keywords."""
    count, numbers = planes[0], prod(planes[1:])
    blocks = {"BP": min(power_of_two(count), PLANES), "BN": NUMBERS}
    return (ceil_div(numbers, NUMBERS), 1, 1), (numbers, count), blocks


def launch_kept(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple, keywords: dict[str, Any], kept: Kept, key: tuple
) -> None:
    """Triton looks at each argument to find the compiled kernel, which costs more than the rest of a launch: what was
    found is kept by the key."""
    launched = kept.get(key)
    if launched is not None:
        return launched(*arguments)
    compiled = kernel[grid](*arguments, **keywords)
    if compiled is not None:  # the interpreter gives None
        if len(kept) >= MOST_KEPT:
            kept.clear()
        constants = tuple(keywords[name] for name in kernel.arg_names[len(arguments) :])
        compiled_for = compiled[grid]
        kept[key] = lambda *arguments: compiled_for(*arguments, *constants)


class Pattern(NamedTuple):
    """A launch without its tensors, for others that lie in memory in the same way: of each argument its type, the names
    of the tensors that it holds first, and what follows them."""

    grid: tuple[int, int, int]
    parts: tuple[tuple[Any, tuple[str, ...], Any], ...]

    @classmethod
    def of(cls, grid: tuple[int, int, int], arguments: tuple[Any, ...], names: tuple[tuple[str, ...], ...]) -> Pattern:
        parts = []
        for part, own in zip(arguments, names):
            whole = isinstance(part, (Features, Factor))
            parts.append((type(part) if whole else None, own, part[len(own) :] if whole else None if own else part))
        return cls(grid, tuple(parts))

    def filled(self, tensors: dict[str, Any]) -> tuple[Any, ...]:
        found = []
        for kind, names, rest in self.parts:
            if kind is not None:
                rest = tuple.__new__(kind, (*[tensors[name] for name in names], *rest))
            elif names:
                rest = tensors[names[0]]
            found.append(rest)
        return tuple(found)


class Recipe(NamedTuple):
    """What of a launch the tensors have no part in. `shape` is the result's, `planes` that of the sums by contexts, if
    there are some; `tiles` counts those of s, k, o and n; `kept` is `Launch`'s, `patterns` go by the same keys.
    `settled` holds the recipe that is launched in this one's place, once that is known."""

    roles: Roles
    sizes: Sizes
    tile: Tile
    shape: tuple[int, ...]
    planes: tuple[int, ...] | None
    tiles: tuple[int, int, int, int]
    keywords: dict[str, Any]
    u: FeatureView
    f: FactorView
    w: FactorView
    v: FeatureView
    kept: Kept
    patterns: dict[tuple, Pattern]
    settled: list[Recipe]


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
    tiles: tuple[int, int, int, int] = tuple(ceil_div(size, block) for size, block in blocks)  # type: ignore[assignment]
    planes = None
    if sizes.additive:
        planes = (context_planes(sizes, tile, tile.splits), call.contexts, call.width)
    return Recipe(
        roles,
        sizes,
        tile,
        call.shape("chunks" if sizes.additive else out),
        planes,
        tiles,
        keywords,
        FeatureView.of(call, roles.u, roles.s),
        FactorView.of(call, roles.f, roles.o, roles.d),
        FactorView.of(call, roles.w, roles.s, roles.n),
        FeatureView.of(call, roles.v, roles.o),
        {},
        {},
        [],
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
    planned and settled, or tuned where that is asked for."""
    tf32 = call.dtype == torch.float32 and tf32_allowed()
    gathered, layouts = False, []  # what else a kernel is called with follows from the call, or is allocated here
    for factor in factors.values():
        if isinstance(factor, Gathered):
            gathered, factor = True, factor.tensor
        layouts.append((factor.data_ptr() % ALIGNED == 0, factor.stride()))
    if tile is None and tuning.enabled():
        tile = tuning.tuned_tile(
            sizes_of(call, order, out, gathered),
            chip,
            "tf32" if tf32 else str(call.dtype),
            lambda tile: prepare(call, order, out, factors, mapped, chip, tile).run,
        )
    found = recipe(call, order, out, gathered, chip, tf32, workspace_bytes(), tile)
    if tile is None:
        if not found.settled and not INTERPRETED.value and compiler_tells():
            tile = unspilled_tile(
                found.sizes,
                chip,
                call.activation,
                lambda tile: prepare(call, order, out, factors, mapped, chip, tile).spilled(),
            )
            found.settled.append(recipe(call, order, out, gathered, chip, tf32, workspace_bytes(), tile))
        found = found.settled[0] if found.settled else found
    splits = found.tile.splits
    result = factors[found.roles.f].new_empty(found.shape)
    sums = result.new_empty((splits, *found.shape), dtype=torch.float32) if splits > 1 else None
    contexts = None if found.planes is None else result.new_empty(found.planes, dtype=torch.float32)
    key = result.device, tuple(factors), *layouts
    pattern = found.patterns.get(key)
    if pattern is None:
        grid, arguments, names = laid_out(call, order, out, factors, mapped, found, result, sums, contexts)
        held = [(part[0], factors[own[0]]) for part, own in zip(arguments, names) if own and own[0] in factors]
        if mapped is None and all(tensor is factor for tensor, factor in held):  # no tables, and no copies
            if len(found.patterns) >= MOST_KEPT:
                found.patterns.clear()
            found.patterns[key] = Pattern.of(grid, arguments, names)
    else:
        own = {**factors, "result": result if sums is None else sums, "contexts": contexts}
        grid, arguments = pattern.grid, pattern.filled(own)
    name = "chunks" if found.sizes.additive else out
    return Launch(
        KERNELS[found.sizes.kernel], grid, arguments, found.keywords, found.kept, key, name, result, sums, contexts
    )


def laid_out(
    call: Call,
    order: str,
    out: str,
    factors: dict[str, Any],
    mapped: Mapped | None,
    found: Recipe,
    result: Tensor,
    sums: Tensor | None,
    contexts: Tensor | None,
) -> tuple[tuple[int, int, int], tuple[Any, ...], tuple[tuple[str, ...], ...]]:
    """The grid, the arguments, and of each argument the names of its tensors, the tables aside."""
    roles, sizes, splits = found.roles, found.sizes, found.tile.splits
    tiles_s, tiles_k, tiles_o, tiles_n = found.tiles
    batch, tiles_b = batch_of(call, mapped, found.tile.BT)
    first, plane = (result, 0) if sums is None else (sums[0], sums.stride(0))

    def read(view: FactorView, slot: str) -> tuple[Factor, tuple[str, ...]]:
        if slot == "hidden" and call.activation:
            return view(factors["chunks"], factors["hidden"]), ("chunks", "hidden")
        return view(factors[slot]), (slot,)

    u, f = (found.u(factors[roles.u]), (roles.u,)), read(found.f, roles.f)
    shared: list[tuple[Any, tuple[str, ...]]] = [(batch, ()), (plane, ())]
    if out == roles.v:
        grid = (tiles_b * splits, tiles_n, tiles_o)
        parts = [u, f, read(found.w, roles.w), (found.v(first), ("result",)), *shared]
    else:
        target = found.w(first), ("result",)
        w = read(found.w, out) if sizes.additive else target
        grid = ((call.contexts if sizes.by_context else 1) * splits * tiles_s * tiles_k, tiles_n, 1)
        v = found.v(factors[roles.v]), (roles.v,)
        parts = [u, f, v, w, target, (contexts, ("contexts",)), *shared]
    arguments, names = zip(*parts)
    return grid, arguments, names
