"""The Triton engine: every contraction, in every order, one launch each, its intermediate formed and consumed on chip.

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

from hyperkernels.call import Call, result_names
from hyperkernels.kernels.roles import sizes_of
from hyperkernels.kernels.tiles import Chip, chip_of, tile_for
from hyperkernels.planner import Plan, Step

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ASSUMED = (9, 0)  # where there is no device to ask


def interpreted() -> bool:
    """Whether triton runs its kernels on the CPU, one operation at a time: to test them."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def supports(call: Call, order: str | None) -> tuple[bool, str]:
    if find_spec("triton") is None:
        return False, "triton is not installed"
    if call.device != "cuda" and not (call.device == "cpu" and interpreted()):
        return False, f"it runs on CUDA devices, and the tensors are on {call.device}"
    if call.dtype not in DTYPES:
        return False, f"it has no {call.dtype}"
    if call.per_chunk_heads:
        return False, "its kernels share one head between the chunks"
    return True, "fused Triton kernels, not yet measured on a device, so only when asked for"


@cache
def _chip(device: str) -> Chip:
    return chip_of(torch.cuda.get_device_capability() if device == "cuda" else ASSUMED)


def contract(call: Call, plan: Plan, factors: dict[str, Tensor], context_ids: Tensor | None) -> list[Tensor]:
    """The partials of phi by `plan.wanted`, in that order; with an activation the hidden one is (dcontext, dchunks)."""
    names = result_names(plan.wanted, call.activation)
    if not (call.width and call.contexts and call.entries and call.tokens):  # nothing to sum
        like = next(iter(factors.values()))
        return [like.new_zeros(call.shape(name)) for name in names]
    launch: Any = import_module("hyperkernels.kernels.launch")
    mapped = None if context_ids is None else launch.Contexts.of(call, context_ids)
    found: dict[str, Tensor] = {}
    for step in plan.steps:
        for slot in step.outputs:
            found |= launch.prepare(call, step.order, slot, factors, mapped, _chip(call.device)).run()
    return [found[name] for name in names]


def estimate(call: Call, step: Step) -> tuple[float, int]:
    """Time in us, and workspace in bytes: the planes that programs sum apart."""
    total_us, workspace = 0.0, 0
    for slot in step.outputs:
        tile, time_us = tile_for(sizes_of(call, step.order, slot), _chip(call.device))
        total_us += time_us
        numbers = sum(prod(call.shape(name)) for name in result_names((slot,), call.activation))
        workspace = max(workspace, 4 * tile.splits * numbers if tile.splits > 1 else 0)
    return total_us, workspace
