"""The Triton engine: every contraction, in every order, by one kernel whose intermediate never leaves the chip.

The kernels are in `hyperkernels/kernels`; this room says what they can do, and how long and in what memory.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor

from hyperkernels.backends.mapped import Mapped
from hyperkernels.call import Call, result_names
from hyperkernels.kernels.roles import sizes_of
from hyperkernels.kernels.tiles import Chip, chip_of, context_planes, tile_for
from hyperkernels.planner import Plan, Step

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (8, 0)
ASSUMED = (9, 0)  # where there is no device to ask


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
    with torch.cuda.device_of(next(iter(factors.values()))):  # where triton launches
        for step in plan.steps:
            for slot in step.outputs:
                found |= launch.prepare(call, step.order, slot, factors, mapped, _chip(call.device)).run()
    return [found[name] for name in names]


def estimate(call: Call, step: Step) -> tuple[float, int]:
    """Time in us, and workspace in bytes: the planes that programs sum apart."""
    total_us, workspace = 0.0, 0
    for slot in step.outputs:
        sizes = sizes_of(call, step.order, slot)
        tile, time_us = tile_for(sizes, _chip(call.device))
        total_us += time_us
        result = prod(call.shape("chunks" if sizes.additive else slot))
        sums = (tile.splits + 1) * result if tile.splits > 1 else 0  # and the sum of the planes
        if sizes.additive:
            sums += (context_planes(sizes, tile, tile.splits) + 1) * call.contexts * call.width
        workspace = max(workspace, 4 * sums)
    return total_us, workspace
