"""What a launch of a Triton kernel costs the CPU, on a machine without a GPU: kernels are compiled, and a driver that
does nothing stands where the device's is. An eager call is `hyper_linear` from its first line to its last.

Also shows that a kept launch hands over what Triton's own does, for tensors that lie in memory in several ways.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from compiled import SHAPES, TARGETS, Elsewhere, driver
from torch import Tensor

import hyperkernels as hk
from hyperkernels.backends import triton_fused
from hyperkernels.backends.mapped import Mapped
from hyperkernels.call import Call
from hyperkernels.kernels.launch import Launch, prepare

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Idle(Elsewhere):
    """Loads a kernel by giving it a number, and remembers what was launched last."""

    last: tuple = ()
    kernels: tuple[bytes, ...] = ()

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": TARGETS["sm_90"].chip.shared_bytes}

    def load_binary(self, _name: str, kernel: bytes, _shared: int, _device: int) -> tuple[int, int, int, int, int]:
        if kernel not in self.kernels:
            self.kernels = (*self.kernels, kernel)
        return 1, self.kernels.index(kernel), 0, 0, 1024

    def launcher_cls(self, _source: Any, _metadata: Any) -> Callable[..., None]:
        def launched(*arguments: Any) -> None:
            self.last = arguments

        return launched


def median_us(call: Callable[[], Any], calls: int) -> float:
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e6 * sorted(seconds)[calls // 2]


def layouts(value: Tensor) -> dict[str, Tensor]:
    """The same shape, in other places."""
    off = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape)
    apart = torch.empty(*value.shape[:-1], 2 * value.shape[-1], dtype=value.dtype)[..., ::2]
    return {"contiguous": torch.empty_like(value), "off by one": off, "every other": apart}


def handed_over(idle: Idle) -> tuple[Any, ...]:
    """The grid, the stream, the kernel, and its arguments: of tensors, where they are."""
    x, y, z, stream, function, _, _, _, _, *arguments = idle.last
    leaves = [leaf for part in arguments for leaf in (part if isinstance(part, tuple) else (part,))]
    return x, y, z, stream, function, *(v.data_ptr() if isinstance(v, Tensor) else v for v in leaves)


def differs(idle: Idle, launch: Launch) -> bool:
    """Whether the second launch hands over anything else than Triton's own."""
    launch.kernel[launch.grid](*launch.arguments, **launch.keywords)
    wanted = handed_over(idle)
    for _ in range(2):
        idle.last = ()
        launch.launch()
    return handed_over(idle) != wanted


def arguments(call: Call, factors: dict[str, Tensor]) -> dict[str, Any]:
    """Of `hyper_linear`, for the factors of a call."""
    hidden: Any = factors["hidden"]
    if call.activation:
        hidden = hk.AdditiveHidden(hidden, factors["chunks"], call.activation)
    ids = torch.arange(call.entries) % call.contexts if call.mapped else None
    return {"x": factors["x"], "hidden": hidden, "head": factors["head"], "context_ids": ids}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python benchmarks/launching.py\n  python benchmarks/launching.py --calls 100\n\n"
        "exit codes: 0, 1 if a kept launch hands over anything else, 2 for bad arguments",
    )
    parser.add_argument("--calls", type=int, default=2000, help="how many are timed (%(default)s)")
    calls = parser.parse_args().calls
    if calls < 1:
        parser.error(f"--calls: got {calls}, wanted at least 1")
    torch.set_num_threads(1)  # tables that a device would make are made by torch here
    for setting in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):  # a device's memory comes from torch's cache, not its system
        ctypes.CDLL(None).mallopt(setting, 1 << 30)
    target = TARGETS["sm_90"]
    idle = Idle(target.gpu)
    driver.set_active(idle)  # type: ignore[arg-type]
    triton_fused.interpreted = lambda: True  # the engine then takes tensors of the CPU
    wrong = 0
    for name in ("decode 1, wide", "256 contexts", "64 mapped contexts", "odd"):
        call: Call = SHAPES[name].call(torch.bfloat16)
        factors = {
            slot: torch.empty(call.shape(slot), dtype=call.dtype)
            for slot in ("x", "y", "hidden", "head", *(["chunks"] if call.activation else []))
        }
        mapped = Mapped.of(torch.arange(call.entries) % call.contexts, call.contexts) if call.mapped else None
        for slot in ("x", "head"):
            for how, value in layouts(factors[slot]).items():
                for out in ("y", "hidden") if name == "odd" else ("y",):
                    for _ in range(2):  # the second puts its tensors where the first had its own
                        launch = prepare(call, "head_first", out, factors | {slot: value}, mapped, target.chip)
                        if differs(idle, launch):
                            print(f"{name}: a kept launch of {out} differs where {slot} is {how}")
                            wrong += 1
        prepared = partial(prepare, call, "head_first", "y", factors, mapped, target.chip)
        launch = prepared()
        launch.run()  # the sum of the splits too
        own = partial(launch.kernel[launch.grid], *launch.arguments, **launch.keywords)
        eager = partial(hk.hyper_linear, **arguments(call, factors), order="head_first", backend="triton")
        recorded = partial(eager, x=factors["x"].requires_grad_())
        timed = {
            "eager call": torch.no_grad()(eager),
            "recorded": recorded,
            "prepare": prepared,
            "kept launch": launch.launch,
            "Triton's own launch": own,
        }
        found = {what: round(median_us(run, calls), 1) for what, run in timed.items()}
        print(f"{name}: us of the CPU, without the driver's: {json.dumps(found)}")
    print(f"{len(idle.kernels)} kernels")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
