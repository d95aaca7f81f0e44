"""`make bench`: ratios of time and memory, every case right before it is fast. `make test` does not collect this file.

Each round runs every contestant in turn, in one process, so that whatever else the machine does hits all of them; each
is warm when it is timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from claims import CASES
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hyperkernels.bench.case import OURS, assert_right
from hyperkernels.bench.measure import Quantiles, timed, warm
from hyperkernels.testing import peak_bytes

ROUNDS = 15
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", CASES)
def test_case(benchmark, name):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    case = CASES[name]()
    assert_right(case)
    seconds: dict[str, list[float]] = {baseline: [] for baseline in case.contestants if baseline != OURS}
    ours = case.contestants[OURS]

    def baselines_in_turn() -> None:
        for baseline, times in seconds.items():
            times.append(timed(case.contestants[baseline]))
        warm(ours)

    benchmark.pedantic(ours, setup=baselines_in_turn, rounds=ROUNDS)
    with FlopCounterMode(display=False) as counter:
        results = tree_leaves(ours())
    times = seconds | {OURS: benchmark.stats.stats.data}
    benchmark.extra_info.update(
        case=case.name,
        flops=counter.get_total_flops(),
        faster=case.faster,
        smaller=case.smaller,
        of_peak=case.of_peak,
        times={baseline: Quantiles.of(values)._asdict() for baseline, values in times.items()},
        result_mib=sum(value.nbytes for value in results if isinstance(value, torch.Tensor)) / 2**20,
        peak_mib={baseline: peak_bytes(call) / 2**20 for baseline, call in case.contestants.items()},
    )


def test_ten_billion_weights(benchmark):
    """In a process of its own, whose peak resident memory is read at its end."""
    script = ROOT / "benchmarks/ten_billion_weights.py"
    outcome = benchmark.pedantic(subprocess.check_output, ([sys.executable, script],), {"text": True}, rounds=1)
    benchmark.extra_info.update(json.loads(outcome))
