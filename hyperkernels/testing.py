"""How a result is judged: error against the fp64 reference, held to eager's own error, and peak memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# What a result may be off by beside twice eager's error: where eager happens to be exact (one product, a chunk of
# one), another order of summation still rounds. A few units of the last place.
FLOOR = {
    torch.float64: 1e-14,  # the reference's own rounding
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


class Error(NamedTuple):
    """The largest deviation relative to the largest exact value, and the RMS deviation relative to the exact RMS."""

    max: float
    rms: float


def error(value: Tensor, exact: Tensor) -> Error:
    """The error of `value` against `exact` (fp64). NaN counts as infinite."""
    assert value.shape == exact.shape, f"got shape {list(value.shape)}, wanted {list(exact.shape)}"
    if exact.numel() == 0:
        return Error(0.0, 0.0)
    value, exact = value.detach(), exact.detach()
    off = torch.nan_to_num((value.double() - exact).abs(), nan=float("inf"))
    tiny = 1e-30
    return Error(
        float(off.max() / exact.abs().max().clamp_min(tiny)),
        float(off.square().mean().sqrt() / exact.square().mean().sqrt().clamp_min(tiny)),
    )


def assert_no_worse_than_eager(name: str, value: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Max and RMS error of `value` are at most twice those of `eager`, which has the same dtype, plus the floor."""
    assert value.dtype == eager.dtype, f"{name}: got {value.dtype}, wanted {eager.dtype}"
    floor = FLOOR[value.dtype]
    got, allowed = error(value, exact), error(eager, exact)
    for kind in ("max", "rms"):
        mine, eagers = getattr(got, kind), getattr(allowed, kind)
        assert mine <= 2 * eagers + floor, f"{name}: {kind} error {mine:.2e}, eager's {eagers:.2e}, floor {floor:.0e}"


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's C++ side writes notes to file descriptor 2, whatever Python does."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most that tensors held at once during `call`, beyond what was held before it.

    On the CPU by the allocator's own record of every allocation (a matrix library's private buffers are not in it);
    on a CUDA device by `torch.cuda.max_memory_allocated`.
    """
    if device == "cuda":
        call()  # a matrix library takes its own workspace at its first call, and keeps it
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    profiler: Any = record.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
