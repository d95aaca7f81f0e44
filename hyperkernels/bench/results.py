"""What is saved of a run, told part by part; it is read with a plain word where it cannot be."""

from __future__ import annotations

import csv
import io
import json
from math import inf
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from hyperkernels.bench.case import ENGINES, OURS
from hyperkernels.bench.files import ResultsError, write
from hyperkernels.bench.measure import UNSTEADY, Quantiles

FORMAT = 2
TERMS = {
    "ours is": "how many times as fast, by the medians of interleaved rounds",
    "roof": "the share of the least time that this machine's ceilings allow the contestant's own FLOPs and bytes; "
    "above 100 % what a cache holds",
    "err": "off from fp64, of the largest and of the RMS value",
    "MiB": "what a call holds at once beyond its inputs, its result included",
}


class Ceilings(TypedDict):
    """What `measure.ceilings` finds; FMAs on a CPU with the native engine."""

    gflop_per_s: PositiveFloat
    gb_per_s: PositiveFloat
    fma_gflop_per_s: NotRequired[PositiveFloat]
    unsteady: NotRequired[bool]


class Machine(TypedDict):
    device: str
    torch: str
    python: str
    hyperkernels: str
    ceilings: Ceilings


RATES = {
    "gflop_per_s": "a large product {:.0f} GFLOP/s",
    "fma_gflop_per_s": "multiplications in registers {:.0f} GFLOP/s",
    "gb_per_s": "a large copy {:.0f} GB/s",
}
BUSY = "Is the machine busy? With OMP_WAIT_POLICY=passive, threads that wait leave it to others"
COLUMNS = ("", "p20 ms", "p50 ms", "p80 ms", "ours is", "roof", "max err", "RMS err", "MiB")


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


Off = Annotated[float, BeforeValidator(lambda value: inf if value is None else value)]


class Deviation(TypedDict):
    """Of a contestant's results, from fp64; what is not finite is saved as null."""

    max: Off
    rms: Off
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
    hyperkernels_bench: int
    machine: Machine
    command: str
    complete: bool
    rows: list[Row]


def new(machine: Any, command: str) -> Any:
    return {"hyperkernels_bench": FORMAT, "machine": machine, "command": command, "complete": False, "rows": []}


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

    @property
    def cells(self) -> list[str]:
        """For people, by COLUMNS."""
        who = f"{self.contestant}, wrong" if self.verdict == "wrong" else self.contestant
        share = "" if self.of_roofline is None else f"{self.of_roofline:.0%}"
        errors = ["" if off is None else f"{off:.0e}" for off in (self.max_error, self.rms_error)]
        times = [f"{value:.3g}" for value in (self.p20_ms, self.p50_ms, self.p80_ms)]
        return [who, *times, faster(self.times_faster), share, *errors, f"{self.peak_mib:.1f}"]


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


def unsteady(row: Row) -> str:
    """In words, whose times were so far apart that something else must have run; nothing where they were not."""
    names = [name for name, times in row["times"].items() if not Quantiles(**times).steady]
    if not names:
        return ""
    return f"unsteady: {', '.join(names)}: p80 is over {UNSTEADY} times p20. {BUSY}"


def unsteady_ceilings(machine: Machine) -> str:
    """In words, that the machine was disturbed while its ceilings were measured; nothing where it was not."""
    if not machine["ceilings"].get("unsteady"):
        return ""
    return f"the ceilings are unsteady, and so is every share of the roof. {BUSY}"


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
    """How many times faster ours is than a contestant, unless that is ours, is wrong or does a part of the work."""
    ours, theirs = row["times"].get(OURS), row["times"].get(name)
    wrong = name in row["errors"] and not row["errors"][name]["right"]
    if ours is None or theirs is None or name == OURS or wrong or name in row["parts"]:
        return None
    return theirs["p50_ms"] / ours["p50_ms"]


def load(path: Path) -> Results:
    """What `save` wrote, part by part as the types above have it."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ResultsError(f"{path}: is not there: `hyperkernels bench --quick --json {path}` makes one") from None
    except OSError as error:
        raise ResultsError(f"{path}: cannot read it ({error.strerror}): give a file that you may read") from None
    except ValueError:
        raise ResultsError(f"{path}: it is cut short or no JSON: measure again, or give another file") from None
    if not isinstance(found, dict) or "hyperkernels_bench" not in found:
        raise ResultsError(f"{path}: no results of `hyperkernels bench`: give a file that its --json wrote")
    if found["hyperkernels_bench"] != FORMAT:
        version = found["hyperkernels_bench"]
        raise ResultsError(f"{path}: results of format {version}, this version reads {FORMAT}: measure again")
    try:
        results = TypeAdapter(Results).validate_python(found, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ResultsError(f"{path}: it is damaged at {where} ({first['msg']}): measure again") from None
    for row in results["rows"]:
        if not row["flops"].keys() == row["bytes"].keys() <= row["times"].keys():
            raise ResultsError(f"{path}: it is damaged: {row['case']} has FLOPs or bytes without a time: measure again")
    return results


def told(machine: Machine) -> str:
    """The machine in a line."""
    ceilings: Any = machine["ceilings"]
    rates = [words.format(ceilings[name]) for name, words in RATES.items() if name in ceilings]
    return "; ".join([machine["device"], f"torch {machine['torch']}", f"Python {machine['python']}", *rates])
