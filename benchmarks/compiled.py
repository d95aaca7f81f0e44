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
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from hyperkernels.backends.mapped import Mapped
from hyperkernels.bench.roofline import roofline
from hyperkernels.call import ORDERS, OUTPUT, Call, Window
from hyperkernels.chunking import Grid
from hyperkernels.kernels.roles import sizes_of
from hyperkernels.kernels.tiles import CHIPS, Chip, Tile, predicted_us, tile_for
from hyperkernels.kernels.windows import linear_call, linear_factors

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hyperkernels.kernels.launch import Launch, prepare, summing
from hyperkernels.kernels.planes import sum_planes

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Target(NamedTuple):
    """What is compiled for: `wide` is the instruction of its tensor cores' own tiles, `tensor_core` each of theirs."""

    gpu: GPUTarget
    chip: Chip
    memory_bytes_per_s: float
    wide: str
    tensor_core: str


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), CHIPS[8, 0], 1.9e12, "HMMA", "HMMA"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), CHIPS[9, 0], 4.3e12, "HGMMA", "HG?MMA"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), CHIPS[10, 0], 7e12, "UTCHMMA", "(UTC)?HMMA"),
    "gfx942": Target(
        GPUTarget("hip", "gfx942", 64), Chip(304, 65_536, 110, 128, 8e14, 8e13, 1e13), 4.5e12, "v_mfma", "v_mfma"
    ),
}
LARGE, WIDE, FINE = Grid(4096, 4096, 16, 256), Grid(8192, 28672, 16, 1024), Grid(512, 512, 32, 32)
IMAGES = Window((3, 3), (1, 1), (1, 1), (1, 1), (14, 14))


class Shape(NamedTuple):
    grid: Grid
    contexts: int
    tokens: int
    activation: str = ""
    mapped: bool = False
    width: int = 32
    window: Window | None = None

    def call(self, dtype: torch.dtype) -> Call:
        G, T = self.contexts, self.tokens
        return Call(self.grid, self.width, G, G, T, False, self.mapped, self.activation, dtype, "cuda", self.window)


SHAPES = {
    "8192 tokens": Shape(LARGE, 1, 8192),
    "decode 1": Shape(LARGE, 1, 1),
    "decode 16": Shape(LARGE, 1, 16),
    "decode 1, wide": Shape(WIDE, 1, 1),
    "256 contexts": Shape(LARGE, 256, 1, "relu"),
    "64 contexts of 128": Shape(LARGE, 64, 128),
    "64 mapped contexts": Shape(LARGE, 64, 128, "tanh", mapped=True),
    "fine chunks": Shape(FINE, 1, 4096),
    "wide hidden layer": Shape(FINE, 1, 4096, width=64),
    "convolution": Shape(Grid(256, 256, 4, 256), 1, 32, width=16, window=IMAGES),
    "fine convolution": Shape(Grid(256, 256, 16, 16), 1, 32, width=64, window=IMAGES),
    "32 images' contexts": Shape(Grid(256, 256, 4, 256), 32, 1, "relu", width=16, window=IMAGES),
    "odd": Shape(Grid(31, 29, 7, 5), 3, 5),
    "one of each": Shape(Grid(1, 1, 1, 1), 1, 1),
}


def drawn(count: int) -> dict[str, Shape]:
    """Shapes of any kind, as layers have them and as they do not."""
    random = Random(0)

    def draw() -> Shape:
        N, K = random.choice((64, 100, 512, 1000, 3072, 11008, 50257)), random.choice((64, 100, 768, 1024, 4096))
        grid = Grid(N, K, min(random.choice((1, 2, 4, 8, 16, 32, N)), N), min(random.choice((1, 4, 32, 128, K)), K))
        contexts, tokens = random.choice(((1, 1), (1, 16), (1, 100), (1, 2048), (16, 1), (256, 1), (32, 64), (3, 5)))
        many = contexts > 1
        activation = random.choice(("", "relu", "tanh", "gelu")) if many else ""
        return Shape(grid, contexts, tokens, activation, many and random.random() < 0.3, random.choice((1, 8, 32, 128)))

    return {f"drawn {n}": draw() for n in range(count)}


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

    @property
    def utils(self) -> Elsewhere:
        return self

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}

    def load_binary(self, _name: str, kernel: bytes, _shared: int, _device: int) -> tuple[int, int, int, int, int]:
        machine = sass(kernel)
        return 1, 0, machine.registers, machine.stack_bytes // 4, 1024

    def launcher_cls(self, _source: Any, _metadata: Any) -> None:
        return None


def launch_of(call: Call, order: str, out: str, chip: Chip) -> Launch:
    names = ("x", "y", "hidden", "head", *(["chunks"] if call.activation else []))
    factors = {name: torch.empty(call.shape(name), dtype=call.dtype, device="meta") for name in names}
    ids = torch.empty(call.entries, dtype=torch.int64, device="meta")
    mapped = Mapped.of(ids, call.contexts) if call.mapped else None
    return prepare(linear_call(call, out), order, out, linear_factors(call, out, factors), mapped, chip)


class Machine(NamedTuple):
    """What a kernel became: registers of a thread, bytes of stack, instructions that spill, and all of them."""

    registers: int
    stack_bytes: int
    spills: int
    instructions: list[str]


@cache
def sass(cubin: bytes) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = (
            subprocess.run([TOOL, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", listing, re.M)
    return Machine(registers, stack, sum(i in ("LDL", "STL") for i in instructions), instructions)


def amdgcn(listing: str) -> Machine:
    registers, stack, spills = (
        int(re.findall(rf"\.{name}:\s*(\d+)", listing)[0])
        for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    )
    return Machine(registers, stack, spills, re.findall(r"^\s+(v_mfma|[a-z]\w+)", listing, re.M))


def compiled(name: str, call: Call, out: str, target: Target) -> dict[str, Any]:
    chip = target.chip
    own = linear_call(call, out)
    gathered = call.window is not None
    order = min(ORDERS, key=lambda order: tile_for(sizes_of(own, order, out, gathered), chip)[1])
    sizes = sizes_of(own, order, out, gathered)
    launch = launch_of(call, order, out, chip)
    settled = launch.keywords
    BT, BS, BK, BO, BN, BD = (settled.get(block, 1) for block in ("BT", "BS", "BK", "BO", "BN", "BD"))
    tile = Tile(BT, BS, BK, BO, BN, BD, settled["SPLITS"], settled["num_warps"], settled["num_stages"])
    nvidia = target.gpu.backend == "cuda"
    keywords = {name: value for name, value in launch.keywords.items() if nvidia or name != "maxnreg"}
    kernel = launch.kernel.warmup(*launch.arguments, grid=(1,), **keywords)
    read = (lambda asm: sass(asm["cubin"])) if nvidia else (lambda asm: amdgcn(asm["amdgcn"]))
    machine = read(kernel.asm)
    summed_spills = 0
    if launch.sums is not None:
        grid, numbers, blocks = summing(launch.sums.shape)
        summed_spills = read(sum_planes.warmup(launch.sums, launch.result, *numbers, grid=grid, **blocks).asm).spills
    flops_per_s = chip.fp32_flops_per_s if call.dtype == torch.float32 else chip.flops_per_s
    roof = roofline(call, order, (out,), flops_per_s, target.memory_bytes_per_s)
    return {
        "shape": name,
        "output": OUTPUT[out],
        "order": order,
        "kernel": sizes.kernel,
        "tile": [tile.BT, tile.BS, tile.BK, tile.BO, tile.BN, tile.BD],
        "splits": tile.splits,
        "warps": tile.warps,
        "stages": tile.stages,
        "registers": machine.registers,
        "stack_bytes": machine.stack_bytes,
        "shared_bytes": kernel.metadata.shared,
        "tensor_core": sum(bool(re.fullmatch(target.tensor_core, i)) for i in machine.instructions),
        "wide_tensor_core": machine.instructions.count(target.wide),
        "spills": machine.spills + summed_spills,
        "flops": roof.flops,
        "bytes_moved": roof.bytes_moved,
        "roofline_us": roof.time_us,
        "bound": roof.bound,
        "predicted_us": predicted_us(sizes, tile, chip),
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
        epilog="examples:\n  python benchmarks/compiled.py --chip sm_90\n"
        "  python benchmarks/compiled.py --chip sm_80 --dtype float16 --output out/sm_80.json\n\n"
        "The tile is BT x BS x BK x BO x BN x BD, the letters of hyperkernels/kernels/chain.py; then splits, warps,\n"
        "stages, registers of a thread, instructions that spill, bytes of shared memory, the chip's own tensor-core\n"
        "instructions, all of them, GFLOP, MiB, us by the roofline and what bounds it, us that the model predicts.\n\n"
        "exit codes: 0, 1 if a kernel does not compile, 2 for bad arguments",
    )
    parser.add_argument("--chip", choices=TARGETS, default="sm_90", help="what to compile for")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--drawn", type=int, metavar="N", help="N shapes drawn at random, in place of the benchmark's")
    parser.add_argument("--output", type=Path, help="where to save the table, as JSON")
    arguments = parser.parse_args()
    target = TARGETS[arguments.chip]
    driver.set_active(Elsewhere(target.gpu))  # type: ignore[arg-type]
    rows, failed = [], 0
    shapes = SHAPES if arguments.drawn is None else drawn(arguments.drawn)
    for name, shape in shapes.items():
        for out in OUTPUT:
            try:
                rows.append(compiled(name, shape.call(getattr(torch, arguments.dtype)), out, target))
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
