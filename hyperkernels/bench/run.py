"""Runs cases: interleaved rounds, so that drift hits every contestant; errors against fp64 and rooflines beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hyperkernels.bench.case import ENGINES, Case, NotHere, first_line, judge
from hyperkernels.bench.measure import Clock, Quantiles, peak_gflop_per_s
from hyperkernels.bench.results import Deviation, Row, Times, Values
from hyperkernels.testing import peak_bytes


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
    return flops, moved, max(flops / peak_gflop_per_s(ceilings), moved / ceilings["gb_per_s"]) / 1e9


def _empty(suite: str, name: str) -> Row:
    """A row of which nothing is measured yet."""
    blank = ("values", "missing", "times", "errors", "peak_mib", "of_roofline", "flops", "bytes")
    empty: Any = {"suite": suite, "case": name, "parts": [], "rounds": 0, "failed": None, **{key: {} for key in blank}}
    return empty


def measure(
    case: Case, row: Row, rounds: int, ceilings: dict[str, float], device: str, tick: Callable[[], None]
) -> None:
    """Fills the row. A case that is wrong, or whose check fails, is a row that failed, not one that was fast. A
    baseline that raises is missing from there on; where ours does, what was measured before is in the row."""
    row["case"], row["values"], row["parts"] = case.name, Values(**case.values), list(case.parts)
    verdicts, raised = judge(case)
    row["missing"] = {**case.missing, **raised}
    row["errors"] = {name: Deviation(**v.error._asdict(), right=v.right) for name, v in verdicts.items()}
    wrong = [name for name in ENGINES if name in verdicts and not verdicts[name].right]
    if wrong:
        row["failed"] = f"{wrong[0]} is wrong: off by {row['errors'][wrong[0]]['max']:.1e} of the largest value"
    if case.check is not None and not wrong:
        try:
            case.check()
        except AssertionError as error:
            row["failed"] = first_line(error) if str(error) else "the case's own check failed"
    there = {name: call for name, call in case.contestants.items() if name not in raised}

    def each(do: Callable[[str, Callable[[], Any]], None]) -> None:
        for name, call in list(there.items()):
            try:
                do(name, call)
            except Exception as error:
                if name in ENGINES:
                    raise
                row["missing"][name] = first_line(error)
                del there[name]

    clocks: dict[str, Clock] = {}
    seconds: dict[str, list[float]] = {name: [] for name in there}
    each(lambda name, call: clocks.update({name: Clock(call, device)}))
    for _ in range(rounds):
        each(lambda name, _call: seconds[name].append(clocks[name].seconds()))
        tick()
    row["rounds"] = rounds
    row["times"] = {name: Times(**Quantiles.of(seconds[name])._asdict()) for name in there}

    def memory_and_roof(name: str, call: Callable[[], Any]) -> None:
        row["peak_mib"][name] = peak_bytes(call, device) / 2**20
        flops, moved, least = roofline_s(case.counted.get(name, call), ceilings)
        if flops:
            row["of_roofline"][name] = 1e3 * least / row["times"][name]["p50_ms"]
            row["flops"][name], row["bytes"][name] = flops, moved

    each(memory_and_roof)


def run(
    cases: list[tuple[str, Callable[[], Case]]],
    rounds: int,
    ceilings: dict[str, float],
    device: str = "cpu",
    tick: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """A row for each case, as it comes; a case that cannot run is a row that failed. `tick` hears of each round."""
    for suite, make in cases:
        torch.manual_seed(0)
        done = 0

        def told(name: str) -> None:
            nonlocal done
            done += 1
            tick(name)

        row = _empty(suite, suite)
        try:
            case = _made(make, row)
            if case is not None:
                measure(case, row, rounds, ceilings, device, lambda row=row: told(row["case"]))
        except Exception as error:  # whatever a compiler, a device or a baseline raises: the other cases go on
            row["failed"] = first_line(error)
        case = None
        if device == "cuda":
            torch.cuda.empty_cache()
        yield row
        while done < rounds:
            told(row["case"])


def _made(make: Callable[[], Case], row: Row) -> Case | None:
    """The case; or in the row why it cannot be measured here, though nothing is wrong."""
    try:
        return make()
    except NotHere as why:
        row["case"], row["missing"] = why.name, {"the case": str(why)}
    except ModuleNotFoundError as error:
        row["missing"] = {"the case": f"{error.name} is not installed"}
    return None
