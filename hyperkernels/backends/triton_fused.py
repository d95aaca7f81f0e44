"""The Triton engine: every contraction, in every order, by one kernel whose intermediate never leaves the chip; or by
two plain products, blocked as the torch backend does it, where they are expected to be faster.

The kernels are in `hyperkernels/kernels`; this room says what they can do, and how long and in what memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from hyperkernels.backends import torch_blocks, torch_matmul
from hyperkernels.backends.mapped import Mapped
from hyperkernels.call import Call, result_names
from hyperkernels.kernels.roles import sizes_of
from hyperkernels.kernels.tiles import LAUNCH_US, Chip, NoTile, chip_of, context_planes, tile_for
from hyperkernels.kernels.windows import copied, from_rows, linear_call, linear_factors
from hyperkernels.planner import Cost, Plan, Step

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (8, 0)
ASSUMED = (9, 0)  # where there is no device to ask
COPYING = 20  # launches that copy a convolution's x and y, and make the tables
FUSED, TWO_PRODUCTS = "one kernel", "two products"


def interpreted() -> bool:
    """Whether triton runs its kernels on the CPU, one operation at a time: to test them."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def installed() -> bool:
    return find_spec("triton") is not None


def supports(call: Call, order: str | None) -> tuple[bool, str]:
    if not installed():
        return False, "triton is not installed"
    if call.device != "cuda" and not (call.device == "cpu" and interpreted()):
        return False, f"it runs on CUDA devices, and the tensors are on {call.device}"
    if call.device == "cuda" and not torch.cuda.is_available():
        return False, "torch sees no CUDA device here"
    if call.device == "cuda" and (torch.version.hip or torch.cuda.get_device_capability() < OLDEST):
        return False, "it runs on NVIDIA devices of compute capability 8.0 and later"
    if call.dtype not in DTYPES:
        return False, f"it has no {call.dtype}"
    if call.per_chunk_heads:
        return False, "its kernels share one head between the chunks"
    return True, "fused Triton kernels, not yet measured on a device, so only when asked for"


def _chip(device: str) -> Chip:
    return _device_chip(torch.cuda.current_device()) if device == "cuda" else chip_of(ASSUMED)


@cache
def _device_chip(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    return chip_of((found.major, found.minor))._replace(
        multiprocessors=found.multi_processor_count, shared_bytes=found.shared_memory_per_block_optin
    )


def contract(call: Call, plan: Plan, factors: dict[str, Tensor], context_ids: Tensor | None) -> list[Tensor]:
    """The partials of phi by `plan.wanted`, in that order; with an activation the hidden one is (dcontext, dchunks)."""
    names = result_names(plan.wanted, call.activation)
    launch: Any = import_module("hyperkernels.kernels.launch")
    mapped = None if context_ids is None else Mapped.of(context_ids, call.contexts)
    found: dict[str, Tensor] = {}
    read: dict[bool, dict[str, Any]] = {}  # what the kernels read for the partial by x, and for the others
    with torch.cuda.device_of(next(iter(factors.values()))):  # where triton launches
        for step in plan.steps:
            if step.cost.by == TWO_PRODUCTS:
                alone = Plan(call, step.outputs, (step,), {})
                found |= zip(step.outputs, torch_matmul.contract(call, alone, factors, context_ids))
            else:
                for slot in step.outputs:
                    own, by_x = linear_call(call, slot), slot == "x"
                    given = read[by_x] = read.get(by_x) or linear_factors(call, slot, factors)
                    results = launch.prepare(own, step.order, slot, given, mapped, _chip(call.device)).run()
                    found |= {name: from_rows(call, name, result) for name, result in results.items()}
    return [found[name] for name in names]


def again(call: Call, plan: Plan, head_bias: bool) -> Callable[..., Tensor | None] | None:
    """y by one kernel, of one context or one per entry."""
    (step,) = plan.steps
    if head_bias or step.cost.by == TWO_PRODUCTS:
        return None
    prepare: Any = import_module("hyperkernels.kernels.launch").prepare
    rows = call.entries, call.tokens, call.grid.in_features

    def run(factors: dict[str, Tensor], bias: Tensor | None, _head_bias: None) -> Tensor | None:
        x = factors["x"]
        if x.is_cuda and x.get_device() != torch.cuda.current_device():  # where triton launches
            return None
        as_rows = x.shape == rows
        if not as_rows:
            factors["x"] = x.reshape(rows)
        y = prepare(call, step.order, "y", factors, None, _chip(call.device)).run()["y"]
        if bias is not None:
            y += bias if bias.dim() == 1 else bias[:, None]
        return y if as_rows else y.view(*x.shape[:-1], call.grid.out_features)

    return run


def estimate(call: Call, step: Step) -> Cost:
    ways = [fused(call, step)]
    if not (call.activation or call.mapped):  # products need hidden formed, and rows gathered
        ways.append(products(call, step))
    return min(ways, key=lambda way: way.time_us)


def fused(call: Call, step: Step) -> Cost:
    """The workspace is the planes that programs sum apart, and what a convolution's x and y are copied to."""
    chip = _chip(call.device)
    total_us, workspace = 0.0, 0
    for slot in step.outputs:
        own, copies = linear_call(call, slot), copied(call, slot) * call.dtype.itemsize
        sizes = sizes_of(own, step.order, slot, call.window is not None)
        try:
            tile, time_us = tile_for(sizes, chip)
        except NoTile:
            return Cost(inf, 0, FUSED)
        total_us += time_us
        if copies:
            total_us += 2e6 * copies / chip.cache_bytes_per_s + COPYING * LAUNCH_US
        result = prod(own.shape("chunks" if sizes.additive else slot))
        sums = tile.splits * result if tile.splits > 1 else 0
        if sizes.additive:
            sums += context_planes(sizes, tile, tile.splits) * call.contexts * call.width
        workspace = max(workspace, 4 * sums + copies)
    return Cost(total_us, workspace, FUSED)


def products(call: Call, step: Step) -> Cost:
    """The intermediate is written, turned for the second product, and read: four passes over it. A block launches two
    products, the turning and the storing."""
    chip = _chip(call.device)
    rate = chip.fp32_flops_per_s if call.dtype == torch.float32 else chip.flops_per_s
    formed = call.numbers(call.intermediate(step.order)) * call.dtype.itemsize
    seconds = step.flops / rate + (step.bytes_moved + 4 * formed) / chip.cache_bytes_per_s
    launches = 4 * torch_blocks.block_count(call, step.order)
    return Cost(1e6 * seconds + LAUNCH_US * launches, torch_blocks.workspace(call, step.order), TWO_PRODUCTS)
