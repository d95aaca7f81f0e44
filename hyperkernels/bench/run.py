"""Runs cases: interleaved rounds, so that drift hits every contestant; errors against fp64 and rooflines beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from hyperkernels.bench.case import ENGINES, Case, judge
from hyperkernels.bench.measure import Quantiles, warm
from hyperkernels.testing import peak_bytes

LEAST_S = 1e-3  # of a measurement: shorter calls are repeated within it
CACHE_BYTES = 256 << 20  # written between calls on a CUDA device, more than its second-level cache


class Clock:
    """Seconds of one call, by torch's own timer; on a CUDA device by events, its second-level cache flushed."""

    def __init__(self, call: Callable[[], Any], device: str) -> None:
        self.call, self.device, self.number = call, device, 1
        warm(call, device)
        if device == "cpu":
            self.timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            once = self.timer.timeit(1).mean
            self.number = max(1, int(LEAST_S / max(once, 1e-9)))
        else:
            self.flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)

    def seconds(self) -> float:
        if self.device == "cpu":
            warm(self.call)
            return self.timer.timeit(self.number).mean
        self.call()
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class Compulsory(TorchDispatchMode):
    """Bytes that a call cannot but move: each tensor that was there before and is read, once."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, int] = {}
        self.made: set[int] = set()
        self.kept: list[Any] = []  # storages that would else be given to another tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.made:
                    bytes_read = min(value.numel() * value.itemsize, storage.nbytes())
                    self.read[storage._cdata] = max(self.read.get(storage._cdata, 0), bytes_read)
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.read:
                    self.made.add(storage._cdata)
                    self.kept.append(storage)
        return results


def roofline_s(call: Callable[[], Any], ceilings: dict[str, float]) -> tuple[int, int, float]:
    """FLOPs, compulsory bytes, and the least time that the ceilings allow them."""
    with FlopCounterMode(display=False) as counter, Compulsory() as bytes_:
        results = tree_leaves(call())
    flops = counter.get_total_flops()
    moved = sum(bytes_.read.values()) + sum(v.nbytes for v in results if isinstance(v, torch.Tensor))
    peak = ceilings.get("fma_gflop_per_s", ceilings["gflop_per_s"])
    return flops, moved, max(flops / peak, moved / ceilings["gb_per_s"]) / 1e9


def _empty(suite: str, name: str) -> dict[str, Any]:
    """A row of which nothing is measured yet."""
    parts: dict[str, Any] = {key: {} for key in ("values", "missing", "times", "errors", "peak_mib", "of_roofline")}
    return {"suite": suite, "case": name, **parts, "rounds": 0, "failed": None}


def _runnable(case: Case) -> Case:
    """The case without the baselines that raise, each of which is missing for what it said."""
    contestants, missing = {}, dict(case.missing)
    for name, call in case.contestants.items():
        try:
            call()
        except Exception as error:  # what is not ours may raise anything, a compiler's errors and a device's included
            if name in ENGINES or name == case.eager:
                raise
            missing[name] = _first_line(error) or type(error).__name__
        else:
            contestants[name] = call
    return replace(case, contestants=contestants, missing=missing)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def measure(
    case: Case, suite: str, rounds: int, ceilings: dict[str, float], device: str, tick: Callable[[], None]
) -> dict[str, Any]:
    """A row of the results. A case whose check fails is a row that failed, not one that was fast."""
    case = _runnable(case)
    row = _empty(suite, case.name) | {"values": case.values, "missing": case.missing}
    verdicts = judge(case)
    row["errors"] = {name: {**v.error._asdict(), "right": v.right} for name, v in verdicts.items()}
    wrong = [name for name in ENGINES if name in verdicts and not verdicts[name].right]
    if wrong:
        row["failed"] = f"{wrong[0]} is wrong: off by {row['errors'][wrong[0]]['max']:.1e} of the largest value"
    if case.check is not None and not wrong:
        try:
            case.check()
        except AssertionError as error:
            row["failed"] = _first_line(error) or "the case's own check failed"
    clocks = {name: Clock(call, device) for name, call in case.contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            seconds[name].append(clock.seconds())
        tick()
    row["rounds"] = rounds
    row["times"] = {name: Quantiles.of(times)._asdict() for name, times in seconds.items()}
    for name, call in case.contestants.items():
        row["peak_mib"][name] = peak_bytes(call, device) / 2**20
        visible = (
            case.contestants["dense"] if name in ("dense-tuned", "dense-onednn") else call
        )  # the same work, which torch sees
        flops, moved, least = roofline_s(visible, ceilings)
        if flops:
            row["of_roofline"][name] = 1e3 * least / row["times"][name]["p50_ms"]
            row.setdefault("flops", {})[name], row.setdefault("bytes", {})[name] = flops, moved
    return row


def run(
    cases: list[tuple[str, Callable[[], Case]]],
    rounds: int,
    ceilings: dict[str, float],
    device: str = "cpu",
    tick: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """A row for each case, as it comes; a case that cannot run is a row that failed. `tick` hears of each round."""
    for suite, make in cases:
        torch.manual_seed(0)
        done = 0

        def told(name: str) -> None:
            nonlocal done
            done += 1
            tick(name)

        name = suite
        try:
            case = make()
            name = case.name
            yield measure(case, suite, rounds, ceilings, device, lambda name=name: told(name))
        except ModuleNotFoundError as error:  # nothing is wrong, but it cannot be measured here
            yield _empty(suite, name) | {"missing": {"the case": f"{error.name} is not installed"}}
        except Exception as error:  # whatever a compiler, a device or a baseline raises: the other cases go on
            yield _empty(suite, name) | {"failed": _first_line(error) or type(error).__name__}
        while done < rounds:
            told(name)
