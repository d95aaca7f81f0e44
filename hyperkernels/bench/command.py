"""`hyperkernels bench`: runs suites with a progress bar, saves each row as it comes, and prints the table."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hyperkernels import calibration
from hyperkernels.backends import BACKENDS
from hyperkernels.bench import files
from hyperkernels.bench import results as saved
from hyperkernels.bench.case import OURS, NotHere
from hyperkernels.bench.linear import Ours
from hyperkernels.bench.measure import ceilings, machine
from hyperkernels.bench.run import run
from hyperkernels.bench.suites import DTYPES, SUITES, Wanted, cases
from hyperkernels.call import Call
from hyperkernels.chunking import Grid
from hyperkernels.machine import cpus
from hyperkernels.tables import wide_console

ROOT = Path(__file__).parents[2]
ROUNDS, QUICK_ROUNDS = 15, 5
BREAKS = {"": len(OURS), "ours is": len("faster"), "base": len("faster")}  # columns that a narrow terminal breaks
SLOWER = 0.8  # of the base's factor over a baseline: less is pointed out


def bench(arguments: argparse.Namespace) -> int:
    chosen = list(dict.fromkeys(arguments.suites or SUITES))
    unknown = [name for name in chosen if name not in SUITES]
    if unknown:
        raise ValueError(f"suite: got {unknown[0]!r}, wanted one of {', '.join(SUITES)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: torch sees no CUDA device here; leave it out to measure the CPU")
    ours = Ours(arguments.order, arguments.backend)
    _check_backend(arguments, ours)
    if arguments.threads:
        if arguments.threads > cpus():
            raise ValueError(f"--threads: got {arguments.threads}, wanted at most the {cpus()} CPUs that are here")
        torch.set_num_threads(arguments.threads)
        calibration.apply(calibration.SHIPPED)
        calibration.load()  # what is for as many threads
    wanted = Wanted(arguments.quick, tuple(arguments.shape), arguments.dtype, arguments.device, ours)
    todo = []
    for suite in chosen:
        try:
            todo += [(suite, make) for make in cases(suite, wanted)]
        except NotHere as why:
            if suite in arguments.suites:
                raise ValueError(f"{suite}: no case for these settings: {why}") from None
            print(f"{suite} is left out: {why}", file=sys.stderr)
    found = saved.new(machine(arguments.device), shlex.join(["hyperkernels", *arguments.given]))
    for path in (arguments.json, arguments.csv):
        if path is not None:
            files.check_writable(path)
    if arguments.csv and arguments.csv.resolve() == arguments.json.resolve():
        raise ValueError("--csv: got the same file as --json, wanted another")
    base = _base(arguments) if arguments.base else None
    console = Console(stderr=True, markup=False)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    with (
        _quiet(),
        Progress(
            *(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
            console=console,
        ) as progress,
    ):
        bar = progress.add_task("the machine's ceilings", total=len(todo) * rounds)
        try:
            found["machine"]["ceilings"] = there = ceilings(arguments.device, DTYPES[arguments.dtype])

            def tick(name: str) -> None:
                progress.update(bar, advance=1, description=name[:40])  # 80 columns hold the rest too

            for row in run(todo, rounds, there, arguments.device, tick):
                found["rows"].append(row)
                _save(arguments, found)
            found["complete"] = True
        except KeyboardInterrupt:
            console.print(f"stopped: {len(found['rows'])} of {len(todo)} cases are kept")
        _save(arguments, found)
    if found["rows"]:
        print_rows(found, base)
        if base and (why := _unlike(base, found)):
            print(f"\n--base: {why}", file=sys.stderr)
    print(f"\nresults: {arguments.json}" if _measured(found) else "nothing was measured, and nothing is saved")
    return int(not found["complete"] or not _measured(found) or any(row["failed"] for row in found["rows"]))


def _measured(found: saved.Results) -> bool:
    return any(row["times"] or row["failed"] for row in found["rows"])


def _check_backend(arguments: argparse.Namespace, ours: Ours) -> None:
    if ours.backend is None:
        return
    call = Call(Grid(64, 64, 8, 8), 8, 1, 1, 4, dtype=DTYPES[arguments.dtype], device=arguments.device)
    able, reason = BACKENDS[ours.backend].supports(call, ours.order)
    if not able:
        raise ValueError(f"--backend: {ours.backend} cannot do this here: {reason}")


def _save(arguments: argparse.Namespace, found: saved.Results) -> None:
    if not _measured(found):  # what an earlier run saved stays
        return
    files.save(arguments.json, found)
    if arguments.csv:
        saved.save_csv(arguments.csv, found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without other libraries' warnings between the lines of the progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _base(arguments: argparse.Namespace) -> saved.Results:
    """The results of another commit, measured now by its own code, or those of a file."""
    if Path(arguments.base).suffix == ".json":
        return saved.load(Path(arguments.base))
    if not shutil.which("git"):
        raise ValueError("--base: a commit needs git, which is not installed: give a results file (.json)")
    git = ["git", "-C", str(ROOT)]
    top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True).stdout.strip()
    if not top or Path(top).resolve() != ROOT.resolve():  # a repository may lie around a virtual environment
        raise ValueError("--base: this is an installed copy, not a checkout: give a results file (.json)")
    commit = subprocess.run(
        [*git, "rev-parse", "--verify", f"{arguments.base}^{{commit}}"], capture_output=True, text=True
    )
    if commit.returncode:
        raise ValueError(f"--base: got {arguments.base!r}, wanted a commit of {ROOT}, or a results file (.json)")
    sha = commit.stdout.strip()
    alike = [*git, "grep", "--quiet", f"^FORMAT = {saved.FORMAT}$", sha, "--", "hyperkernels/bench/results.py"]
    if subprocess.run(alike, capture_output=True).returncode:
        raise ValueError(f"--base: {arguments.base} saves results otherwise, and cannot be compared: give a later one")
    with tempfile.TemporaryDirectory() as folder:
        tree, output = Path(folder) / "tree", Path(folder) / "base.json"
        given = _without(arguments.given[1:], "--base", "--json", "--csv")
        again = [sys.executable, "-m", "hyperkernels", "bench", *given, "--json", str(output)]
        steps = [
            ([*git, "worktree", "add", "--quiet", "--detach", str(tree), sha], None),
            ([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree),
            (again, tree),
        ]
        try:
            for step, where in steps:
                print(f"base {arguments.base}: {shlex.join(step[1:4])} ...", file=sys.stderr)
                outcome = subprocess.run(step, cwd=where, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                if outcome.returncode and not output.exists():
                    last = (outcome.stderr.strip().splitlines() or ["it failed"])[-1]
                    raise ValueError(f"--base: {arguments.base} cannot be measured: {last}")
            return saved.load(output)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=False, capture_output=True)


def _unlike(base: saved.Results, found: saved.Results) -> str:
    """Why the base's factors say little, or nothing, of these."""
    cases = [{(row["suite"], row["case"]) for row in results["rows"]} for results in (base, found)]
    if not cases[0] & cases[1]:
        return "it has none of these cases: there is nothing to compare"
    devices = [results["machine"]["device"] for results in (base, found)]
    return "" if devices[0] == devices[1] else f"it was measured on another machine, {devices[0]}"


def _without(given: list[str], *options: str) -> list[str]:
    kept, skip = [], False
    for word in given:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            kept.append(word)
    return kept


def print_rows(found: saved.Results, base: saved.Results | None = None) -> None:
    """A table for each case, and below what its columns mean."""
    console = wide_console()
    console.print(saved.told(found["machine"]))
    if unsteady := saved.unsteady_ceilings(found["machine"]):
        console.print(unsteady, style="italic")
    for row in found["rows"]:
        console.print(_table(row, base) if row["times"] else f"{row['suite']}: {row['case']}")
        for name, why in row["missing"].items():
            console.print(f"{name} is not here: {why}", style="italic")
        if unsteady := saved.unsteady(row):
            console.print(unsteady, style="italic")
        if row["failed"]:
            console.print(f"FAILED: {row['failed']}", style="bold")
    terms = saved.TERMS | ({"base": "what it said of ours against the same baseline"} if base else {})
    console.print("\n".join(f"{name}: {what}" for name, what in terms.items()), style="dim")


def _table(row: saved.Row, base: saved.Results | None) -> Table:
    table = Table(title=f"{row['suite']}: {row['case']}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for n, name in enumerate((*saved.COLUMNS, "base") if base else saved.COLUMNS):
        words = BREAKS.get(name)
        side = "left" if n == 0 else "right"
        table.add_column(name, justify=side, no_wrap=words is None, overflow="fold", min_width=words)
    for line in saved.lines(row):
        before = [_against(base, row, line)] if base else []
        table.add_row(*line.cells, *before, style="bold" if line.ours else None)
    return table


def _against(base: saved.Results, row: saved.Row, line: saved.Line) -> str:
    """The base's factor over the same baseline: a ratio within each run, which the machine's drift is out of."""
    other = next((r for r in base["rows"] if (r["suite"], r["case"]) == (row["suite"], row["case"])), None)
    before = None if other is None else saved.ratio(other, line.contestant)
    if before is None or line.times_faster is None:
        return ""
    return saved.faster(before) + (": less now" if line.times_faster < SLOWER * before else "")
