"""Everything that needs a GPU, from the source tree: tests on the device, compute-sanitizer over a few of them, its
ceilings, what an eager call costs its CPU, then the speed cases and their plot.

Prints as it goes and saves each result as it comes; a case that fails is reported and the rest go on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import report
import torch

import hyperkernels as hk
from hyperkernels.backends import plan_call, triton_fused
from hyperkernels.bench.case import Case, assert_right, claim
from hyperkernels.bench.contexts import many_contexts
from hyperkernels.bench.files import save
from hyperkernels.bench.linear import linear
from hyperkernels.bench.measure import Quantiles, ceilings, graphed, machine, timed
from hyperkernels.bench.roofline import roofline
from hyperkernels.call import SLOTS, Call
from hyperkernels.chunking import Grid
from hyperkernels.planner import Plan
from hyperkernels.testing import peak_bytes

ROOT = Path(__file__).parents[1]
TESTS_S, SANITIZER_S = 220, 60  # of the nine minutes that everything may take
ON_DEVICE = "cuda and not (float64 or one_ or cropped_cols) and (bfloat16 or not float16)"  # what that is enough for
SANITIZED = "triton_on_cuda and bfloat16 and primes and additive_ids"
OF_ROOFLINE = 0.7  # that each case should reach of its plan's roofline
CACHE_BYTES = 50 << 20  # the second level of an H200


def cases(device: str, quick: bool) -> dict[str, tuple[Callable[[], Case], int]]:
    """Each case, and of how many copies: on a CUDA device our inputs of all copies together are three times its cache,
    and the others' with them."""
    large, wide = ((4096, 4096), (16, 256), 32), ((8192, 28672), (16, 1024), 32)
    tokens, decode, contexts = (8192,), (1, 4, 16), ((256, 1), (64, 128))
    if quick:
        large = wide = ((64, 64), (4, 32), 8)
        tokens, decode, contexts = (16,), (1,), ((5, 1),)
    common: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}

    def copies(layer: tuple[tuple[int, int], tuple[int, int], int], rows: int) -> int:
        (N, K), (r, q), m = layer
        ours = 2 * (rows * K + N * K // (r * q) * m + m * r * q)
        return -(-3 * CACHE_BYTES // ours) if device == "cuda" else 1

    found: dict[str, tuple[Callable[[], Case], int]] = {}
    for B in tokens:
        for train, factor in ((False, 2.0), (True, 1.8)):
            make = claim(linear, *large, B, train=train, faster={"dense": factor}, **common)
            found[f"B={B}, train={train}"] = make, copies(large, B)
    for B in decode:
        for name, shape, factor in (("", large, 2.0), (", wide", wide, 8.0)):
            make = claim(linear, *shape, B, faster={"dense": factor}, **common)
            found[f"decode B={B}{name}"] = make, copies(shape, B)
    for G, T in contexts:
        factors = ({"materialise": 100.0}, {"materialise": 100.0}) if T == 1 else ({"materialise": 5.0}, {})
        make = claim(many_contexts, *large, G, T, faster=factors[0], smaller=factors[1], **common)
        found[f"{G} contexts of {T}"] = make, copies(large, G * T)
    return found


def planned(case: Case) -> Plan:
    assert case.call is not None
    return plan_call(case.call, case.outputs, None, "triton" if "triton" in case.contestants else None)[1]


def roof_us(case: Case, found: dict[str, float]) -> float:
    """What the ceilings allow the case's plan."""
    plan = planned(case)
    rates = found["gflop_per_s"] * 1e9, found["gb_per_s"] * 1e9
    return sum(roofline(plan.call, plan.order_of(slot), (slot,), *rates).time_us for slot in case.outputs)


def measure(make: Callable[[], Case], copies: int, device: str, rounds: int, found: dict[str, float]) -> dict[str, Any]:
    """Interleaved rounds; on a CUDA device of replayed graphs, each over all copies."""
    made = [make() for _ in range(copies)]
    case = made[0]
    assert_right(case)
    runs: dict[str, Callable[[], float]] = {}
    notes: dict[str, str] = {}
    for name, call in case.contestants.items():
        runs[name] = partial(timed, call, device)
        if device == "cuda":
            try:
                runs[name] = graphed([copy.contestants[name] for copy in made])
            except Exception as error:  # it is timed without a graph then
                notes[name] = f"no graph: {error}"
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    return {
        "case": case.name,
        "faster": case.faster if device == "cuda" else {},  # the interpreter's times aim at nothing
        "smaller": case.smaller if device == "cuda" else {},
        "of_peak": OF_ROOFLINE if device == "cuda" else None,
        "copies": copies,
        "notes": notes,
        "flops": planned(case).flops,
        "roofline_ms": roof_us(case, found) / 1e3,
        "times": {name: Quantiles.of(times)._asdict() for name, times in seconds.items()},
        "peak_mib": {name: peak_bytes(call, device) / 2**20 for name, call in case.contestants.items()},
    }


def launch_us(device: str, calls: int = 300) -> dict[str, float]:
    """What an eager call of a small layer costs the CPU that issues it: the median, with nothing waited for between."""
    x, hidden, head, weight = (
        torch.randn(size, device=device, dtype=torch.bfloat16) for size in ((4, 64), (8, 4, 8), (8, 8, 16), (64, 64))
    )
    found = {}
    engines: dict[str, Callable[[], Any]] = {
        "dense": lambda: torch.nn.functional.linear(x, weight),
        "hyperkernels": lambda: hk.hyper_linear(x, hidden, head),
        "triton": lambda: hk.hyper_linear(x, hidden, head, backend="triton"),
    }
    for name, call in engines.items():
        seconds = []
        for n in range(calls):
            if n % 50 == 0 and device == "cuda":
                torch.cuda.synchronize()  # a full queue would be waited for
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        found[name] = 1e6 * sorted(seconds)[calls // 2]
    return found


def ways_us(device: str, quick: bool, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Each partial for 8192 tokens by one kernel and by two products: what the model expects, and what it takes."""
    grid, width, tokens = (Grid(64, 64, 4, 32), 8, 16) if quick else (Grid(4096, 4096, 16, 256), 32, 8192)
    call = Call(grid, width, 1, 1, tokens, dtype=torch.bfloat16, device=device)
    factors = {slot: torch.randn(call.shape(slot), device=device, dtype=call.dtype) for slot in SLOTS}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for slot in SLOTS:
        plan = plan_call(call, (slot,), None, "triton")[1]
        (step,) = plan.steps
        given = {name: factor for name, factor in factors.items() if name != slot}
        runs: dict[str, Callable[[], float]] = {}
        for way in (triton_fused.fused(call, step), triton_fused.products(call, step)):
            alone = replace(plan, steps=(step._replace(cost=way),))
            run = partial(triton_fused.contract, call, alone, given, None)
            runs[way.by] = graphed([run]) if device == "cuda" else partial(timed, run, device)
            found.setdefault(slot, {})[way.by] = {"expected": way.time_us}
        seconds = [{by: run() for by, run in runs.items()} for _ in range(rounds)]
        for by, times in found[slot].items():
            times["p50"] = 1e6 * sorted(times[by] for times in seconds)[rounds // 2]
    return found


def sanitized() -> dict[str, Any]:
    """A few small tests under each tool of compute-sanitizer, where it is installed."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        print("compute-sanitizer is not installed", flush=True)
        return {}
    apart = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else it takes torch's pool for one allocation
    found: dict[str, Any] = {}
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_hyper_linear.py", "-k", SANITIZED]
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *tests]
        try:
            found[check] = subprocess.run(command, cwd=ROOT, timeout=SANITIZER_S, env=apart, check=False).returncode
        except subprocess.TimeoutExpired:
            found[check] = 124
        said = f"not finished in {SANITIZER_S} s" if found[check] == 124 else f"exit code {found[check]}"
        print(f"compute-sanitizer {check}: {said}", flush=True)
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    print(report.details(results), flush=True)
    try:
        report.draw(results, path.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot here ({error}); `python benchmarks/report.py {path}` draws it", flush=True)


def source() -> dict[str, str]:
    """What was measured, beside the machine."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not under version control"
    triton = import_module("triton").__version__ if find_spec("triton") else "not installed"
    return {"commit": commit, "triton": triton}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python benchmarks/gpu.py --output benchmarks/results\n"
        "  python benchmarks/gpu.py --device cpu --quick --output out    # without a GPU; Triton's interpreter\n\n"
        "exit codes: 0, 1 if a test, a case or compute-sanitizer failed, 2 for bad arguments or no device",
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few tests")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device here; try --device cpu --quick")
    if device == "cpu":  # read when the kernels are first needed
        os.environ["TRITON_INTERPRET"] = "1"
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / ("gpu.json" if device == "cuda" else "interpreted.json")
    results: dict[str, Any] = {"machine_info": machine(device) | source(), "cases": [], "failed": []}
    print(json.dumps(results["machine_info"]), flush=True)

    chosen = ["tests/test_hyper_linear.py", "-k", "hand_computed"] if arguments.quick else ["tests", "-k", ON_DEVICE]
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", *chosen]
    if find_spec("xdist"):  # most of the time is the compiler's
        command += ["-n", "auto"]
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        run = subprocess.run(command, cwd=ROOT, timeout=TESTS_S, env=plain, check=False)
        results["tests_exit_code"] = run.returncode
    except subprocess.TimeoutExpired:
        results["tests_exit_code"] = 124
        print(f"tests: stopped after {TESTS_S} s", flush=True)
    save(path, results)

    if device == "cuda":
        results["compute_sanitizer"] = sanitized()
    results["machine_info"]["ceilings"] = ceiling = ceilings(device, torch.bfloat16)
    print(json.dumps(ceiling), flush=True)
    quick = arguments.quick
    tables: dict[str, Callable[[], dict[str, Any]]] = {
        "launch_us": partial(launch_us, device, 20 if quick else 300),
        "ways_us": partial(ways_us, device, quick, 2 if quick else 20),
    }
    for name, table in tables.items():
        try:
            results[name] = table()
        except Exception as error:  # the rest is still worth measuring
            traceback.print_exc()
            results["failed"].append({"case": name, "error": str(error)})
        else:
            print(f"{name}: {json.dumps(results[name])}", flush=True)
        save(path, results)
    for name, (make, copies) in cases(device, quick).items():
        try:
            found = measure(make, copies, device, 2 if quick else 20, ceiling)
        except Exception as error:  # the rest is still worth measuring
            traceback.print_exc()
            results["failed"].append({"case": name, "error": str(error)})
        else:
            results["cases"].append(found)
            p50 = {name: times["p50_ms"] for name, times in found["times"].items()}
            times = f"{found['case']}: " + ", ".join(f"{name} {t:.4f} ms" for name, t in p50.items())
            print(f"{times}, roofline {found['roofline_ms']:.4f} ms", flush=True)
        save(path, results)
    if results["cases"]:
        draw(results, path)
    wrong = [code for code in results.get("compute_sanitizer", {}).values() if code not in (0, 124)]
    return 1 if results["failed"] or results["tests_exit_code"] or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
