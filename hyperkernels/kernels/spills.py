"""A tile whose numbers the compiler does not keep in registers gives way to another: its versions differ in that."""

from __future__ import annotations

from collections.abc import Callable

from triton.runtime import driver

from hyperkernels.kernels import tuning
from hyperkernels.kernels.tiles import Chip, NoTile, Sizes, Tile, context_planes, tile_for

LIGHTER = (  # shares of the chip's registers, and of its depth, that the model may fill; one after the other
    *((1, 1), (1, 0.5), (0.85, 1), (0.85, 0.5), (0.85, 0.25)),
    *((0.7, 0.25), (0.55, 0.25), (0.4, 0.25), (0.3, 0.25), (0.2, 0.25)),
)
SLOWER = 2  # times as long as the first should take: what spills a little may then be faster
INDEXED = {"sin": 8}  # numbers in memory whatever the tile: to reduce a large argument


def compiler_tells() -> bool:
    """Whether a compiled kernel may be loaded, to see what it spills: not while a CUDA graph is captured."""
    target = driver.active.get_current_target()
    return target is not None and target.backend == "cuda" and not tuning.capturing()


def unspilled_tile(sizes: Sizes, chip: Chip, activation: str, spilled: Callable[[Tile], float]) -> Tile:
    """Of the model's tiles for the chip, and for less of it, the first of which no number of a thread is `spilled`,
    else the one that spills least."""
    found: dict[float, Tile] = {}
    first, first_us = tile_for(sizes, chip)
    room = max(sizes.context_planes, context_planes(sizes, first, first.splits))
    for registers, depth in LIGHTER:
        lighter = chip._replace(registers=int(registers * chip.registers), depth_bytes=int(depth * chip.depth_bytes))
        try:
            tile, time_us = tile_for(sizes, lighter)
        except NoTile:
            break
        roomy = context_planes(sizes, tile, tile.splits) <= room
        if roomy and time_us <= SLOWER * first_us and tile not in found.values():
            found.setdefault(spilled(tile), tile)
        if min(found) <= INDEXED.get(activation, 0):
            break
    return found[min(found)]
