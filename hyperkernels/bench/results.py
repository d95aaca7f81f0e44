"""Saved results: written whole or not at all, and read with a plain word where they cannot be."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from hyperkernels.bench.case import ENGINES, OURS

FORMAT = 2
TERMS = {
    "ours is": "how many times as fast, by the medians of interleaved rounds",
    "roof": "the share of the least time that this machine's ceilings allow the work; above 100 % what a cache holds",
    "err": "off from fp64, of the largest and of the RMS value",
    "MiB": "what a call holds at once beyond its inputs, its result included",
}


class Machine(TypedDict):
    """`ceilings` is empty where the run was stopped before they were measured."""

    device: str
    torch: str
    python: str
    hyperkernels: str
    ceilings: dict[str, PositiveFloat]


class Values(TypedDict, total=False):
    """What a plot has along its axes."""

    N: int
    K: int
    chunk: list[int]
    m: int
    B: PositiveInt
    contexts: int
    weights: PositiveInt
    whose: str


class Times(TypedDict):
    p20_ms: PositiveFloat
    p50_ms: PositiveFloat
    p80_ms: PositiveFloat


class Deviation(TypedDict):
    """Of a contestant's results, from fp64."""

    max: float
    rms: float
    right: bool


class Row(TypedDict):
    """A case; what is told of its contestants is by their names. `missing` says why one is not there, `failed` why the
    case is no result; `parts` are contestants that do a part of the work."""

    suite: str
    case: str
    values: Values
    parts: list[str]
    missing: dict[str, str]
    failed: str | None
    rounds: int
    times: dict[str, Times]
    errors: dict[str, Deviation]
    peak_mib: dict[str, float]
    of_roofline: dict[str, float]
    flops: dict[str, int]
    bytes: dict[str, PositiveInt]


class Results(TypedDict):
    hyperkernels_bench: Literal[2]
    machine: Machine
    command: str
    complete: bool
    rows: list[Row]


class ResultsError(ValueError):
    """A file of results that cannot be read or written: one line that says what to do."""


def new(machine: Any, command: str) -> Any:
    return {"hyperkernels_bench": FORMAT, "machine": machine, "command": command, "complete": False, "rows": []}


def save(path: Path, results: Any) -> None:
    """Written beside the file and moved over it: what was there stays until all of the new is."""
    write(path, (json.dumps(results, indent=1) + "\n").encode())


class Line(NamedTuple):
    """One contestant of a row, for a table. `times_faster` is how many times faster ours is; of ours, and of a part of
    the work, there is none."""

    contestant: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    times_faster: float | None
    of_roofline: float | None
    max_error: float | None
    rms_error: float | None
    peak_mib: float
    verdict: str  # right, wrong, or nothing where it was not judged

    @property
    def ours(self) -> bool:
        return self.contestant in ENGINES


def lines(row: Row) -> list[Line]:
    found = []
    for name, times in row["times"].items():
        error = row["errors"].get(name)
        verdict = "" if error is None else "right" if error["right"] else "wrong"
        errors = (None, None) if error is None else (error["max"], error["rms"])
        factor, share = ratio(row, name), row["of_roofline"].get(name)
        quantiles = times["p20_ms"], times["p50_ms"], times["p80_ms"]
        found.append(Line(name, *quantiles, factor, share, *errors, row["peak_mib"].get(name, 0.0), verdict))
    return found


def faster(factor: float | None) -> str:
    """In words, how ours compares."""
    if factor is None:
        return ""
    return f"{factor:.2f}x faster" if factor >= 1 else f"{1 / factor:.2f}x slower"


def save_csv(path: Path, results: Results) -> None:
    """A line for each contestant of each row, for what is missing, and for a case that could not be measured."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["suite", "case", *Line._fields])
    blank = [""] * (len(Line._fields) - 2)
    for row in results["rows"]:
        start, found = [row["suite"], row["case"]], lines(row)
        if row["failed"]:
            verdict = f"failed: {row['failed']}"
            writer.writerows([*start, *line._replace(verdict=verdict)] for line in found if line.contestant == OURS)
            found = [line for line in found if line.contestant != OURS]
            if OURS not in row["times"]:
                writer.writerow([*start, OURS, *blank, verdict])
        writer.writerows([*start, *line] for line in found)
        writer.writerows([*start, name, *blank, f"not here: {why}"] for name, why in row["missing"].items())
    write(path, text.getvalue().encode())


def ratio(row: Row, name: str) -> float | None:
    """How many times faster ours is than a contestant, unless that is ours or does a part of the work."""
    ours, theirs = row["times"].get(OURS), row["times"].get(name)
    if ours is None or theirs is None or name == OURS or name in row["parts"]:
        return None
    return theirs["p50_ms"] / ours["p50_ms"]


def check_writable(path: Path) -> None:
    """Before anything is measured; what lies at the path stays as it is."""
    handle, part = _part(path)
    os.close(handle)
    Path(part).unlink()


def _part(path: Path) -> tuple[int, str]:
    if path.exists() and not path.is_file():
        raise ResultsError(f"{path}: is no file: give the path of one, which may not be there yet")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ResultsError(f"{path}: cannot write there ({error.strerror}): give another path") from None


def write(path: Path, data: bytes) -> None:
    handle, part = _part(path)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def load(path: Path) -> Results:
    """What `save` wrote, part by part as the types above have it."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ResultsError(
            f"{path}: cannot read it ({error.strerror}): `hyperkernels bench --quick --json {path}` makes one"
        ) from None
    except ValueError:
        raise ResultsError(f"{path}: it is cut short or no JSON: measure again, or give another file") from None
    if not isinstance(found, dict) or "hyperkernels_bench" not in found:
        raise ResultsError(f"{path}: no results of `hyperkernels bench`: give a file that its --json wrote")
    if found["hyperkernels_bench"] != FORMAT:
        version = found["hyperkernels_bench"]
        raise ResultsError(f"{path}: results of format {version}, this version reads {FORMAT}: measure again")
    try:
        return TypeAdapter(Results).validate_python(found, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ResultsError(f"{path}: it is damaged at {where} ({first['msg']}): measure again") from None
