"""What is saved about the machine beside the figures, and nothing that names it."""

from __future__ import annotations

import torch

from hyperkernels.bench.measure import ceilings, machine


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    torch.set_num_threads(2)
    machine_info.clear()
    machine_info.update(machine() | {"ceilings": ceilings()})


def pytest_benchmark_update_commit_info(config, commit_info) -> None:
    for key in ("project", "branch", "author_time"):
        commit_info.pop(key, None)
