"""Timing in interleaved rounds, the machine's ceilings, and what machine it was."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import hyperkernels as hk
from hyperkernels.backends import native_cpu
from hyperkernels.machine import cpu_info

WARM_S = 0.01
LEAST_S = 1e-3  # of a measurement: shorter calls are repeated within it
LARGE_S = 0.01  # of a product that is large enough for a ceiling
SLOW_S = 0.1  # a call that takes this long is its own warm-up
UNSTEADY = 1.5  # times p20 is p80 where something else took part of the machine
CACHE_BYTES = 256 << 20  # written between calls on a CUDA device, more than its second-level cache


class Quantiles(NamedTuple):
    p20_ms: float
    p50_ms: float
    p80_ms: float

    @classmethod
    def of(cls, seconds: list[float]) -> Quantiles:
        shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        return cls(*(1e3 * torch.tensor(seconds, dtype=torch.float64).quantile(shares)).tolist())

    @property
    def steady(self) -> bool:
        return self.p80_ms <= UNSTEADY * self.p20_ms


def warm(call: Callable[[], Any], device: str = "cpu") -> None:
    """Calls for ten ms, once at least: what the contestant before left in the caches is gone, the threads are up."""
    end = time.perf_counter() + WARM_S
    while True:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if time.perf_counter() >= end:
            return


def timed(call: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call, warm."""
    warm(call, device)
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def graphed(calls: list[Callable[[], Any]]) -> Callable[[], float]:
    """Captures the calls, one after another, in one CUDA graph; what comes back replays it, and gives the seconds that
    one call took. Calls on inputs that together are larger than the second-level cache find it cold."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    return replay


class Clock:
    """Seconds of one call: by torch's own timer, of a slow one by a single call; on a CUDA device by events, its
    second-level cache flushed."""

    def __init__(self, call: Callable[[], Any], device: str = "cpu") -> None:
        self.call, self.device = call, device
        first = self._once()
        once = min(first, self._once()) if first >= SLOW_S else first  # the first may have compiled something
        self.slow = once >= SLOW_S
        if not self.slow:
            warm(call, device)
            self.timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            self.number = 1 if device == "cuda" else max(1, int(LEAST_S / self.timer.timeit(1).mean))

    def _once(self) -> float:
        start = time.perf_counter()
        self.call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def seconds(self) -> float:
        if self.device == "cuda":
            return self._by_events()
        if self.slow:
            return self._once()
        warm(self.call)
        return self.timer.timeit(self.number).mean

    def _by_events(self) -> float:
        if not self.slow:
            self.call()
        _beyond_the_cache().zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@cache
def _beyond_the_cache() -> Tensor:
    return torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")


def ceilings(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The best of ten large matrix products in `dtype`, and of ten large copies; on a CPU also the multiplications and
    additions of all threads whose operands never leave their registers: in fp32, and for fp64 half as many. They are
    unsteady where the rounds of one lie far apart, or a product does more than its registers can."""
    size, largest = 256, 8192 if device == "cuda" else 2048
    while size < largest and _product_s(size, device, dtype) < LARGE_S:  # on a CPU fp16 takes a thousand times as long
        size *= 2
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.randn(64 << 20, device=device)
    target = torch.empty_like(source)
    clocks = Clock(lambda: a @ a, device), Clock(lambda: target.copy_(source), device)
    rounds = [[clock.seconds() for _ in range(10)] for clock in clocks]
    product, copy = map(min, rounds)
    found = {"gflop_per_s": 2 * size**3 / product / 1e9, "gb_per_s": 2 * source.nbytes / copy / 1e9}
    if device == "cpu" and not native_cpu.MISSING:
        spin, threads = import_module("hyperkernels._cpu").peak_flops_per_s, torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            together = [sum(pool.map(lambda _: spin(), range(threads)), 0.0) for _ in range(5)]
        rounds.append(together)
        found["fma_gflop_per_s"] = max(together) / 1e9 / (2 if dtype == torch.float64 else 1)
    above = dtype in (torch.float32, torch.float64) and found["gflop_per_s"] > found.get("fma_gflop_per_s", inf)
    return found | {"unsteady": above or not all(Quantiles.of(own).steady for own in rounds)}


def _product_s(size: int, device: str, dtype: torch.dtype) -> float:
    """The least of three: one that was disturbed would make a product too small for a ceiling."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    return min(timed(lambda: a @ a, device) for _ in range(3))


def peak_gflop_per_s(ceilings: dict[str, float]) -> float:
    """The higher of what a large product reaches and what registers do: bf16 has instructions of its own."""
    return max(value for name, value in ceilings.items() if name.endswith("gflop_per_s"))


def machine(device: str = "cpu") -> dict[str, Any]:
    """Device and versions, to stand beside every figure."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        model, features = cpu_info()
        name = f"{model}, {torch.get_num_threads()} threads" + ", AVX-512" * ("avx512f" in features)
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hyperkernels": hk.__version__,
    }
