"""What the benchmarks measure: clocks, ceilings, errors and memory; a case is right, or no result."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("pydantic", reason="results are read with pydantic")
from hyperkernels.backends import native_cpu
from hyperkernels.bench import case, contexts, growth, linear, measure, results, run
from hyperkernels.testing import peak_bytes

CEILINGS = {"gflop_per_s": 100.0, "gb_per_s": 20.0}


def test_the_ceilings_are_the_machines():
    found = measure.ceilings()
    assert found.keys() == {"gflop_per_s", "gb_per_s", "fma_gflop_per_s", "unsteady"}
    assert min(found[name] for name in found.keys() - {"unsteady"}) > 0
    assert measure.peak_gflop_per_s(found) == max(found["gflop_per_s"], found["fma_gflop_per_s"])


def test_the_ceilings_are_those_of_the_dtype(monkeypatch):
    products = []

    def clock(call, device="cpu"):
        if (result := call()).dim() == 2:
            products.append(result.dtype)
        return Mock(seconds=lambda: 1.0)

    monkeypatch.setattr(measure, "Clock", clock)
    monkeypatch.setattr(native_cpu._cpu, "peak_flops_per_s", lambda: 1e9)
    of_fp64, of_bf16 = measure.ceilings("cpu", torch.float64), measure.ceilings("cpu", torch.bfloat16)
    threads = torch.get_num_threads()
    assert of_bf16["fma_gflop_per_s"] == threads
    assert of_fp64["fma_gflop_per_s"] == threads / 2
    assert products == [torch.float64, torch.bfloat16]


def test_a_slow_call_is_called_once_each_time(monkeypatch):
    monkeypatch.setattr(measure, "SLOW_S", 0.0)
    calls = []
    clock = measure.Clock(lambda: calls.append(1))
    made = len(calls)
    assert clock.seconds() > 0
    assert len(calls) == made + 1


def test_quantiles_lie_between_what_was_measured():
    assert measure.Quantiles.of([1e-3, 2e-3]) == pytest.approx((1.2, 1.5, 1.8))


def test_a_baseline_that_raises_while_it_is_timed_costs_the_others_nothing():
    whole, calls = linear.linear((32, 32), (4, 8), 4, B=2), iter(range(10**6))

    def tires():
        if next(calls) > 40:
            raise RuntimeError("out of memory")

    whole.contestants["tires"] = tires
    (row,) = run.run([("linear", lambda: whole)], 3, CEILINGS)
    assert row["failed"] is None
    assert row["missing"]["tires"] == "out of memory"
    assert row["times"].keys() == whole.contestants.keys() - {"tires"} == row["peak_mib"].keys()


def test_ours_that_raises_while_it_is_timed_keeps_its_errors():
    whole, calls = linear.linear((32, 32), (4, 8), 4, B=2), iter(range(10**6))
    ours = whole.contestants["hyperkernels"]

    def tires():
        if next(calls) > 0:
            raise RuntimeError("out of memory")
        return ours()

    whole.contestants["hyperkernels"] = tires
    (row,) = run.run([("linear", lambda: whole)], 3, CEILINGS)
    assert row["failed"] == "out of memory"
    assert row["errors"]["hyperkernels"]["right"]


def test_ours_must_give_every_result():
    whole = linear.linear((32, 32), (4, 8), 4, B=2, train=True)
    ours = whole.contestants["hyperkernels"]
    whole.contestants["hyperkernels"] = lambda: {name: v for name, v in ours().items() if name != "dhead"}
    (row,) = run.run([("linear", lambda: whole)], 1, CEILINGS)
    assert row["failed"] == "hyperkernels gives no dhead"


def test_a_wrong_baseline_has_no_factor():
    whole = linear.linear((32, 32), (4, 8), 4, B=2)
    whole.contestants["einsum"] = lambda: {"y": torch.zeros(2, 32)}
    (row,) = run.run([("linear", lambda: whole)], 1, CEILINGS)
    factors = {line.contestant: line.times_faster for line in results.lines(row)}
    assert factors["einsum"] is None
    assert factors["dense"] > 0


@pytest.mark.parametrize("shape", [(37, 41), (16, 48)], ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
def test_layers_of_any_shape_are_cut_as_the_planner_would(shape, train):
    whole = linear.linear(shape, (4, 16), 4, B=3, train=train, more=True)
    (row,) = run.run([("linear", lambda: whole)], 1, CEILINGS)
    assert row["failed"] is None
    assert all(saved["right"] for saved in row["errors"].values())
    assert {"dense", "materialise", "einsum", "hyperkernels"} <= row["errors"].keys()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_memory_is_checked_of_the_engine_that_promises_it(backend, tmp_path):
    case = contexts.contexts(16, N=256, K=256, rows=2, cols=32, ours=linear.Ours(backend=backend))
    (row,) = run.run([("contexts", lambda: case)], 1, CEILINGS)
    assert row["failed"] is None


def test_gradients_are_memory_of_the_step_that_made_them():
    step = growth.layer(1e6).contestants
    for _ in range(2):  # in the second, a profile knows what the first left behind
        assert peak_bytes(step["dense"]) > 4e6 > peak_bytes(step["hyperkernels"])


def test_a_layer_too_large_for_its_weights_is_judged_by_some_of_them(monkeypatch):
    monkeypatch.setattr(growth, "free_bytes", lambda _device: 1000)
    (row,) = run.run([("scaling", lambda: growth.layer(1e4))], 1, CEILINGS)
    assert row["failed"] is None
    assert row["errors"]["hyperkernels"]["right"]
    assert row["missing"].keys() == {"dense", "materialise"}


def test_a_check_that_says_nothing_is_a_failed_row_too(tmp_path):
    def nothing():
        raise AssertionError

    checked = replace(linear.linear((32, 32), (4, 8), 4, B=2), check=nothing)
    (row,) = run.run([("linear", lambda: checked)], 1, CEILINGS)
    assert row["failed"] == "the case's own check failed"


def test_a_baseline_that_raises_is_missing_and_the_others_are_measured():
    def absent():
        raise RuntimeError("no compiler\nand a long story")

    whole = linear.linear((32, 32), (4, 8), 4, B=2)
    whole.contestants["materialise-compiled"] = absent
    (row,) = run.run([("linear", lambda: whole)], 1, CEILINGS)
    assert row["failed"] is None
    assert row["missing"]["materialise-compiled"] == "no compiler"
    assert row["times"].keys() == whole.contestants.keys() - {"materialise-compiled"}


def test_ours_is_faster_or_slower():
    assert results.faster(2.0) == "2.00x faster"
    assert results.faster(0.5) == "2.00x slower"
    assert results.faster(None) == ""


def test_a_case_is_judged_by_every_result_that_fp64_gives():
    exact = {"y": torch.ones(4, dtype=torch.float64), "dx": torch.ones(4, dtype=torch.float64)}
    right = {name: v.float() for name, v in exact.items()}
    contestants = {"materialise": lambda: right, "hyperkernels": lambda: right | {"dx": right["dx"] * 1.01}}
    verdicts, raised = case.judge(case.Case("", contestants, lambda: exact))
    assert not raised
    assert verdicts["materialise"].right
    assert not verdicts["hyperkernels"].right
    assert verdicts["hyperkernels"].error.max == pytest.approx(0.01, rel=1e-4)


def test_a_dtype_that_is_slow_has_a_smaller_product_as_its_ceiling(monkeypatch):
    """In fp16 2048x2048 takes a CPU minutes."""
    sizes = []
    monkeypatch.setattr(measure, "timed", lambda call, _device: sizes.append(len(call())) or len(sizes))
    assert measure.ceilings("cpu", torch.float32)["gflop_per_s"] > 0
    assert sizes == [256] * 3


def test_one_disturbed_round_does_not_make_the_product_small(monkeypatch):
    sizes, rounds = [], iter(range(10**6))

    def timed(call, _device):
        sizes.append(len(call()))
        return 1.0 if next(rounds) == 0 or sizes[-1] >= 512 else 1e-6

    monkeypatch.setattr(measure, "timed", timed)
    measure.ceilings("cpu", torch.float32)
    assert sizes == [256] * 3 + [512] * 3


@pytest.mark.parametrize(
    ("product_s", "fma", "unsteady"),
    [((1.0,), 1e12, False), ((1.0, 1.0, 3.0), 1e12, True), ((1.0,), 1.0, True)],
    ids=["steady", "scattered", "above what registers do"],
)
def test_ceilings_that_something_disturbed_say_so(product_s, fma, unsteady, monkeypatch):
    rounds = cycle(product_s)
    clocks = iter([Mock(seconds=lambda: next(rounds)), Mock(seconds=lambda: 1.0)])
    monkeypatch.setattr(measure, "Clock", lambda *_: next(clocks))
    monkeypatch.setattr(native_cpu._cpu, "peak_flops_per_s", lambda: fma)
    assert measure.ceilings()["unsteady"] is unsteady


def test_times_that_lie_far_apart_are_said_to():
    whole = linear.linear((32, 32), (4, 8), 4, B=2)
    (row,) = run.run([("linear", lambda: whole)], 2, CEILINGS)
    for times in row["times"].values():
        times["p80_ms"] = times["p20_ms"]
    assert results.unsteady(row) == ""
    row["times"]["dense"]["p80_ms"] *= 2
    assert results.unsteady(row).startswith("unsteady: dense: p80 is over")
