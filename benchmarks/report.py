"""Tables and a plot from saved results: `make bench`, `make gpu` and `make readme` run it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

OURS = "hyperkernels"
CLOSE = 1.15  # an order picked that takes this much of the best one's time is picked well
MARKS = ("<!-- results: {} -->", "<!-- end of results: {} -->")  # by the name of the file
COLORS = {
    "dense-tuned": "0.6",
    "hypnettorch": "#e69f00",
    "grouped-conv": "#d55e00",
    "dense": "0.35",
    "dense, channels_last": "0.6",
    "materialise": "#d55e00",
    "einsum": "#56b4e9",
    "torch backend": "#009e73",
    "cpu, unfolded": "#009e73",
    OURS: "#0072b2",
    "triton": "#cc79a7",
}
LEFT_OUT = (
    "B=2048",
    "chunks 4x128",
    "16 tokens,",
    "GeneratedWeight",
    "fit a",
)  # of the README's table: `details` and the plot have every case


def cases_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    return results["cases"] if "cases" in results else [bench["extra_info"] for bench in results["benchmarks"]]


def engine(case: dict[str, Any]) -> str:
    """Which contestant of ours the case is about: the engine of a device, where there is one."""
    return "triton" if "triton" in case["times"] else OURS


def ratio(case: dict[str, Any], baseline: str) -> float:
    return case["times"][baseline]["p50_ms"] / case["times"][engine(case)]["p50_ms"]


def roof(case: dict[str, Any], results: dict[str, Any]) -> tuple[float, str]:
    """The least time in ms that the machine allows the case, and the name of what says so."""
    if "roofline_ms" in case:
        return case["roofline_ms"], "the plan's roofline"
    return case["flops"] / results["machine_info"]["ceilings"]["fma_gflop_per_s"] / 1e6, "the FMA peak"


def usual(case: dict[str, Any]) -> str:
    """The baseline that the case is about."""
    usual = ("hypnettorch", "grouped-conv", "dense, channels_last", "dense", "materialise")
    return next(name for name in (*usual, *case["times"]) if name in case["times"])


def verdicts(case: dict[str, Any], results: dict[str, Any]) -> list[tuple[str, bool]]:
    """Each factor that the case is meant to reach, and whether it does; in brackets, as many times faster as the roof
    allows."""
    found = []
    for baseline, factor in case.get("faster", {}).items():
        got = ratio(case, baseline)
        most = case["times"][baseline]["p50_ms"] / roof(case, results)[0]
        wanted = f"{got:.1f} times faster than {baseline}, wanted {factor:.3g} [{most:.1f}]"
        found.append((wanted, got >= factor))
    for baseline, factor in case.get("smaller", {}).items():
        theirs, ours = (case["peak_mib"][name] - case.get("result_mib", 0) for name in (baseline, engine(case)))
        got = theirs / ours
        found.append((f"{got:.0f} times less memory beside the result than {baseline}, wanted {factor}", got >= factor))
    if case.get("of_peak"):
        least, name = roof(case, results)
        got = least / case["times"][engine(case)]["p50_ms"]
        found.append((f"{got:.0%} of {name}, wanted {case['of_peak']:.0%}", got >= case["of_peak"]))
    if "process_limit_mib" in case:
        held, limit = case["process_peak_mib"], case["process_limit_mib"]
        found.append((f"{held:.0f} MiB of process memory, wanted under {limit}", held < limit))
    return found


def table(results: dict[str, Any]) -> str:
    """Without the columns in which no case has a figure."""
    head = (
        "work",
        "ms",
        "against",
        "times faster",
        "than weights formed",
        "than einsum",
        "than dense-tuned",
        "MiB, both",
    )
    rows = []
    for case in cases_of(results):
        if any(words in case["case"] for words in LEFT_OUT):
            continue
        if "times" not in case:
            cells = [case["case"], f"{1e3 * case['seconds']:.0f}", "40 GB of weights", "", "", "", ""]
            rows.append([*cells, f"{case['process_peak_mib']:.0f}, whole process"])
            continue
        baseline = usual(case)
        memory = f"{case['peak_mib'][OURS]:.1f} / {case['peak_mib'][baseline]:.1f}"
        cells = [case["case"], f"{case['times'][OURS]['p50_ms']:.2f}", baseline, f"**{ratio(case, baseline):.1f}**"]
        names = ("materialise", "einsum", "dense-tuned")
        others = [f"{ratio(case, name):.1f}" if name in case["times"] else "" for name in names]
        rows.append([*cells, *others, memory])
    machine = results["machine_info"]
    ceilings = machine["ceilings"]
    shown = [n for n in range(len(head)) if any(row[n] for row in rows)]
    lines = ["| " + " | ".join(row[n] for n in shown) + " |" for row in (head, ["---"] * len(head), *rows)]
    notes = {
        "than einsum": "; einsum is `torch.einsum` over the same three factors on opt_einsum's path",
        "than dense-tuned": "; dense-tuned is a dense layer by our own tiles, its weight packed beforehand",
    }
    lines += [
        "",
        f"{machine['device']}; fp32, p50 of interleaved rounds in one process; torch {machine['torch']}, "
        f"Python {machine['python']}; a large torch product runs at {ceilings['gflop_per_s']:.0f} GFLOP/s, "
        f"multiplications in registers at {ceilings['fma_gflop_per_s']:.0f}, a large copy at "
        f"{ceilings['gb_per_s']:.0f} GB/s. MiB are what a call holds at once beyond its inputs, its result included, "
        f"ours and theirs{''.join(note for name, note in notes.items() if head.index(name) in shown)}.",
    ]
    return "\n".join(lines)


def details(results: dict[str, Any]) -> str:
    """Every contestant: quantiles, memory, and the share of what the machine allows."""
    lines = []
    for case in cases_of(results):
        lines.append(case["case"])
        for name, times in case.get("times", {}).items():
            quantiles = "  ".join(f"{q} {times[f'{q}_ms']:8.3f}" for q in ("p20", "p50", "p80"))
            row = f"  {name:20} {quantiles} ms  {case['peak_mib'][name]:7.1f} MiB"
            if name == engine(case):
                least, of = roof(case, results)
                row += f"  {case['flops'] / times['p50_ms'] / 1e6:5.0f} GFLOP/s, {least / times['p50_ms']:.0%} of {of}"
            lines.append(row)
        lines += [f"  {'reached' if ok else 'MISSED'}: {what}" for what, ok in verdicts(case, results)]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib  # only to draw: tables are for machines without it too

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    cases = [case for case in cases_of(results) if "times" in case]
    figure, axes = plt.subplots(len(cases), 1, squeeze=False, figsize=(7, 1.3 * len(cases)), layout="constrained")
    for axis, case in zip(axes.flat, cases):
        names = list(case["times"])
        bars = axis.barh(
            names, [case["times"][name]["p50_ms"] for name in names], color=[COLORS.get(n, "0.8") for n in names]
        )
        axis.bar_label(bars, fmt="%.3g ms", padding=3, fontsize=8)
        axis.set_title(case["case"], fontsize=9, loc="left")
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.15)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=120)


def in_readme(readme: str, name: str, results: dict[str, Any], sweep: dict[str, Any]) -> str:
    """The README with the table of the file `name`, and how often the planner of `sweep` picks well."""
    begin, end = (mark.format(name) for mark in MARKS)
    before, rest = readme.split(begin)
    shapes = sweep["shapes"]
    close = sum(shape["of_best"] <= CLOSE for shape in shapes)
    readme = f"{before}{begin}\n{table(results)}\n{end}{rest.split(end)[1]}"
    worst = max(shape["of_best"] for shape in shapes)
    picks = rf"\1 {close} of {len(shapes)}\2 {worst:.1f}"
    return re.sub(r"(of the best in) \d+ of \d+(,\s+and\s+takes) [\d.]+", picks, readme)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python benchmarks/report.py benchmarks/results/cpu.json\n"
        "  python benchmarks/report.py benchmarks/results/cpu.json --readme README.md\n\n"
        "exit codes: 0, 1 if a case missed its factor, 2 for bad arguments",
    )
    parser.add_argument("results", type=Path, help="what `make bench` or `make gpu` saved")
    parser.add_argument(
        "--readme", type=Path, help="write the table between the marks of this file instead of plotting"
    )
    arguments = parser.parse_args()
    try:
        results = json.loads(arguments.results.read_text())
        text = details(results)
    except (OSError, ValueError, KeyError, StopIteration) as error:
        parser.error(f"{arguments.results}: not the results of a benchmark: {error!r}")
    if arguments.readme:
        sweep = json.loads(arguments.results.with_name("sweep.json").read_text())
        arguments.readme.write_text(in_readme(arguments.readme.read_text(), arguments.results.stem, results, sweep))
        return 0
    picture = arguments.results.with_suffix(".png")
    draw(results, picture)
    print(*([table(results)] if "benchmarks" in results else []), text, f"picture: {picture}", sep="\n\n")
    missed = [what for case in cases_of(results) for what, ok in verdicts(case, results) if not ok]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
