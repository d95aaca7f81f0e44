"""The backends, and the one table of who can do what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hyperkernels.backends import native_cpu, reference, torch_blocks, torch_matmul, triton_fused
from hyperkernels.call import Call, check_order
from hyperkernels.planner import Estimate, Plan, plan_contraction, workspace_bytes

Contract = Callable[[Call, Plan, dict[str, Tensor], Tensor | None], Sequence[Tensor]]
Straight = Callable[[dict[str, Tensor], Tensor | None, Tensor | None], Tensor | None]


class Backend(NamedTuple):
    """`supports(call, order)` answers `(ok, reason)`; `contract` runs a plan on canonical factors, and is None for
    the reference, which is written in differentiable torch and needs no engine; `estimate` tells the planner what a
    step takes; with `shares` the outputs of a step consume one intermediate, else each forms its own.

    `again(call, plan, whether the head has a bias)` answers what gives y of `(factors, bias, head_bias)`, tensors as
    the user gave them, or None where they lie as it does not take them; or None, where there is no shorter way.
    """

    supports: Callable[[Call, str | None], tuple[bool, str]]
    contract: Contract | None
    estimate: Estimate
    shares: bool = True
    again: Callable[[Call, Plan, bool], Straight | None] = lambda _call, _plan, _head_bias: None


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(native_cpu.supports, native_cpu.contract, native_cpu.estimate, again=native_cpu.Again.of),
    "triton": Backend(
        triton_fused.supports, triton_fused.contract, triton_fused.estimate, shares=False, again=triton_fused.again
    ),
    "torch": Backend(torch_matmul.supports, torch_matmul.contract, torch_blocks.estimate),
    "reference": Backend(reference.supports, None, torch_blocks.estimate),
}
PREFERENCE = ("cpu", "torch")


def check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted None or one of {', '.join(BACKENDS)}")


def plan_call(call: Call, wanted: tuple[str, ...], order: str | None, backend: str | None) -> tuple[str, Plan]:
    """The backend that will run the call, and its plan. Raises what `choose_backend` does."""
    return _plan(call, wanted, order, backend, (workspace_bytes(), torch.get_num_threads(), native_cpu.INSTRUCTIONS))


@lru_cache(maxsize=4096)
def _plan(
    call: Call, wanted: tuple[str, ...], order: str | None, backend: str | None, _setting: tuple
) -> tuple[str, Plan]:
    name = choose_backend(call, order, backend)[0]
    return name, plan_contraction(call, wanted, order, BACKENDS[name].estimate, BACKENDS[name].shares)


def choose_backend(call: Call, order: str | None = None, backend: str | None = None) -> tuple[str, dict[str, str]]:
    """`(name, {backend ruled out: why})`: the forced backend if it can do the call, else the first of `PREFERENCE`
    that can.

    Raises:
        ValueError: the forced order or backend is unknown, or the backend cannot do the call.
    """
    check_order(order)
    check_backend(backend)
    names = PREFERENCE if backend is None else (backend,)
    ruled_out: dict[str, str] = {}
    for name in names:
        ok, reason = BACKENDS[name].supports(call, order)
        if ok:
            for other in BACKENDS:
                if other not in ruled_out and other != name:
                    able, why = BACKENDS[other].supports(call, order)
                    if backend is not None:
                        why = f"backend={backend!r} was asked for"
                    elif able and other in PREFERENCE:
                        why = f"{name} is preferred"
                    ruled_out[other] = why
            return name, ruled_out
        ruled_out[name] = reason
    raise ValueError(f"backend: {'; '.join(f'{name!r} cannot do this call: {why}' for name, why in ruled_out.items())}")
