"""Timing in interleaved rounds, the machine's ceilings, and what machine it was."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, NamedTuple

import torch

import hyperkernels as hk
from hyperkernels.backends import native_cpu
from hyperkernels.environment import cpu_info

WARM_S = 0.01


class Quantiles(NamedTuple):
    p20_ms: float
    p50_ms: float
    p80_ms: float

    @classmethod
    def of(cls, seconds: list[float]) -> Quantiles:
        ordered = sorted(seconds)
        return cls(*(1e3 * ordered[int(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8)))


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


def ceilings(device: str = "cpu") -> dict[str, float]:
    """The best of ten large matrix products and of ten large copies, fp32 on a CPU and bf16 on a CUDA device; on a CPU
    also the fp32 multiplications and additions of all threads whose operands never leave their registers."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.randn(64 << 20, device=device)
    target = torch.empty_like(source)
    product = min(timed(lambda: a @ a, device) for _ in range(10))
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(10))
    found = {"gflop_per_s": 2 * size**3 / product / 1e9, "gb_per_s": 2 * source.nbytes / copy / 1e9}
    if device == "cpu" and not native_cpu.MISSING:
        spin, threads = import_module("hyperkernels._cpu").peak_flops_per_s, torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            together = [sum(pool.map(lambda _: spin(), range(threads))) for _ in range(5)]
        found["fma_gflop_per_s"] = max(together) / 1e9
    return found


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
