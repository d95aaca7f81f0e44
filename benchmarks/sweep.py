"""Whether the planner picks well: every order measured over a sweep of shapes, beside the one that it picks.

Each shape's orders are timed in interleaved rounds in one process, and the best of each is kept. The table is saved as
it grows, so that an interrupted sweep keeps what it has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from report import CLOSE
from rich.progress import track

import hyperkernels as hk
from hyperkernels.backends import plan_call
from hyperkernels.bench.files import write
from hyperkernels.bench.measure import machine, timed
from hyperkernels.call import ORDERS
from hyperkernels.form import canonical_form

WANTED = 0.9  # in this share of the shapes
SLOW_US = 100_000  # an order that is estimated to take longer, and 5 times the best, is not run


def shapes(count: int) -> list[dict[str, Any]]:
    """A fixed draw from layers, chunks, widths, batches and context forms, small enough to run."""
    layers = [(256, 256), (768, 768), (1024, 1024), (2048, 512), (512, 2048), (1000, 784), (4096, 4096)]
    chunks = [(1, 0), (0, 1), (4, 64), (64, 4), (16, 16), (16, 64), (16, 256), (64, 64), (128, 128), (256, 16), (0, 0)]
    grid = itertools.product(layers, chunks, (4, 16, 32, 128), (1, 4, 16, 64, 256, 1024), ("one", "each", "additive"))
    found = []
    for (N, K), (rows, cols), m, B, contexts in grid:
        rows, cols = min(rows or N, N), min(cols or K, K)
        I, J = -(-N // rows), -(-K // cols)
        G = 1 if contexts == "one" else B
        numbers = m * rows * cols, (1 if contexts == "additive" else G) * I * J * m
        if max(numbers) <= 1 << 24 and (contexts == "one" or B > 1):
            found.append({"N": N, "K": K, "rows": rows, "cols": cols, "m": m, "B": B, "contexts": contexts})
    return random.Random(0).sample(found, min(count, len(found)))


def measure(shape: dict[str, Any], rounds: int) -> dict[str, Any]:
    N, K, rows, cols, m, B, contexts = shape.values()
    I, J, G = -(-N // rows), -(-K // cols), 1 if contexts == "one" else B
    x, head = torch.randn(B, K), torch.randn(m, rows, cols)
    if contexts == "additive":
        hidden = hk.AdditiveHidden(torch.randn(G, m), torch.randn(I, J, m), "relu")
    else:
        hidden = torch.randn(G, I, J, m)
    call = canonical_form(x, hidden, head, N).call
    backend, plan = plan_call(call, ("y",), None, None)
    estimates = {cost.order: cost.time_us for cost in plan.candidates["y"]}
    least = min(estimates.values())
    runs = {
        order: lambda order=order: hk.hyper_linear(x, hidden, head, out_features=N, order=order)
        for order in ORDERS
        if estimates[order] < max(SLOW_US, 5 * least)
    }
    best_us = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for order, run in runs.items():
            best_us[order] = min(best_us[order], 1e6 * timed(run))
    picked = plan.order_of("y")
    return shape | {
        "backend": backend,
        "picked": picked,
        "estimate_us": {order: round(us, 1) for order, us in estimates.items()},
        "best_us": {order: round(us, 1) for order, us in best_us.items()},
        "of_best": round(best_us[picked] / min(best_us.values()), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python benchmarks/sweep.py\n"
        "  python benchmarks/sweep.py --shapes 20 --output out/sweep.json\n\n"
        f"exit codes: 0, 1 if fewer than {WANTED:.0%} of the picks are within {CLOSE - 1:.0%} of the best order, "
        "2 for bad arguments",
    )
    parser.add_argument("--shapes", type=int, default=240, help="how many shapes (default 240)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per shape, each order once in each (default 5)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sweep.json"), help="where to save")
    arguments = parser.parse_args()
    if arguments.shapes < 1 or arguments.rounds < 1:
        parser.error("--shapes and --rounds: wanted at least 1")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    results: dict[str, Any] = {"machine_info": machine(), "shapes": []}
    saved = time.monotonic()
    with torch.no_grad():
        for shape in track(shapes(arguments.shapes), "shapes"):
            results["shapes"].append(measure(shape, arguments.rounds))
            if time.monotonic() - saved > 5 or len(results["shapes"]) == arguments.shapes:
                write(arguments.output, json.dumps(results, indent=0).encode())
                saved = time.monotonic()
    rows = results["shapes"]
    for row in sorted(rows, key=lambda row: -row["of_best"]):
        if row["of_best"] > CLOSE:
            print({key: row[key] for key in ("N", "K", "rows", "cols", "m", "B", "contexts", "picked", "of_best")})
            print("   estimate", row["estimate_us"], "best", row["best_us"])
    close = sum(row["of_best"] <= CLOSE for row in rows)
    worst = max(row["of_best"] for row in rows)
    print(f"{close} of {len(rows)} picks within {CLOSE - 1:.0%} of the best order; the worst takes {worst} of it")
    return 0 if close >= WANTED * len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
