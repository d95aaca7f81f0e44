"""Who plays which part in the Triton kernels, and which tile the model picks; nothing is run."""

from __future__ import annotations

import pytest
import torch

from hyperkernels.backends.triton_fused import DTYPES
from hyperkernels.call import ORDERS, Call, Window
from hyperkernels.chunking import Grid
from hyperkernels.kernels.roles import roles_of, sizes_of
from hyperkernels.kernels.spills import unspilled_tile
from hyperkernels.kernels.tiles import CHIPS, NoTile, Tile, chip_of, context_planes, tile_for, work_of
from hyperkernels.kernels.windows import linear_call


def test_roles():
    """The table of `chain`."""
    call = Call(Grid(32, 48, 4, 8), 3, 1, 1, 10)
    roles = {(order, out): roles_of(call, order, out) for order in ORDERS for out in ("y", "hidden", "x", "head")}
    assert roles["head_first", "y"][:4] == ("x", "head", "hidden", "y")
    assert roles["head_first", "y"][4:] == ("j", "r", "i", "q")
    assert roles["head_first", "hidden"] == roles["head_first", "y"]
    assert roles["head_first", "x"] == ("y", "hidden", "head", "x", "r", "j", "q", "i")
    assert roles["hidden_first", "y"] == ("x", "hidden", "head", "y", "q", "i", "r", "j")
    assert roles["generate", "head"] == roles["head_first", "head"]


SHAPES = [
    (4096, 4096, 16, 256),
    (1024, 1024, 16, 64),
    (8192, 28672, 16, 1024),
    (7, 5, 3, 2),
    (1, 1, 1, 1),
    (50, 4000, 50, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("capability", CHIPS, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_tiles_fit(capability, shape):
    """Whatever the shape there is a tile, whose products tensor cores take and whose operands the chip holds."""
    chip = chip_of(capability)
    for contexts, rows in ((1, 1), (1, 16), (1, 8192), (256, 1), (64, 128)):
        for dtype in DTYPES:
            call = Call(Grid(*shape), 32, contexts, contexts, rows, dtype=dtype, device="cuda")
            for order in ORDERS:
                for out in ("y", "x", "hidden", "head"):
                    sizes = sizes_of(call, order, out)
                    tile, time_us = tile_for(sizes, chip)
                    work = work_of(sizes, tile)
                    assert min(*work.inner, *work.outer) >= 16
                    assert work.shared_bytes(dtype.itemsize, tile.stages) <= chip.shared_bytes
                    assert 1 <= tile.splits <= work.splits
                    assert time_us > 0


@pytest.mark.parametrize(
    ("activation", "spills", "tried", "picked"),
    [
        ("", [0], 1, 0),
        ("tanh", [8, 30, 0], 3, 2),
        ("sin", [8], 1, 0),
        ("", [9, 2, 5, 5, 5, 5, 5, 5, 5, 5], None, 1),
    ],
    ids=["the_first", "a_lighter", "what_sin_needs", "the_least"],
)
def test_a_tile_that_spills_gives_way(activation, spills, tried, picked):
    sizes, chip = (
        sizes_of(Call(Grid(4096, 4096, 16, 256), 32, 1, 1, 8192, device="cuda"), "head_first", "head"),
        CHIPS[9, 0],
    )
    seen: list[Tile] = []
    found = unspilled_tile(sizes, chip, activation, lambda tile: seen.append(tile) or spills[len(seen) - 1])
    assert seen[0] == tile_for(sizes, chip)[0]
    assert found == seen[picked]
    assert len(seen) == (tried or len(set(seen)))


def test_a_lighter_tile_is_only_one_that_there_is_and_has_the_room():
    images = Window((3, 3), (1, 1), (1, 1), (1, 1), (14, 14))
    call = linear_call(Call(Grid(64, 64, 4, 64), 16, 4, 4, 1, activation="tanh", device="cuda", window=images), "y")
    for chip in CHIPS.values():
        sizes = sizes_of(call, "head_first", "y", True)
        assert unspilled_tile(sizes, chip, "tanh", lambda _tile: 2) == tile_for(sizes, chip)[0]
    call = Call(Grid(4096, 4096, 4, 64), 64, 512, 512, 1, activation="tanh", dtype=torch.bfloat16, device="cuda")
    sizes, chip = sizes_of(call, "generate", "hidden"), CHIPS[9, 0]
    seen = []
    unspilled_tile(sizes, chip, "tanh", lambda tile: seen.append(tile) or 2)
    first, *others = (context_planes(sizes, tile, tile.splits) for tile in seen)
    assert all(planes <= max(first, sizes.context_planes) for planes in others)
    with pytest.raises(NoTile, match="no tile fits"):
        tile_for(sizes_of(Call(Grid(1 << 25, 64, 1, 64), 8, 1, 1, 8, device="cuda"), "head_first", "y"), chip)


def test_numbers_of_rows_up_to_a_power_of_two_share_a_tile():
    calls = [Call(Grid(4096, 4096, 16, 256), 32, 1, 1, rows, device="cuda") for rows in (5000, 7777, 8192)]
    tiles = {tile_for(sizes_of(call, "head_first", "hidden"), chip_of((9, 0)))[0] for call in calls}
    assert len(tiles) == 1


def test_small_batches_fill_the_chip():
    call = Call(Grid(4096, 4096, 16, 256), 32, 1, 1, 1, dtype=torch.bfloat16, device="cuda")
    sizes = sizes_of(call, "head_first", "y")
    tile, _ = tile_for(sizes, chip_of((9, 0)))
    assert work_of(sizes, tile).programs * tile.splits >= 128
