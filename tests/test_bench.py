"""`hyperkernels bench`: what it measures, shows and saves, and how it compares."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from unittest.mock import patch

import pytest
from conftest import TINY

import hyperkernels as hk
from hyperkernels import cli

pytest.importorskip("rich", reason="the command line draws its tables with rich")
pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
pytest.importorskip("pydantic", reason="results are read with pydantic")
from rich.console import Console

from hyperkernels.bench import command, files, linear, models, results, suites

pytestmark = pytest.mark.usefixtures("known_ceilings")


def test_every_number_has_its_error_and_its_place_under_the_roof(measured):
    found = results.load(measured)
    assert found["complete"]
    assert {"gflop_per_s", "gb_per_s"} <= found["machine"]["ceilings"].keys()
    assert {row["suite"] for row in found["rows"]} == {*suites.SUITES} - {"scaling", "models"}
    for row in found["rows"]:
        assert row["failed"] is None
        assert "hyperkernels" in row["times"]
        assert row["errors"]["hyperkernels"]["right"]
        least = max(row["flops"]["hyperkernels"] / 100, row["bytes"]["hyperkernels"] / 20) / 1e6  # ms, by CEILINGS
        share = least / row["times"]["hyperkernels"]["p50_ms"]
        assert row["of_roofline"]["hyperkernels"] == pytest.approx(share)
        for times in row["times"].values():
            assert 0 < times["p20_ms"] <= times["p50_ms"] <= times["p80_ms"]
    names = {name for row in found["rows"] for name in (*row["times"], *row["missing"])}
    assert {"dense", "dense-tuned", "materialise", "einsum", "hypnettorch", "fastkron"} <= names
    lines = list(csv.DictReader(measured.with_suffix(".csv").read_text().splitlines()))
    assert len(lines) == sum(len(row["times"]) + len(row["missing"]) for row in found["rows"])
    assert {line["verdict"] for line in lines if line["p50_ms"]} <= {"right", ""}
    assert not [line for line in lines if line["verdict"] == "" and line["contestant"] in ("hyperkernels", "dense")]
    assert all(line["verdict"].startswith("not here: ") for line in lines if not line["p50_ms"])


def test_every_suite_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "range", lambda *_: range(8, 10), raising=False)  # fewer weights than it grows to
    for suite in ("scaling", "models"):
        path = tmp_path / f"{suite}.json"
        assert cli.main(["bench", suite, "--quick", "--rounds", "1", "--json", str(path)]) == 0
        for row in results.load(path)["rows"]:
            assert row["failed"] is None
            judged = row["times"].keys() - {*row["parts"]}
            assert judged == row["errors"].keys() >= {"hyperkernels"}
            assert all(saved["right"] for saved in row["errors"].values())
            assert {line.times_faster for line in results.lines(row) if line.contestant in row["parts"]} <= {None}


def test_decoding_reads_the_cache_by_the_name_that_transformers_gives_it(caplog, monkeypatch):
    pytest.importorskip("transformers", reason="GPT-2 is transformers'")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    case = models.decode(layers=1, past=2)
    assert case.contestants["dense"]()["logits"].shape[0] == 1
    assert "deprecated" not in caplog.text


def test_what_is_no_terminal_is_told_the_time_left_beside_a_long_name(tmp_path, monkeypatch, capsys):
    def only_ticks(_todo, rounds, _ceilings, _device, tick):
        for _ in range(rounds):
            tick("x" * 99)
        return []

    monkeypatch.setattr(command, "run", only_ticks)
    monkeypatch.delenv("COLUMNS", raising=False)
    cli.main(["bench", "decode", *TINY, "--rounds", "1000", "--json", str(tmp_path / "x.json")])
    assert capsys.readouterr().err.rstrip().endswith("1000/1000 0:00:00")


def test_suites_without_a_case_for_the_settings_are_said(tmp_path, capsys):
    path = tmp_path / "x.json"
    kept = {"memory", "scaling", "models"}
    with patch.object(command, "SUITES", {name: what for name, what in suites.SUITES.items() if name in kept}):
        assert cli.main(["bench", *TINY, "--json", str(path)]) == 0
    told = capsys.readouterr().err
    assert "scaling is left out: its layers grow" in told
    assert "models is left out" in told
    assert {row["suite"] for row in results.load(path)["rows"]} == {"memory"}


def test_a_case_that_a_setting_leaves_out_says_so(tmp_path, capsys):
    path = tmp_path / "x.json"
    given = ["bench", "contexts", "conv", *TINY, "--backend", "cpu", "--json"]
    assert cli.main([*given, str(path)]) == 0
    missing = {row["missing"].get("the case") for row in results.load(path)["rows"]}
    assert missing == {None, "cpu: it has no convolutions"}
    assert cli.main(["bench", "contexts", *TINY, "--dtype", "fp64", "--json", str(path)]) == 0
    assert "set up in fp32 on a CPU" in results.load(path)["rows"][0]["missing"]["the case"]
    before = path.read_text()
    assert cli.main(["bench", "conv", *TINY, "--backend", "cpu", "--json", str(path)]) == 1  # nothing was measured
    assert path.read_text() == before


def test_convolutions_have_as_many_channels_as_the_shape_says(tmp_path):
    path = tmp_path / "x.json"
    given = ("--quick", "--shape", "6x10", "--rounds", "1")
    assert cli.main(["bench", "conv", *given, "--json", str(path)]) == 0
    rows = results.load(path)["rows"]
    assert ["10 to 6 channels" in row["case"] for row in rows] == [True, True]
    assert all(row["errors"]["hyperkernels"]["right"] for row in rows)


def test_a_baseline_that_is_missing_says_so(measured, monkeypatch, capsys):
    monkeypatch.setattr(linear.baselines, "missing", lambda name, *_: "nobody installed it" if name == "einsum" else "")
    path = measured.with_name("missing.json")
    assert cli.main(["bench", "decode", *TINY, "--json", str(path)]) == 0
    assert results.load(path)["rows"][0]["missing"] == {"einsum": "nobody installed it"}
    assert "einsum is not here: nobody installed it" in " ".join(capsys.readouterr().out.split())


def test_a_case_whose_library_is_missing_has_not_failed(tmp_path, monkeypatch, capsys):
    def absent(*_, **__):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(suites, "linear", absent)
    path = tmp_path / "x.json"
    assert cli.main(["bench", "decode", "memory", *TINY, "--json", str(path)]) == 0
    assert results.load(path)["rows"][0]["failed"] is None
    assert "transformers is not installed" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("raised", "wanted"),
    [
        (AssertionError(), "AssertionError"),
        (TypeError("one line\nand more"), "one line"),
        (OSError("no room"), "no room"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_whatever_a_case_raises_the_others_are_measured(raised, wanted, tmp_path, monkeypatch):
    whole, calls = suites.linear, iter(range(9))

    def first_raises(*given, **more):
        if next(calls) == 0:
            raise raised
        return whole(*given, **more)

    monkeypatch.setattr(suites, "linear", first_raises)
    path = tmp_path / "x.json"
    assert cli.main(["bench", "decode", "memory", *TINY, "--json", str(path)]) == 1
    failed, *others = results.load(path)["rows"]
    assert wanted in failed["failed"]
    assert others
    assert not any(row["failed"] for row in others)


def test_a_wrong_result_is_a_failed_row_however_fast(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hk, "hyper_linear", lambda x, hidden, head, **_: x.new_zeros(len(x), 64))
    path = tmp_path / "wrong.json"
    assert cli.main(["bench", "decode", *TINY, "--json", str(path), "--csv", str(tmp_path / "wrong.csv")]) == 1
    (row,) = results.load(path)["rows"]
    assert "hyperkernels is wrong" in row["failed"]
    assert "FAILED" in capsys.readouterr().out
    lines = list(csv.DictReader((tmp_path / "wrong.csv").read_text().splitlines()))
    assert [line["contestant"] for line in lines if "failed: hyperkernels is wrong" in line["verdict"]] == [
        "hyperkernels"
    ]


def test_errors_that_are_not_finite_are_saved_as_json_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(hk, "hyper_linear", lambda x, hidden, head, **_: x.new_full((len(x), 64), math.nan))
    path = tmp_path / "wrong.json"
    assert cli.main(["bench", "decode", *TINY, "--json", str(path)]) == 1
    json.loads(path.read_text(), parse_constant=pytest.fail)
    (row,) = results.load(path)["rows"]
    assert row["failed"] == "hyperkernels is wrong: off by inf of the largest value"
    assert row["errors"]["hyperkernels"] == {"max": math.inf, "rms": math.inf, "right": False}
    assert cli.main(["report", str(path), "--output", str(tmp_path / "page.html")]) == 0


def test_a_case_that_cannot_be_measured_has_its_line(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no room")

    monkeypatch.setattr(suites, "linear", broken)
    table = tmp_path / "x.csv"
    assert cli.main(["bench", "decode", *TINY, "--json", str(tmp_path / "x.json"), "--csv", str(table)]) == 1
    (line,) = csv.DictReader(table.read_text().splitlines())
    assert line["verdict"] == "failed: no room"


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    def stopped(*given):
        rows = run(*given)
        yield next(rows)
        raise KeyboardInterrupt

    run = command.run
    monkeypatch.setattr(command, "run", stopped)
    path = tmp_path / "part.json"
    assert cli.main(["bench", "memory", *TINY, "--json", str(path)]) == 1
    found = results.load(path)
    assert not found["complete"]
    assert len(found["rows"]) == 1
    assert "1 of 3 cases are kept" in capsys.readouterr().err
    assert cli.main(["report", str(path), "--output", str(tmp_path / "part.html")]) == 0
    assert "Stopped before its end" in (tmp_path / "part.html").read_text()


def test_the_signal_of_ctrl_c_keeps_what_was_measured(tmp_path):
    path = tmp_path / "part.json"
    given = ["bench", "decode", "memory", "linear", "--shape", "512x512", "--rounds", "40", "--json", str(path)]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which whoever runs the tests may ignore
    process = subprocess.Popen(
        [sys.executable, "-m", "hyperkernels", *given], stderr=subprocess.PIPE, text=True, preexec_fn=heed
    )
    try:
        end = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "cases are kept" in told
    assert "Traceback" not in told
    found = results.load(path)
    assert found["rows"]
    assert not found["complete"]


def test_a_suite_that_is_named_twice_runs_once(tmp_path):
    path = tmp_path / "x.json"
    assert cli.main(["bench", "decode", "decode", *TINY, "--json", str(path)]) == 0
    assert len(results.load(path)["rows"]) == 1


def test_a_narrow_terminal_shows_every_digit(measured, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    narrow = Console(markup=False, highlight=False, width=80)
    monkeypatch.setattr(command, "wide_console", lambda: narrow)
    command.print_rows(results.load(measured))
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert "…" not in told
    for row in results.load(measured)["rows"]:
        assert all(f"{times['p50_ms']:.3g}" in told for times in row["times"].values())


def test_results_without_a_row_are_no_report(measured, tmp_path, capsys):
    path = tmp_path / "empty.json"
    path.write_text(json.dumps(json.loads(measured.read_text()) | {"rows": []}))
    assert cli.main(["report", str(path), "--output", str(tmp_path / "page.html")]) == 2
    assert "it has no rows" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_file_that_cannot_be_finished_leaves_the_good_one(measured, tmp_path, monkeypatch):
    path = tmp_path / "good.json"
    shutil.copy(measured, path)
    good = path.read_text()

    def broken(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError, match="full"):
        files.save(path, {"half": "done"})
    assert path.read_text() == good
    assert [p.name for p in tmp_path.iterdir()] == ["good.json"]


def test_a_run_that_measures_nothing_leaves_the_file_of_the_one_before(measured, tmp_path, monkeypatch):
    path = tmp_path / "before.json"
    shutil.copy(measured, path)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "ceilings", stopped)
    assert cli.main(["bench", "decode", *TINY, "--json", str(path), "--base", str(path)]) == 1
    assert path.read_text() == measured.read_text()


def test_the_command_is_saved_as_it_was_given(measured):
    assert results.load(measured)["command"].startswith("hyperkernels bench linear contexts")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda text: text[: len(text) // 2], "cut short"),
        (lambda text: "[]", "no results of"),
        (lambda text: text.replace('"hyperkernels_bench": 2', '"hyperkernels_bench": 99'), "format 99"),
        (lambda text: text.replace('"times"', '"tides"'), "damaged at rows.0.times (Field required)"),
        (lambda text: text.replace('"command"', '"commend"'), "damaged at command"),
        (lambda text: text.replace('"gb_per_s": 20.0', '"gb_per_s": "fast"'), "damaged at machine.ceilings.gb_per_s"),
        (lambda text: re.sub(r'"p50_ms": [^,]*', '"p50_ms": 0', text, count=1), "p50_ms (Input should be greater"),
        (lambda text: text.replace('"B": 1,', '"B": "one",'), "values.B"),
        (lambda text: text.replace('"gb_per_s"', '"gb"'), "machine.ceilings.gb_per_s"),
        (lambda text: text.replace('"bytes": {', '"bytes": {"nobody": 1,'), "FLOPs or bytes without a time"),
    ],
)
def test_a_damaged_file_is_named(change, wanted, measured, tmp_path, capsys):
    path = tmp_path / "damaged.json"
    path.write_text(change(measured.read_text()))
    for reader in ("plot", "report"):
        assert cli.main([reader, str(path)]) == 2
        assert wanted in capsys.readouterr().err
