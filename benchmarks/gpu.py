"""Everything that needs a GPU, from the source tree: the tests on the device, its ceilings, then the speed cases.

Prints as it goes and saves each result as it comes; a case that fails is reported and the rest go on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from cases import OURS, Case, linear
from measure import Quantiles, ceilings, machine, timed

from hyperkernels.testing import peak_bytes

ROOT = Path(__file__).parents[1]
TESTS_S = 300  # of the nine minutes that everything may take


def cases(device: str, quick: bool) -> list[dict[str, Any]]:
    shape, chunk, m = ((128, 128), (4, 32), 8) if quick else ((4096, 4096), (16, 256), 32)
    common = {"shape": shape, "chunk": chunk, "m": m, "device": device, "dtype": torch.bfloat16}
    tokens = (1, 16) if quick else (1, 16, 256, 8192)
    return [common | {"B": B, "train": train} for B in tokens for train in (False, True)]


def measure(case: Case, device: str, rounds: int) -> dict[str, Any]:
    case.check()
    seconds: dict[str, list[float]] = {name: [] for name in case.contestants}
    for _ in range(rounds):
        for name, call in case.contestants.items():
            seconds[name].append(timed(call, device))
    return {
        "case": case.name,
        "times": {name: Quantiles.of(times)._asdict() for name, times in seconds.items()},
        "peak_mib": {name: peak_bytes(call, device) / 2**20 for name, call in case.contestants.items()},
    }


def save(path: Path, results: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1))
    part.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python benchmarks/gpu.py --output benchmarks/results\n"
        "  python benchmarks/gpu.py --device cpu --quick --output out    # without a GPU; Triton's interpreter\n\n"
        "exit codes: 0, 1 if a test or a case failed, 2 for bad arguments or no device",
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
    path = arguments.output / f"{device}.json"
    results: dict[str, Any] = {"machine_info": machine(device), "cases": [], "failed": []}
    print(json.dumps(results["machine_info"]), flush=True)

    chosen = ["-k", "hand_computed or bit_equal"] if arguments.quick else []
    command = [sys.executable, "-m", "pytest", "-q", "tests", *chosen]
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        run = subprocess.run(command, cwd=ROOT, timeout=TESTS_S, env=plain, check=False)
        results["tests_exit_code"] = run.returncode
    except subprocess.TimeoutExpired:
        results["tests_exit_code"] = 124
        print(f"tests: stopped after {TESTS_S} s", flush=True)
    save(path, results)

    results["machine_info"]["ceilings"] = ceilings(device)
    print(json.dumps(results["machine_info"]["ceilings"]), flush=True)
    for keywords in cases(device, arguments.quick):
        try:
            found = measure(linear(**keywords), device, 3 if arguments.quick else 15)
        except Exception as error:  # the rest is still worth measuring
            traceback.print_exc()
            results["failed"].append({"case": str(keywords), "error": str(error)})
        else:
            results["cases"].append(found)
            p50 = {name: times["p50_ms"] for name, times in found["times"].items()}
            faster = ", ".join(f"{t / p50[OURS]:.2f} x {name}" for name, t in p50.items() if name != OURS)
            print(f"{found['case']}: {p50[OURS]:.3f} ms, {faster}", flush=True)
        save(path, results)
    return 1 if results["failed"] or results["tests_exit_code"] else 0


if __name__ == "__main__":
    sys.exit(main())
