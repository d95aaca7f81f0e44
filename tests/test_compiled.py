"""The Triton kernels of the benchmark's shapes, compiled for chips that are not here, down to their instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hyperkernels.kernels.tiles import CHIPS, chip_of

ROOT = Path(__file__).parents[1]
WIDE = {"8192 tokens", "64 contexts of 128", "64 mapped contexts"}  # enough rows for the tensor cores' own tiles
REGISTERS = 65536


@pytest.mark.parametrize("capability", CHIPS, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_what_the_planner_picks_compiles(capability, tmp_path):
    chip = ".".join(map(str, capability))
    path = tmp_path / "table.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "compiled.py"), "--chip", chip, "--output", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    table = json.loads(path.read_text())
    assert len(table) == 40
    for row in table:
        assert row["tensor_core"] > 0, row
        assert row["shared_bytes"] <= chip_of(capability).shared_bytes, row
        assert row["registers"] * 32 * row["warps"] <= REGISTERS, row
        if row["shape"] in WIDE:
            assert row["wide_tensor_core"] > 0, row
        if capability == (9, 0):
            assert row["spills"] == 0, row
