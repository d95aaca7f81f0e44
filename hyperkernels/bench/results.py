"""Saved results: written whole or not at all, and read with a plain word where they cannot be."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from pathlib import Path
from typing import Any

FORMAT = 1
FIELDS = ("suite", "case", "contestant", "p20_ms", "p50_ms", "p80_ms", "times_faster", "of_roofline", "peak_mib")

NEEDED = {"suite", "case", "values", "missing", "times", "errors", "peak_mib", "of_roofline", "failed"}


class ResultsError(ValueError):
    """A file of results that cannot be read or written: one line that says what to do."""


def new(machine: dict[str, Any], command: str) -> dict[str, Any]:
    return {"hyperkernels_bench": FORMAT, "machine": machine, "command": command, "complete": False, "rows": []}


def save(path: Path, results: dict[str, Any]) -> None:
    """Written beside the file and moved over it: what was there stays until all of the new is."""
    write(path, json.dumps(results, indent=1) + "\n")


def save_csv(path: Path, results: dict[str, Any]) -> None:
    """A line for each contestant of each row."""
    with tempfile.TemporaryFile("w+", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow([*FIELDS, "max_error", "rms_error", "verdict"])
        for row in results["rows"]:
            for name, times in row["times"].items():
                error = row["errors"].get(name, {})
                cells = [times["p20_ms"], times["p50_ms"], times["p80_ms"], ratio(row, name)]
                cells += [row["of_roofline"].get(name), row["peak_mib"].get(name), error.get("max"), error.get("rms")]
                verdict = "failed" if row["failed"] or error.get("right") is False else "right"
                writer.writerow([row["suite"], row["case"], name, *cells, verdict])
        lines.seek(0)
        write(path, lines.read())


def ratio(row: dict[str, Any], name: str) -> float | None:
    """How many times faster ours is than a contestant."""
    ours = row["times"].get("hyperkernels")
    return row["times"][name]["p50_ms"] / ours["p50_ms"] if ours and name in row["times"] else None


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


def write(path: Path, text: str) -> None:
    handle, part = _part(path)
    try:
        with os.fdopen(handle, "w", newline="") as file:
            file.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def load(path: Path) -> dict[str, Any]:
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
        there = all(row.keys() >= NEEDED for row in found["rows"]) and "ceilings" in found["machine"]
    except (AttributeError, KeyError, TypeError):
        there = False
    if not there:
        raise ResultsError(f"{path}: parts of it are missing: measure again, or give another file")
    return found
