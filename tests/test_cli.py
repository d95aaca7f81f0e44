"""The command line: what it tells people and programs, and what it says to those who mistype."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import TINY

import hyperkernels as hk
from hyperkernels import cli

pytest.importorskip("rich", reason="the command line draws its tables with rich")
pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
pytest.importorskip("pydantic", reason="results are read with pydantic")


def test_env_explain_and_advise_speak_to_people_and_programs(capsys):
    for given in (["env"], ["explain", "512x512", "--tokens", "64"], ["advise", "4096x4096"]):
        assert cli.main(given) == 0
        assert len(capsys.readouterr().out) > 200
        assert cli.main([*given, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)
    assert cli.main(["explain", "512x512", "--order", "generate", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert {row["order"] for row in plans if row["picked"]} == {"generate"}
    assert cli.main(["explain", "512x512", "--contexts", "8", "--tokens", "8"]) == 0
    told = capsys.readouterr().out
    assert "8 contexts" in told
    assert "[g,t,j,k,r]" in told, "brackets are no markup"
    assert cli.main(["advise", "4096x4096"]) == 0
    told = capsys.readouterr().out
    assert "parameters" in told
    assert "component" in told


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["bench", "sideways"], "suite: got 'sideways', wanted one of linear"),
        (["bench", "--shape", "64"], "--shape: got '64', wanted NxK, out and in features, such as"),
        (["bench", "--rounds", "0"], "--rounds: got '0', wanted a positive integer"),
        (["bench", "scaling", "--shape", "64x64"], "no case for these settings"),
        (["bench", "--calibrate", "--quick"], "--calibrate: got --quick beside it"),
        (["bench", "linear", "--threads", "9999"], "--threads: got 9999, wanted at most the"),
        (["explain", "64x64", "--chunk", "0x3"], "wanted RxC"),
        (["bench", "linear", "--device", "cuda"], "torch sees no CUDA device"),
        (["bench", "linear", "--backend", "triton"], "triton cannot do this here"),
        (["bench", "linear", "--json", "/dev/null/x.json"], "cannot write there"),
        (["bench", "linear", "--json", "."], "is no file"),
        (["bench", "linear", "--csv", "/dev/null"], "is no file"),
        (["bench", "linear", *TINY, "--json", "a", "--csv", "./a"], "--csv: got the same file as --json"),
        (["bench", "linear", *TINY, "--bas", "HEAD"], "unrecognized arguments: --bas"),
        (["explain", "64x64", "--contexts", "3", "--tokens", "64"], "a multiple of 3"),
        (["bench", "linear", *TINY, "--base", "no-such-commit"], "wanted a commit of"),
        (["report", "nowhere.json"], "is not there: `hyperkernels bench"),
        (["plot", "nowhere.json"], "is not there: `hyperkernels bench"),
        (["report", "."], "cannot read it (Is a directory): give a file"),
        (["bench", "linear", "--json="], "--json: got '', wanted a file"),
        (["report", ""], "results: got '', wanted a file"),
        (["bench", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["advise", "64x64", "--budget", "-1"], "a positive integer; see hyperkernels advise --help"),
        ([], "required: command; see hyperkernels --help"),
        (["advise", "4096by4096"], "wanted NxK"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_arguments_are_one_line_that_says_what_to_do(given, wanted, capsys, tmp_path, monkeypatch):
    if torch.cuda.is_available() and ("cuda" in given or "triton" in given):
        pytest.skip("a CUDA device is there")
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(given)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert wanted in told


@pytest.mark.parametrize("given", [[], ["bench"], ["plot"], ["report"], ["env"], ["explain"], ["advise"]], ids=str)
def test_help_teaches_with_examples(given, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*given, "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "examples:" in told
    assert "exit codes" in told
    assert ("the first row replaces" in " ".join(told.split())) is (given == ["bench"])


def test_it_runs_as_a_module():
    found = subprocess.run(
        [sys.executable, "-m", "hyperkernels", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == hk.__version__
