"""Time and memory of a layer against how many weights it has: 1e5 to 1e10, generated and never formed, or formed.

Each point is a process of its own, forward and backward on a batch of 4, in chunks that the planner picks for m = 16;
it may take as much memory as the machine has free, and fails where that does not do. Saves every point as it comes,
and draws them all.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import hyperkernels as hk
from hyperkernels.bench.files import save
from hyperkernels.bench.growth import free_bytes
from hyperkernels.bench.measure import machine
from hyperkernels.testing import peak_bytes

RESULTS = Path(__file__).with_name("results") / "scaling.json"
HOW = {"hyperkernels": None, "weights formed": "reference"}
STYLES = {"hyperkernels": ("#0072b2", "-", "o"), "weights formed": ("#d55e00", "--", "s")}
B, WIDTH, ROUNDS = 4, 16, 5


def measure(weights: float, how: str) -> dict[str, Any]:
    """Median seconds of a step, and its peak in MiB beyond inputs, parameters and gradients."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    size = round(math.sqrt(weights))
    layer = hk.HyperLinear(size, size, width=WIDTH, bias=False)
    layer.backend = HOW[how]
    x = torch.randn(B, size, requires_grad=True)

    def step() -> None:
        layer.zero_grad()
        layer(x).square().mean().backward()

    step()
    seconds = []
    for _ in range(ROUNDS if weights < 1e9 else 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    held = sum(p.numel() for p in layer.parameters())
    return {
        "weights": size * size,
        "how": how,
        "parameters": held,
        "seconds": sorted(seconds)[len(seconds) // 2],
        "peak_mib": peak_bytes(step) / 2**20,
    }


def in_its_own_process(weights: float, how: str) -> dict[str, Any]:
    """What `measure` finds, or why it failed."""
    command = [sys.executable, __file__, "--point", str(weights), how, str(free_bytes("cpu"))]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode == 0:
        return json.loads(outcome.stdout)
    last = (outcome.stderr.strip().splitlines() or [f"exit code {outcome.returncode}"])[-1]
    return {"weights": round(math.sqrt(weights)) ** 2, "how": how, "failed": last[:200]}


def draw(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib  # only to draw

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(axes, ("seconds", "peak_mib"), ("forward and backward, s", "peak memory, MiB")):
        for how, (color, line, marker) in STYLES.items():
            own = [point for point in points if point["how"] == how and key in point]
            if own:
                values = ([point["weights"] for point in own], [point[key] for point in own])
                axis.plot(*values, color=color, linestyle=line, marker=marker, label=how)
        for point in points:
            if "failed" in point:
                axis.axvline(point["weights"], color="0.6", linestyle=":")
                axis.annotate(
                    f"{point['how']}: out of memory",
                    (point["weights"], 0.5),
                    rotation=90,
                    fontsize=7,
                    xycoords=("data", "axes fraction"),
                    ha="right",
                    va="center",
                    color="0.4",
                )
        axis.set(xscale="log", yscale="log", xlabel="generated weights", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python benchmarks/scaling.py\n"
        "  python benchmarks/scaling.py --most 1e7 --output out/scaling.json\n\n"
        "exit codes: 0, 1 if one of ours failed, 2 for bad arguments",
    )
    parser.add_argument("--least", type=float, default=1e5, help="weights of the smallest layer (default 1e5)")
    parser.add_argument("--most", type=float, default=1e10, help="weights of the largest layer (default 1e10)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results; the picture lies beside them")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        weights, how, limit = arguments.point
        resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
        print(json.dumps(measure(float(weights), how)))
        return 0
    if not 1 <= arguments.least <= arguments.most:
        parser.error(f"--least: got {arguments.least:g}, wanted 1 to --most {arguments.most:g}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    steps = round(2 * math.log10(arguments.most / arguments.least))
    results: dict[str, Any] = {"machine_info": machine(), "batch": B, "width": WIDTH, "points": []}
    for weights in (arguments.least * 10 ** (n / 2) for n in range(steps + 1)):
        for how in HOW:
            point = in_its_own_process(weights, how)
            results["points"].append(point)
            save(arguments.output, results)
            told = point.get("failed") or f"{point['seconds']:9.4f} s {point['peak_mib']:10.1f} MiB"
            print(f"{point['weights']:>15,} weights  {how:15} {told}", flush=True)
    picture = arguments.output.with_suffix(".png")
    draw(results["points"], picture)
    print(f"picture: {picture}")
    return int(any("failed" in point and point["how"] == "hyperkernels" for point in results["points"]))


if __name__ == "__main__":
    sys.exit(main())
