"""The Triton kernels of the benchmark's shapes, compiled for chips that are not here, down to their instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WIDE = {"8192 tokens", "64 contexts of 128", "64 mapped contexts"}  # enough rows for the tensor cores' own tiles
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
REGISTERS = 65536
CHOICES = [("sm_90", "float32"), ("gfx942", "float32"), *((chip, "bfloat16") for chip in SHARED_BYTES)]
if os.environ.get("ALL_CHIPS"):  # `make sass`: two more minutes
    CHOICES += [("sm_80", "float32"), ("sm_100", "float32"), ("sm_90", "float16")]


def run(script, *options):
    """Of the benchmarks, in a process whose kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_kept_launch_hands_over_what_tritons_own_does():
    run("launching.py", "--calls", "10")


def compiled(folder, *options):
    path = folder / "table.json"
    run("compiled.py", *options, "--output", str(path))
    return json.loads(path.read_text())


@pytest.mark.parametrize(("chip", "dtype"), CHOICES, ids=lambda choice: choice)
def test_what_the_planner_picks_compiles(chip, dtype, tmp_path):
    table = compiled(tmp_path, "--chip", chip, "--dtype", dtype)
    assert len(table) == 56
    for row in table:
        assert row["spills"] == 0, row
        assert row["shared_bytes"] <= SHARED_BYTES[chip], row
        if chip.startswith("sm_"):
            assert row["registers"] * 32 * row["warps"] <= REGISTERS, row
        if dtype != "float32":  # which tensor cores would round, unless torch is told that they may
            assert row["tensor_core"] > 0, row
            assert row["wide_tensor_core"] > 0 or row["shape"] not in WIDE, row


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_it_picks_for_shapes_of_any_kind_does_not_spill(dtype, tmp_path):
    count = 30 if os.environ.get("ALL_CHIPS") else 4
    table = compiled(tmp_path, "--chip", "sm_90", "--dtype", dtype, "--drawn", str(count))
    assert len(table) == 4 * count
    assert not [row for row in table if row["spills"]]
