"""`hyperkernels plot`: pictures of saved results. Lines differ in dash and marker too, for eyes that see grey."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hyperkernels.bench import files
from hyperkernels.bench import results as saved
from hyperkernels.bench.case import OURS
from hyperkernels.bench.measure import peak_gflop_per_s

# Okabe and Ito's colours, of which no two look alike to the colour-blind, with a marker and a dash for each.
STYLES: dict[str, tuple[str, str, Any]] = {
    OURS: ("#0072B2", "o", "-"),
    "triton": ("#CC79A7", "P", (0, (6, 1))),
    "dense": ("#000000", "s", "--"),
    "materialise": ("#D55E00", "^", "-."),
    "einsum": ("#56B4E9", "v", ":"),
    "dense-tuned": ("#999999", "D", (0, (5, 2))),
    "dense-onednn": ("#666666", "*", (0, (1, 1))),
    "dense, channels_last": ("#666666", "H", "--"),
    "materialise-compiled": ("#E69F00", "<", (0, (3, 1, 1, 1))),
    "fastkron": ("#009E73", ">", (0, (1, 2))),
    "hypnettorch": ("#E69F00", "X", (0, (4, 1, 1, 1))),
    "hyperlight": ("#009E73", "d", (0, (2, 1))),
    "grouped-conv": ("#F0E442", "h", "--"),
    "torch backend": ("#56B4E9", "p", (0, (3, 2))),
}


PASSES = "where it passes 1"
BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
LABEL: Any = {"textcoords": "offset points", "xytext": (7, 7), "fontsize": 8, "bbox": BOX}
PLACED = (OURS, "dense", "materialise", "triton")  # under the roof: the others' points lie on these


def _style(name: str) -> dict[str, Any]:
    color, marker, dash = STYLES.get(name, ("#666666", ".", "-"))
    return {"color": color, "marker": marker, "linestyle": dash, "label": name, "markersize": 5}


def figures(results: saved.Results) -> dict[str, Any]:
    """The pictures that these results have data for, by name."""
    found = {}
    for name, make in _FIGURES.items():
        figure = make(results)
        if figure is not None:
            found[name] = figure
    return found


def plot(path: Path, folder: Path, wanted: str) -> list[Path]:
    """Write each picture as `<results>-<picture>.png`, `.svg` or both."""
    results = saved.load(path)
    made = figures(results)
    if not made:
        raise files.ResultsError(f"{path}: no row that can be drawn: measure first (`hyperkernels bench`)")
    written = []
    for name, figure in made.items():
        for kind in ("png", "svg") if wanted == "both" else (wanted,):
            target = folder / f"{path.stem}-{name}.{kind}"
            data = io.BytesIO()
            figure.savefig(data, format=kind, dpi=130)
            files.write(target, data.getvalue())
            written.append(target)
    return written


def crossovers(points: Sequence[tuple[float, Any]]) -> Iterator[float]:
    """Where the factor, between two measured batch sizes, passes 1: on the line between them, in logarithms."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if (y0 < 1) != (y1 < 1):
            share = math.log(y0) / (math.log(y0) - math.log(y1))
            yield math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0)))


def _good(results: saved.Results, *suites: str) -> list[saved.Row]:
    return [row for row in results["rows"] if row["suite"] in suites and not row["failed"] and row["times"]]


def _along(row: saved.Row, name: str) -> Any:
    """Where on a plot's axis it lies."""
    return row["values"].get(name)


def canvas(count: int) -> tuple[Any, list[Any]]:
    """A figure of `count` axes, which needs no display."""
    import matplotlib

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a font that is missing has a substitute
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.5 * columns, 3.8 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    plt.close(figure)  # it is kept by whoever asked for it
    return figure, list(axes.flat[:count])


def _speedup(results: saved.Results) -> Any:
    """How many times faster ours is, against batch size, for each layer that has more than one."""
    groups: dict[tuple[Any, ...], list[saved.Row]] = {}
    for row in _good(results, "linear", "decode", "contexts", "train-step"):
        values: Any = row["values"]
        compared = any(saved.ratio(row, name) for name in row["times"])
        if compared and {"N", "B"} <= values.keys() and "convolution" not in row["case"]:
            what = row["case"].split(",")[0] + values.get("whose", "")
            groups.setdefault((row["suite"], what, values["N"], values["K"]), []).append(row)
    groups = {key: rows for key, rows in groups.items() if len({_along(row, "B") for row in rows}) > 1}
    if not groups:
        return None
    from matplotlib.ticker import LogLocator

    figure, axes = canvas(len(groups))
    for axis, ((_, what, N, K), rows) in zip(axes, groups.items()):
        rows.sort(key=lambda row: _along(row, "B"))
        stars = []
        for name in dict.fromkeys(name for row in rows for name in row["times"] if saved.ratio(row, name)):
            points = [(_along(row, "B"), saved.ratio(row, name)) for row in rows if saved.ratio(row, name)]
            axis.plot(*zip(*points), **_style(name))
            stars += [(where, _style(name)["color"]) for where in crossovers(points)]
        axis.axhline(1, color="0.3", linewidth=1)
        for n, (where, color) in enumerate(stars):
            star: Any = {"color": color, "markeredgecolor": "black", "linestyle": "", "label": PASSES * (n == 0)}
            axis.plot([where], [1], marker="*", markersize=13, zorder=3, **star)
            axis.annotate(f"B = {where:.0f}", (where, 1), zorder=4, **LABEL)
        axis.set(xscale="log", yscale="log", xlabel="rows in the batch", ylabel="ours, times as fast")
        sizes = sorted({_along(row, "B") for row in rows})
        axis.set_xticks(sizes, map(str, sizes))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_title(f"{what}, {N}x{K}", fontsize=10)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    return figure


def _roofline(results: saved.Results) -> Any:
    """GFLOP/s against FLOPs per byte that must be moved, under the machine's own roof."""
    rows = [
        row for row in _good(results, *{row["suite"] for row in results["rows"]}) if {*PLACED} & row["bytes"].keys()
    ]
    ceilings: Any = results["machine"]["ceilings"]
    if not rows:
        return None
    figure, (axis,) = canvas(1)
    peak = peak_gflop_per_s(ceilings)
    low, high = 1e-1, 1e4
    knee = peak / ceilings["gb_per_s"]
    axis.plot([low, knee, high], [low * ceilings["gb_per_s"], peak, peak], color="black", linewidth=1.5)
    axis.annotate(f"{peak:.0f} GFLOP/s", (high, peak), ha="right", va="bottom", fontsize=8)
    axis.annotate(f"{ceilings['gb_per_s']:.0f} GB/s", (low, low * ceilings["gb_per_s"]), va="bottom", fontsize=8)
    for name in PLACED:
        points = [
            (row["flops"][name] / row["bytes"][name], row["flops"][name] / row["times"][name]["p50_ms"] / 1e6)
            for row in rows
            if row["bytes"].get(name)
        ]
        if points:
            axis.plot(*zip(*points), **{**_style(name), "linestyle": ""})
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per compulsory byte", ylabel="GFLOP/s")
    axis.set_title("each row under the machine's roof; above it, what stays in a cache", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _against_weights(results: saved.Results, suite: str, what: list[tuple[str, Callable[[Any, str], Any]]]) -> Any:
    rows = sorted(
        (row for row in _good(results, suite) if "weights" in row["values"]), key=lambda row: _along(row, "weights")
    )
    if len({_along(row, "weights") for row in rows}) < 2:
        return None
    from matplotlib.ticker import EngFormatter

    figure, axes = canvas(len(what))
    for axis, (label, value) in zip(axes, what):
        for name in dict.fromkeys(name for row in rows for name in row["times"]):
            points = [(_along(row, "weights"), value(row, name)) for row in rows if name in row["times"]]
            axis.plot(*zip(*[(x, max(y, 1e-3)) for x, y in points]), **_style(name))
        axis.set(xscale="log", yscale="log", xlabel="generated weights", ylabel=label)
        axis.set_xticks(sorted({_along(row, "weights") for row in rows}))
        axis.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    return figure


def _memory_of(row: saved.Row, name: str) -> float:
    return row["peak_mib"].get(name, 0.0)


def _ms_of(row: saved.Row, name: str) -> float:
    return row["times"][name]["p50_ms"]


_FIGURES: dict[str, Callable[[saved.Results], Any]] = {
    "speedup": _speedup,
    "roofline": _roofline,
    "memory": lambda results: _against_weights(results, "memory", [("peak memory of a call, MiB", _memory_of)]),
    "scaling": lambda results: _against_weights(
        results, "scaling", [("forward and backward, ms", _ms_of), ("peak memory, MiB", _memory_of)]
    ),
}
