"""Which tile a kernel runs with: the cheapest of those that fit the chip, by a model of what one program does.

No timing, at run time or before, but where `tuning` is asked for; what a compiler spills gives way (`spills`). What a
tile must fit (registers, shared memory) and what it costs (products, bytes from the cache, waves of programs) follow
from the shape; the constants are the chip's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from heapq import nsmallest
from typing import NamedTuple

from hyperkernels.chunking import ceil_div


class Chip(NamedTuple):
    """Multiprocessors; bytes of shared memory that a program may use; registers for a thread's sums and loads, and
    bytes of a product's depth (with more, registers spill); and what all multiprocessors together sustain: products of
    16-bit numbers on tensor cores, of fp32 numbers beside them, and bytes from the second-level cache."""

    multiprocessors: int
    shared_bytes: int
    registers: int
    depth_bytes: int
    flops_per_s: float
    fp32_flops_per_s: float
    cache_bytes_per_s: float

    def depth(self, itemsize: int) -> int:
        """The most of a product: less where its operands come from registers, as those of fp32 do everywhere."""
        return (self.depth_bytes if itemsize == 2 else 128) // itemsize

    def most_registers(self, itemsize: int, rows: int) -> int:
        share = 2 / 5 if itemsize == 4 else 2 / 3 if rows < WIDE else 1
        return int(share * self.registers)


CHIPS = {  # by compute capability
    (8, 0): Chip(108, 166_912, 128, 128, 2.5e14, 1.5e13, 3.5e12),
    (9, 0): Chip(132, 232_448, 150, 512, 7.9e14, 5e13, 6e12),
    (10, 0): Chip(148, 232_448, 120, 512, 1.6e15, 6e13, 8e12),
}
LAUNCH_US, STEP_US = 4.0, 0.3
ACCESS_BYTES = 16
WIDE = 64  # rows of a tensor core's own tile
LEADING = 8  # tiles that are worth timing, where tiles are timed
LEAST, MOST_ROWS, MOST_COLUMNS = 16, 128, 256  # of a product on tensor cores
MOST_ALONG = 65535  # programs along a launch's second and third dimension
GATHERED = 64  # depth of a product, at most, whose operand is gathered: an address for each number takes registers


def chip_of(capability: tuple[int, int]) -> Chip:
    """The newest known chip that is no newer; the oldest known for older ones."""
    return CHIPS[max((c for c in CHIPS if c <= capability), default=min(CHIPS))]


class Sizes(NamedTuple):
    """One contraction in the letters of `chain`: the kernel that does it, the contexts that have rows, the rows of
    each, and the extents of s, k, o, n and d. `runs` has for each of u, f, w and v the letter whose numbers lie side by
    side, or a dash where tables tell. `planes` and `context_planes`: how many partial results the workspace has room
    for, and how many of what an additive hidden's contexts get. `by_context`: w comes out, one for each context;
    `additive`: it is an additive hidden; `activated`: which of f and w is read as one."""

    kernel: str
    contexts: int
    rows: int
    S: int
    M: int
    O: int
    N: int
    D: int
    itemsize: int
    runs: str
    planes: int
    context_planes: int
    by_context: bool = False
    additive: bool = False
    activated: str = ""


@dataclass(frozen=True)
class Tile:
    """Sizes of a program's tiles, powers of two; how many programs share one tile's sum; warps and pipeline stages."""

    BT: int
    BS: int
    BK: int
    BO: int
    BN: int
    BD: int
    splits: int = 1
    warps: int = 8
    stages: int = 1


class NoTile(ValueError):
    """None fits the chip, and is large enough for a launch to cover a result."""


class Work(NamedTuple):
    """What a program does: for each outer step, inner steps that form a tile of the intermediate, and one product that
    consumes it. Products are (rows, columns, depth); loads are numbers for a step, and how many accesses of at most
    `ACCESS_BYTES` they take, `activated` those of them that an activation is taken of; `splits` is the most there can
    be."""

    inner: tuple[int, int, int]
    inner_steps: int
    inner_loads: int
    inner_accesses: int
    outer: tuple[int, int, int]
    outer_steps: int
    outer_loads: int
    outer_accesses: int
    held: int
    programs: int
    splits: int
    activated: int

    def shared_bytes(self, itemsize: int, stages: int) -> int:
        """Operands in flight, and the intermediate on its way from one product to the next."""
        streamed = self.inner_loads + self.outer_loads
        return itemsize * (self.held + stages * streamed + self.inner[0] * self.inner[1])

    def registers(self, additive: bool) -> float:
        """Sums (beside an additive hidden's there are its activation's derivative and their product), what a load
        needs for its address and its numbers, and what is formed of them. Of all threads, less what every kernel
        needs."""
        inner, outer = self.inner[0] * self.inner[1], self.outer[0] * self.outer[1]
        loads = 3.5 * (self.inner_accesses + self.outer_accesses)
        return inner + outer * (3 if additive else 1) + loads + self.activated / 2


def work_of(sizes: Sizes, t: Tile) -> Work:
    rows = ceil_div(sizes.rows, t.BT)
    S, M, O, N, D = (
        ceil_div(size, block)
        for size, block in ((sizes.S, t.BS), (sizes.M, t.BK), (sizes.O, t.BO), (sizes.N, t.BN), (sizes.D, t.BD))
    )
    u, f, w, v = t.BT * t.BS * t.BD, t.BO * t.BK * t.BD, t.BS * t.BK * t.BN, t.BT * t.BO * t.BN
    block = {"s": t.BS, "k": t.BK, "o": t.BO, "n": t.BN, "d": t.BD}

    def accesses(numbers: int, run: str) -> int:
        """Of what is gathered each number has an address of its own, in two registers, and a table's number: some three
        times what an access takes. Its time is not modelled."""
        return 3 * numbers if run == "-" else numbers // min(block[run], ACCESS_BYTES // sizes.itemsize)

    in_u, in_f, in_w, in_v = map(accesses, (u, f, w, v), sizes.runs)
    work = partial(Work, activated={"f": f, "w": w, "": 0}[sizes.activated])
    apart = sizes.contexts if sizes.by_context else 1
    together = sizes.contexts // apart
    if sizes.kernel == "contract_rows":
        inner, outer, steps = (t.BT * t.BS, t.BK * t.BO, t.BD), (t.BT * t.BO, t.BN, t.BS * t.BK), S * M
        programs = sizes.contexts * rows * N * O
        if S == D == 1:
            return work(inner, D, f, in_f, outer, steps, w, in_w, u, programs, steps)
        return work(inner, D, u + f, in_u + in_f, outer, steps, w, in_w, 0, programs, steps)
    if sizes.kernel == "contract_sums":
        inner, outer = (t.BT * t.BS, t.BK * t.BO, t.BD), (t.BS * t.BK, t.BN, t.BT * t.BO)
        tiles, programs = together * rows, S * M * N * apart
        return work(inner, D, u + f, in_u + in_f, outer, tiles * O, v, in_v, 0, programs, tiles)
    if sizes.kernel == "generate_rows":
        inner, outer, steps = (t.BN, t.BO * t.BD, t.BK), (t.BT, t.BN * t.BO, t.BD), sizes.S * D
        programs = sizes.contexts * rows * N * O
        return work(inner, M, w + f, in_w + in_f, outer, steps, u, in_u, 0, programs, steps)
    inner, outer, steps = (t.BN * t.BO, t.BD, t.BT), (t.BN, t.BK, t.BO * t.BD), O * D
    programs = sizes.S * M * N * apart
    return work(inner, rows, u + v, in_u + in_v, outer, together * steps, f, in_f, 0, programs, steps)


def _time_us(work: Work, itemsize: int, splits: int, chip: Chip) -> float:
    def product_us(M: int, N: int, K: int) -> float:
        if itemsize == 4:
            return 2e6 * M * N * K * chip.multiprocessors / chip.fp32_flops_per_s
        return 2e6 * max(M, WIDE) * N * K * chip.multiprocessors / chip.flops_per_s

    moved = itemsize * (work.inner_steps * work.inner_loads + work.outer_loads)
    step_us = max(
        work.inner_steps * product_us(*work.inner) + product_us(*work.outer),
        1e6 * moved * chip.multiprocessors / chip.cache_bytes_per_s,
    )
    program_us = ceil_div(work.outer_steps, splits) * (step_us + STEP_US) + 1
    return ceil_div(work.programs * splits, chip.multiprocessors) * program_us + LAUNCH_US * (1 + (splits > 1))


def power_of_two(n: int) -> int:
    """The least that is no smaller."""
    return 1 << max(n - 1, 0).bit_length()


def _candidates(sizes: Sizes, chip: Chip) -> Iterator[Tile]:
    """Blocks of each label: powers of two up to its extent, or to the least that a product can do with."""

    def powers(extent: int, low: int = 1, high: int = MOST_ROWS) -> list[int]:
        top = min(max(power_of_two(extent), LEAST), high)
        return [1 << p for p in range(low.bit_length() - 1, top.bit_length())]

    widest = min(chip.depth(sizes.itemsize), GATHERED if "-" in sizes.runs else MOST_COLUMNS)
    if sizes.kernel.startswith("contract"):
        BD = min(max(power_of_two(sizes.D), LEAST), widest)
        for BT in powers(sizes.rows):
            for BS in powers(sizes.S, max(1, LEAST // BT), MOST_ROWS // BT):
                for BO in powers(sizes.O, 1, MOST_ROWS):
                    for BK in powers(sizes.M, max(2, LEAST // min(BS, BO)), MOST_ROWS // BO):
                        for BN in powers(sizes.N, LEAST, MOST_COLUMNS):
                            yield Tile(BT, BS, BK, BO, BN, BD)
    else:
        BK = min(max(power_of_two(sizes.M), LEAST), widest, 64)
        for BT in powers(sizes.rows, LEAST):
            for BN in powers(sizes.N, LEAST):
                for BO in powers(sizes.O, 1, MOST_COLUMNS // BN):
                    for BD in powers(sizes.D, LEAST, max(widest // 2, LEAST)):
                        yield Tile(BT, 1, BK, BO, BN, BD)


def _fitting(sizes: Sizes, chip: Chip) -> Iterator[tuple[Tile, Work]]:
    for tile in _candidates(sizes, chip):
        work = work_of(sizes, tile)
        shapes = (*work.inner, *work.outer)
        if (
            min(shapes) < LEAST
            or max(work.inner[0], work.outer[0]) > MOST_ROWS
            or work.outer[2] > chip.depth(sizes.itemsize)
            or max(ceil_div(sizes.N, tile.BN), ceil_div(sizes.O, tile.BO)) > MOST_ALONG
        ):
            continue
        registers = work.registers(sizes.additive)
        most = chip.most_registers(sizes.itemsize, work.inner[0])
        warps = 4 if registers <= 32 * 4 * most / 2 else 8
        if registers > 32 * warps * most:
            continue
        for stages in (3, 2, 1):
            if work.shared_bytes(sizes.itemsize, stages) <= chip.shared_bytes:
                yield replace(tile, warps=warps, stages=stages), work
                break


def tile_for(sizes: Sizes, chip: Chip) -> tuple[Tile, float]:
    """The tile that the model thinks fastest, with as many programs to a sum as it takes to give every multiprocessor
    one; and the time that it expects, in us. Sizes of one `bucket` share a tile."""
    tile = splits_within(sizes, leading_tiles(sizes, chip)[0])
    return tile, predicted_us(sizes, tile, chip)


def predicted_us(sizes: Sizes, tile: Tile, chip: Chip) -> float:
    return _time_us(work_of(sizes, tile), sizes.itemsize, tile.splits, chip)


def leading_tiles(sizes: Sizes, chip: Chip) -> tuple[Tile, ...]:
    """The few that the model thinks fastest, best first.

    Raises:
        NoTile: there is none.
    """
    found = _leading(bucket(sizes), chip)
    if not found:
        raise NoTile(f"backend: 'triton' cannot do this call: no tile fits the chip and covers {sizes.N} x {sizes.O}")
    return found


def splits_within(sizes: Sizes, tile: Tile) -> Tile:
    """The tile, with no more splits than these sizes have steps."""
    return replace(tile, splits=max(1, min(tile.splits, work_of(sizes, tile).splits)))


def bucket(sizes: Sizes) -> Sizes:
    """Rows and contexts up to the next power of two; and the room there is then, down to one."""
    rows, contexts = power_of_two(sizes.rows), power_of_two(sizes.contexts)
    planes = sizes.planes
    if sizes.kernel.endswith("_rows"):  # a result has rows too
        planes = planes * sizes.rows * sizes.contexts // (rows * contexts)

    def room(planes: int) -> int:
        return 1 << planes.bit_length() - 1 if planes else 0

    return sizes._replace(
        rows=rows,
        contexts=contexts,
        planes=room(planes),
        context_planes=room(sizes.context_planes * sizes.contexts // contexts),
    )


@lru_cache(maxsize=4096)
def _leading(sizes: Sizes, chip: Chip) -> tuple[Tile, ...]:
    found: dict[Tile, tuple[float, float]] = {}
    for tile, work in _fitting(sizes, chip):
        for splits in {1, max(1, min(work.splits, sizes.planes, chip.multiprocessors // max(work.programs, 1)))}:
            time_us = _time_us(work, sizes.itemsize, splits, chip)
            # what the contexts' sums take beyond the workspace comes before time
            over = max(context_planes(sizes, tile, splits) - sizes.context_planes, 0)
            found[replace(tile, splits=splits)] = (over, time_us)
    return tuple(nsmallest(LEADING, found, key=lambda tile: found[tile]))


def context_planes(sizes: Sizes, tile: Tile, splits: int) -> int:
    """How many sums by the contexts of an additive hidden are kept apart."""
    planes = ceil_div(sizes.S, tile.BS) * ceil_div(sizes.N, tile.BN) if sizes.additive else 0
    return planes * (splits if sizes.kernel == "generate_sums" else 1)
