"""The Triton kernels of the benchmark's shapes, compiled for a chip that need not be there: what the planner picks on
it, the registers, spills, shared memory and tensor-core instructions that come of it, and the time that the model
predicts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from roofline import roofline

from hyperkernels.backends.mapped import Mapped
from hyperkernels.call import ORDERS, OUTPUT, Call
from hyperkernels.chunking import Grid
from hyperkernels.kernels.roles import sizes_of
from hyperkernels.kernels.tiles import CHIPS, Chip, chip_of, tile_for

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hyperkernels.kernels.launch import Launch, prepare

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR_CORES = {(8, 0): "HMMA", (9, 0): "HGMMA", (10, 0): "UTCHMMA"}
MEMORY_BYTES_PER_S = {(8, 0): 1.9e12, (9, 0): 4.3e12, (10, 0): 7e12}
LARGE, WIDE, FINE = Grid(4096, 4096, 16, 256), Grid(8192, 28672, 16, 1024), Grid(512, 512, 32, 32)


class Shape(NamedTuple):
    grid: Grid
    contexts: int
    tokens: int
    activation: str = ""
    mapped: bool = False

    def call(self, dtype: torch.dtype) -> Call:
        return Call(
            self.grid, 32, self.contexts, self.contexts, self.tokens, False, self.mapped, self.activation, dtype, "cuda"
        )


SHAPES = {
    "8192 tokens": Shape(LARGE, 1, 8192),
    "decode 1": Shape(LARGE, 1, 1),
    "decode 16": Shape(LARGE, 1, 16),
    "decode 1, wide": Shape(WIDE, 1, 1),
    "256 contexts": Shape(LARGE, 256, 1, "relu"),
    "64 contexts of 128": Shape(LARGE, 64, 128),
    "64 mapped contexts": Shape(LARGE, 64, 128, "tanh", mapped=True),
    "fine chunks": Shape(FINE, 1, 4096),
    "odd": Shape(Grid(31, 29, 7, 5), 3, 5),
    "one of each": Shape(Grid(1, 1, 1, 1), 1, 1),
}


class Elsewhere:
    """Stands for the driver of a chip that is not there: all that compiling asks of it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_of(call: Call, order: str, out: str, chip: Chip) -> Launch:
    names = ("x", "y", "hidden", "head", *(["chunks"] if call.activation else []))
    factors = {name: torch.empty(call.shape(name), dtype=call.dtype, device="meta") for name in names}
    ids = torch.empty(call.entries, dtype=torch.int64, device="meta")
    return prepare(call, order, out, factors, Mapped.of(ids, call.contexts) if call.mapped else None, chip)


def sass(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers, bytes of stack, and the instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = (
            subprocess.run([TOOL, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return (
        int(registers),
        int(stack),
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", listing, re.M),
    )


def compiled(name: str, call: Call, out: str, capability: tuple[int, int]) -> dict[str, Any]:
    chip = chip_of(capability)
    order = min(ORDERS, key=lambda order: tile_for(sizes_of(call, order, out), chip)[1])
    sizes = sizes_of(call, order, out)
    tile, predicted_us = tile_for(sizes, chip)
    launch = launch_of(call, order, out, chip)
    kernel = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.keywords)
    registers, stack, instructions = sass(kernel.asm["cubin"])
    roof = roofline(call, order, (out,), chip.flops_per_s, MEMORY_BYTES_PER_S[capability])
    return {
        "shape": name,
        "output": OUTPUT[out],
        "order": order,
        "kernel": sizes.kernel,
        "tile": [tile.BT, tile.BS, tile.BK, tile.BO, tile.BN, tile.BD],
        "splits": tile.splits,
        "warps": tile.warps,
        "stages": tile.stages,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": kernel.metadata.shared,
        "tensor_core": sum(i in ("HMMA", *TENSOR_CORES.values()) for i in instructions),
        "wide_tensor_core": instructions.count(TENSOR_CORES[capability]),
        "spills": sum(i in ("LDL", "STL") for i in instructions),
        "flops": roof.flops,
        "bytes_moved": roof.bytes_moved,
        "roofline_us": roof.time_us,
        "bound": roof.bound,
        "predicted_us": predicted_us,
    }


def row(found: dict[str, Any]) -> str:
    tile = "x".join(map(str, found["tile"]))
    return (
        f"{found['shape']:20}{found['output']:9}{found['order']:13}{tile:22}{found['splits']:>4}{found['warps']:>3}"
        f"{found['stages']:>3}{found['registers']:>5}{found['spills']:>5}{found['shared_bytes']:>8}"
        f"{found['wide_tensor_core']:>5}{found['tensor_core']:>5}{found['flops'] / 1e9:>9.2f}"
        f"{found['bytes_moved'] / 2**20:>8.1f}{found['roofline_us']:>8.1f} {found['bound']:8}"
        f"{found['predicted_us']:>8.1f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python benchmarks/compiled.py --chip 9.0\n"
        "  python benchmarks/compiled.py --chip 8.0 --dtype float16 --output out/sm_80.json\n\n"
        "The tile is BT x BS x BK x BO x BN x BD, the letters of hyperkernels/kernels/chain.py; then splits, warps,\n"
        "stages, registers of a thread, instructions that spill, bytes of shared memory, the chip's own tensor-core\n"
        "instructions, all of them, GFLOP, MiB, us by the roofline and what bounds it, us that the model predicts.\n\n"
        "exit codes: 0, 1 if a kernel does not compile, 2 for bad arguments",
    )
    chips = {f"{major}.{minor}": (major, minor) for major, minor in CHIPS}
    parser.add_argument("--chip", choices=chips, default="9.0", help="compute capability")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--output", type=Path, help="where to save the table, as JSON")
    arguments = parser.parse_args()
    capability = chips[arguments.chip]
    driver.set_active(Elsewhere(GPUTarget("cuda", 10 * capability[0] + capability[1], 32)))  # type: ignore[arg-type]
    rows, failed = [], 0
    for name, shape in SHAPES.items():
        for out in OUTPUT:
            try:
                rows.append(compiled(name, shape.call(getattr(torch, arguments.dtype)), out, capability))
            except Exception as error:  # the rest is still worth knowing
                failed += 1
                print(f"{name:20}{OUTPUT[out]:9}does not compile: {error}", flush=True)
            else:
                print(row(rows[-1]), flush=True)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(rows, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
