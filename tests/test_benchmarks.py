"""The README's figures are the saved ones, and the benchmark commands work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
report = pytest.importorskip("report")


def run(*command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["cpu", "conv", "model"])
def test_readme_holds_the_saved_results(name):
    results = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    sweep = json.loads((ROOT / "benchmarks/results/sweep.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert report.in_readme(readme, name, results, sweep) == readme, "run `make readme`"


@pytest.mark.parametrize(("factor", "code"), [(0.001, 0), (1e6, 1)], ids=["reached", "missed"])
def test_report(tmp_path, factor, code):
    results = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    for bench in results["benchmarks"]:
        if "faster" in bench["extra_info"]:
            bench["extra_info"] |= {"faster": {"materialise": factor}, "smaller": {}, "of_peak": None}
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    result = run("benchmarks/report.py", tmp_path / "cpu.json")
    assert result.returncode == code, result.stderr
    assert ("MISSED" in result.stdout) == (code == 1)
    assert (tmp_path / "cpu.png").stat().st_size > 10_000


@pytest.mark.parametrize("text", ["", "{}", '{"benchmarks": ['])
def test_report_of_a_damaged_file(tmp_path, text):
    (tmp_path / "cpu.json").write_text(text)
    result = run("benchmarks/report.py", tmp_path / "cpu.json")
    assert result.returncode == 2
    assert "not the results of a benchmark" in result.stderr


def test_a_missed_factor_is_said():
    times = {"dense": {"p50_ms": 2.0}, "hyperkernels": {"p50_ms": 1.0}}
    case = {"times": times, "faster": {"dense": 2.5}, "of_peak": 0.5, "flops": 2e8}
    machine = {"machine_info": {"ceilings": {"fma_gflop_per_s": 500.0}}}
    missed = ("2.0 times faster than dense, wanted 2.5 [5.0]", False)
    assert report.verdicts(case, machine) == [missed, ("40% of the FMA peak, wanted 50%", False)]
    case["times"]["triton"] = {"p50_ms": 0.5}
    found = report.verdicts(case | {"roofline_ms": 0.4}, machine)
    assert found == [
        ("4.0 times faster than dense, wanted 2.5 [5.0]", True),
        ("80% of the plan's roofline, wanted 50%", True),
    ]


def test_the_sweep_runs_and_saves(tmp_path):
    result = run("benchmarks/sweep.py", "--shapes", "3", "--rounds", "1", "--output", tmp_path / "sweep.json")
    assert result.returncode in (0, 1), result.stderr
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert len(saved["shapes"]) == 3
    assert all(row["of_best"] >= 1 for row in saved["shapes"])


def test_the_saved_sweep_shows_the_planner_picking_well():
    shapes = json.loads((ROOT / "benchmarks/results/sweep.json").read_text())["shapes"]
    assert len(shapes) >= 200
    assert sum(row["of_best"] <= 1.15 for row in shapes) >= 0.9 * len(shapes)


def test_make_gpu_runs_end_to_end_without_one(tmp_path):
    result = run("benchmarks/gpu.py", "--device", "cpu", "--quick", "--output", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    saved = json.loads((tmp_path / "interpreted.json").read_text())
    assert len(saved["cases"]) == 5
    assert {"dense", "hyperkernels", "triton"} == saved["launch_us"].keys()
    assert saved["ways_us"].keys() == {"y", "hidden", "head", "x"}
    assert all("triton" in case["times"] for case in saved["cases"])
    assert saved["tests_exit_code"] == 0
    assert not saved["failed"]
    assert (tmp_path / "interpreted.png").stat().st_size > 10_000
    assert saved["machine_info"].keys() > {"commit", "triton", "torch"}


def test_scaling_runs_and_saves(tmp_path):
    given = ("--least", "1e5", "--most", "1e5", "--output", tmp_path / "scaling.json")
    result = run("benchmarks/scaling.py", *given)
    assert result.returncode == 0, result.stdout + result.stderr
    points = json.loads((tmp_path / "scaling.json").read_text())["points"]
    assert [point["how"] for point in points] == ["hyperkernels", "weights formed"]
    assert all(point["peak_mib"] > 0 for point in points)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_the_saved_scaling_is_flat_where_weights_formed_fail():
    points = json.loads((ROOT / "benchmarks/results/scaling.json").read_text())["points"]
    ours = {point["weights"]: point for point in points if point["how"] == "hyperkernels"}
    assert max(ours) >= 1e10
    assert all(point["peak_mib"] < 4 * point["weights"] / 2**20 / 4 for n, point in ours.items() if n > 1e6)
    assert any("failed" in point for point in points if point["how"] != "hyperkernels")


def test_hyper_resnet_measures_and_draws(tmp_path):
    given = ("--epochs", "0", "--memory", "18", "--batches", "1", "2", "--output", tmp_path / "resnet.png")
    result = run("python/demos/hyper_resnet.py", *given)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ResNet-18" in result.stdout
    assert (tmp_path / "resnet.png").stat().st_size > 10_000


def test_replace_linear_trains_and_draws(tmp_path):
    sizes = ("--steps", "2", "--batch", "1", "--length", "16", "--width", "8")
    result = run("python/demos/replace_linear.py", "--model", "small", *sizes, "--output", tmp_path / "loss.png")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "16 linear layers replaced" in " ".join(result.stdout.split())
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    refused = run("python/demos/replace_linear.py", "--model", tmp_path / "nowhere")
    assert refused.returncode == 2
    assert "--model: got" in refused.stderr


@pytest.mark.parametrize(
    "command",
    [
        "benchmarks/report.py",
        "benchmarks/sweep.py",
        "benchmarks/gpu.py",
        "benchmarks/compiled.py",
        "benchmarks/launching.py",
        "benchmarks/ten_billion_weights.py",
        "benchmarks/scaling.py",
        "python/demos/vit_rotations.py",
        "python/demos/hyper_resnet.py",
        "python/demos/replace_linear.py",
    ],
)
def test_help_teaches_with_examples(command):
    result = run(command, "--help")
    assert result.returncode == 0
    assert "example" in result.stdout
