"""`hyperkernels bench --base`: results beside those of a commit or of a file."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from conftest import TINY

from hyperkernels import cli

pytest.importorskip("rich", reason="the command line draws its tables with rich")
pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
pytest.importorskip("pydantic", reason="results are read with pydantic")

from hyperkernels.bench import command, results

pytestmark = pytest.mark.usefixtures("known_ceilings")


def test_a_base_is_compared_factor_by_factor(measured, tmp_path, capsys):
    before = json.loads(measured.read_text())
    for row in before["rows"]:
        row["times"]["hyperkernels"]["p50_ms"] /= 1000
    base = tmp_path / "base.json"
    base.write_text(json.dumps(before))
    assert cli.main(["bench", "decode", *TINY, "--json", str(tmp_path / "now.json"), "--base", str(base)]) == 0
    told = capsys.readouterr().out
    assert "less now" in told
    assert "base: what it said" in told


def test_a_base_of_other_cases_or_of_another_machine_is_said_to_be(measured, tmp_path, capsys):
    before = json.loads(measured.read_text())
    before["machine"]["device"] = "an abacus"
    base = tmp_path / "base.json"
    base.write_text(json.dumps(before))
    given = ["bench", "decode", *TINY, "--json", str(tmp_path / "now.json"), "--base", str(base)]
    assert cli.main(given) == 0
    assert "--base: it was measured on another machine, an abacus" in capsys.readouterr().err
    before["rows"] = [row for row in before["rows"] if row["suite"] != "decode"]
    base.write_text(json.dumps(before))
    assert cli.main(given) == 0
    assert "--base: it has none of these cases" in capsys.readouterr().err


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository whose `bench` saves what lies beside it, at a commit of today's format and one of another."""
    root, git = tmp_path / "checkout", ["git", "-C", str(tmp_path / "checkout")]
    package = root / "hyperkernels" / "bench"
    package.mkdir(parents=True)
    (root / "setup.py").touch()
    (root / "hyperkernels" / "__init__.py").touch()
    (root / "hyperkernels" / "__main__.py").write_text(
        "import shutil, sys\nshutil.copy('saved.json', sys.argv[sys.argv.index('--json') + 1])\n"
    )
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]

    def commit(saved_format):
        (package / "results.py").write_text(f"FORMAT = {saved_format}\n")
        subprocess.run([*git, "add", "--all"], check=True)
        subprocess.run([*git, *who, "commit", "--quiet", "--message", "now"], check=True)

    monkeypatch.setattr(command, "ROOT", root)
    return root, commit


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_a_base_that_is_a_commit_is_measured_by_its_own_code(checkout, measured, tmp_path, capsys):
    root, commit = checkout
    before = json.loads(measured.read_text())
    for row in before["rows"]:
        row["times"]["hyperkernels"]["p50_ms"] /= 1000
    (root / "saved.json").write_text(json.dumps(before))
    commit(results.FORMAT)
    commit(results.FORMAT - 1)
    given = ["bench", "decode", *TINY, "--json", str(tmp_path / "now.json"), "--base"]
    assert cli.main([*given, "HEAD~1"]) == 0
    assert "less now" in capsys.readouterr().out
    assert cli.main([*given, "HEAD"]) == 2
    assert "HEAD saves results otherwise" in capsys.readouterr().err
    left = subprocess.run(["git", "-C", str(root), "worktree", "list"], capture_output=True, text=True, check=True)
    assert len(left.stdout.splitlines()) == 1


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_an_installed_copy_asks_no_repository_around_it(checkout, tmp_path, monkeypatch, capsys):
    root, commit = checkout
    commit(results.FORMAT)
    given = ["bench", "decode", *TINY, "--json", str(tmp_path / "x.json"), "--base", "HEAD"]
    for installed in (root / "hyperkernels", tmp_path):
        monkeypatch.setattr(command, "ROOT", installed)
        assert cli.main(given) == 2
        assert "an installed copy, not a checkout: give a results file" in capsys.readouterr().err


def test_a_base_without_git_asks_for_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.shutil, "which", lambda _name: None)
    assert cli.main(["bench", "decode", *TINY, "--json", str(tmp_path / "x.json"), "--base", "HEAD"]) == 2
    assert "needs git" in capsys.readouterr().err
