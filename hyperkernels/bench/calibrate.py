"""`hyperkernels bench --calibrate`: the cost model's few constants, fitted to this machine and kept for it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from hyperkernels import calibration
from hyperkernels.backends import BACKENDS, native_cpu
from hyperkernels.bench import files
from hyperkernels.bench.measure import UNSTEADY, Quantiles, timed
from hyperkernels.call import ORDERS, Call
from hyperkernels.chunking import Grid
from hyperkernels.planner import Step, plan_contraction

LAYERS = [(256, 256), (1024, 1024), (2304, 768), (1000, 784)]
CHUNKS = [(4, 64), (16, 64), (16, 16), (8, 256)]
ROWS = (1, 8, 64, 512)
SLOW_US = 50_000
ROUNDS = 5
BOUND = 10  # a constant is at most so many times what it was, and at least that part of it


class Point(NamedTuple):
    """A call in an order on a backend: what it took, and what the model's constants are multiplied with. It is steady
    where its rounds lie close together."""

    backend: str
    measured_us: float
    features: dict[str, float]
    steady: bool = True


class Run(NamedTuple):
    """A call in an order on a backend, to be timed."""

    backend: str
    run: Callable[[], Any]
    features: dict[str, float]


def calibrate() -> int:
    """Measure, fit, keep, and draw beside what is kept; exit code 0, or 1 where nothing is kept: the fit is no better
    than what the model had, most calls were disturbed, or somebody stopped it."""
    target = calibration.path()
    if target is None:
        raise ValueError("HYPERKERNELS_CALIBRATION is off, or there is no home folder: name a file in it")
    picture = target.with_suffix(".png")
    for path in (target, picture):
        files.check_writable(path)
    torch.manual_seed(0)
    try:
        found = measured()
    except KeyboardInterrupt:
        print("stopped: nothing is kept", file=sys.stderr)
        return 1
    points = [point for point in found if point.steady]
    print(f"{len(found) - len(points)} of {len(found)} calls are left out: p80 is over {UNSTEADY} times p20")
    if 2 * len(points) < len(found):
        print("nothing is kept: something else runs here; stop it, set OMP_WAIT_POLICY=passive, and calibrate again")
        return 1
    before = calibration.constants()
    after = fitted(points, before)
    off = [median(_off(p, values) for p in points) for values in (before, after)]
    print(f"{len(points)} calls; the model is off by {off[0]:.2f} times as it was, {off[1]:.2f} times fitted (median)")
    for name in calibration.CONSTANTS:
        times = max(after[name] / before[name], before[name] / after[name])
        bound = ": stopped at a bound of the fit" if times > 0.999 * BOUND else ""
        print(f"  {name:20} {before[name]:12.4g} -> {after[name]:12.4g}{bound}")
    better = off[1] <= off[0]
    if better:
        kept = {"format": calibration.FORMAT, "machine": calibration.machine_key(), "constants": after}
        files.write(target, (json.dumps(kept, indent=1) + "\n").encode())
        print(f"kept: {target}; delete it to go back")
    else:
        print("nothing is kept: the fit is no better")
    draw(points, {"as it was": before, "fitted": after}, picture)
    print(f"picture: {picture}")
    return 0 if better else 1


def measured() -> list[Point]:
    """In passes over all calls, so that what disturbs the machine for a while disturbs one round of each."""
    calls = [
        Call(Grid(N, K, rows, cols), 16, 1, 1, B)
        for N, K in LAYERS
        for rows, cols in CHUNKS
        for B in ROWS
        if rows <= N and cols <= K
    ]
    runs = [run for call in calls for run in _runs(call)]
    seconds: list[list[float]] = [[] for _ in runs]
    with torch.no_grad():
        for n in track(list(range(len(runs))) * ROUNDS, "measuring", console=Console(stderr=True)):
            seconds[n].append(timed(runs[n].run))
    return [
        Point(run.backend, 1e6 * min(rounds), run.features, Quantiles.of(rounds).steady)
        for run, rounds in zip(runs, seconds)
    ]


def _runs(call: Call) -> Iterator[Run]:
    """The call by each backend that can do it, in each order that is not slow."""
    factors = {name: torch.randn(call.shape(name)) for name in ("hidden", "head", "x")}
    for backend, features in (("cpu", _native_features), ("torch", _torch_features)):
        entry = BACKENDS[backend]
        if not entry.supports(call, None)[0]:
            continue
        assert entry.contract is not None
        for order in ORDERS:
            plan = plan_contraction(call, ("y",), order, entry.estimate, entry.shares)
            if plan.steps[0].time_us < SLOW_US:
                yield Run(backend, partial(entry.contract, call, plan, factors, None), features(call, plan.steps[0]))


def _native_features(call: Call, step: Step) -> dict[str, float]:
    """By constant, how much of its reciprocal or of itself a call takes, in us."""
    plain = step._replace(cost=step.cost._replace(time_us=0.0, workspace_bytes=0))
    runs = native_cpu.runs(call, step.outputs, (plain,), True, True, *native_cpu._settings())[1]
    rows = call.entries * call.tokens
    features: dict[str, float] = dict.fromkeys(calibration.NATIVE, 0.0)
    for run in runs:
        features["vectors_per_us"] += run.native.work(rows) / run.native.threads
        features["few_call_us" if isinstance(run.native, native_cpu.FewRows) else "call_us"] += 1
    return features


def _torch_features(call: Call, step: Step) -> dict[str, float]:
    formed = call.numbers(call.intermediate(step.order)) * call.dtype.itemsize
    cached = (1 + 3 * len(step.outputs)) * formed
    return {
        "flops_per_s": 1e6 * step.flops,
        "memory_bytes_per_s": 1e6 * step.bytes_moved,
        "cache_bytes_per_s": 1e6 * cached,
        "product_us": 1 + len(step.outputs),
    }


def _is_rate(name: str) -> bool:
    return name.endswith("_per_s") or name == "vectors_per_us"


def expected_us(point: Point, values: dict[str, float]) -> float:
    return sum(n / values[name] if _is_rate(name) else n * values[name] for name, n in point.features.items())


def _off(point: Point, values: dict[str, float]) -> float:
    ratio = expected_us(point, values) / point.measured_us
    return max(ratio, 1 / ratio)


def fitted(points: list[Point], before: dict[str, float]) -> dict[str, float]:
    """Least squares of the relative error, each constant within BOUND of what it was."""
    after = dict(before)
    for backend in {point.backend for point in points}:
        own = [point for point in points if point.backend == backend]
        names = list(own[0].features)
        # in units of what the constants were, so that all unknowns are near 1
        unit = [1 / before[name] if _is_rate(name) else before[name] for name in names]
        rows = [[p.features[n] * u / p.measured_us for n, u in zip(names, unit)] for p in own]
        scale = _bounded_least_squares(torch.tensor(rows, dtype=torch.float64))
        for name, factor in zip(names, scale.tolist()):
            after[name] = before[name] / factor if _is_rate(name) else before[name] * factor
    return after


def _bounded_least_squares(rows: torch.Tensor, steps: int = 2000) -> torch.Tensor:
    """The minimum of `||rows s - 1||` over 1 / BOUND <= s <= BOUND, one unknown at a time."""
    scale = torch.ones(rows.shape[1], dtype=torch.float64)
    squares = rows.square().sum(0).clamp_min(1e-300)
    for _ in range(steps):
        for n in range(len(scale)):
            rest = 1 - rows @ scale + rows[:, n] * scale[n]
            if rows[:, n].any():
                scale[n] = ((rows[:, n] @ rest) / squares[n]).clamp(1 / BOUND, BOUND)
    return scale


def draw(points: list[Point], models: dict[str, dict[str, float]], path: Path) -> None:
    from hyperkernels.bench.plots import canvas

    figure, axes = canvas(len(models))
    for axis, (title, values) in zip(axes, models.items()):
        for backend, color, marker in (("cpu", "#0072B2", "o"), ("torch", "#D55E00", "^")):
            own = [(p.measured_us, expected_us(p, values)) for p in points if p.backend == backend]
            if own:
                axis.plot(*zip(*own), color=color, marker=marker, linestyle="", label=backend, markersize=4, alpha=0.7)
        ends = [min(p.measured_us for p in points), max(p.measured_us for p in points)]
        axis.plot(ends, ends, color="black", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="measured, us", ylabel="expected, us", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    files.write(path, data.getvalue())
