"""`hyperkernels plot` and `report`: pictures and a page of saved results."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hyperkernels import cli

pytest.importorskip("rich", reason="the command line draws its tables with rich")
pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
pytest.importorskip("pydantic", reason="results are read with pydantic")

from hyperkernels.bench import command, page, plots, results


def test_plots_are_drawn_without_a_display(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DISPLAY", raising=False)
    assert cli.main(["plot", str(measured), "--output", str(tmp_path)]) == 0
    written = capsys.readouterr().out.split()
    assert {Path(name).name for name in written} >= {
        f"tiny-{n}.{k}" for n in ("speedup", "memory") for k in ("png", "svg")
    }
    assert all(Path(name).stat().st_size > 5000 for name in written)


def test_pictures_hold_what_was_measured(measured):
    found = results.load(measured)
    drawn = plots.figures(found)
    assert drawn.keys() == {"speedup", "roofline", "memory"}
    (axis,) = [axis for axis in drawn["memory"].axes if axis.get_visible()]
    ours = next(line for line in axis.lines if line.get_label() == "hyperkernels")
    rows = [row for row in found["rows"] if row["suite"] == "memory"]
    assert list(ours.get_xdata()) == [row["values"]["weights"] for row in rows]
    assert list(ours.get_ydata()) == pytest.approx([row["peak_mib"]["hyperkernels"] for row in rows], abs=1e-3)
    points = next(line for line in drawn["roofline"].axes[0].lines if line.get_label() == "hyperkernels")
    assert len(points.get_xdata()) == sum("hyperkernels" in row["bytes"] for row in found["rows"])
    (axis,) = [axis for axis in drawn["speedup"].axes if axis.get_visible() and axis.get_title() == "forward, 64x64"][
        :1
    ]
    curve = next(line for line in axis.lines if line.get_label() == "materialise")
    rows = [row for row in found["rows"] if row["suite"] == "linear"]
    assert list(curve.get_ydata()) == [results.ratio(row, "materialise") for row in rows]


def test_stars_lie_where_a_factor_passes_1(measured):
    found = results.load(measured)
    found["rows"] = [row for row in found["rows"] if row["suite"] == "linear"]
    factors = {"hyperkernels": (1.0, 1.0, 1.0), "dense": (0.5, 0.5, 2.0), "einsum": (0.5, 2.0, 0.5)}
    for n, row in enumerate(found["rows"]):
        row["times"] = {name: {"p20_ms": 1.0, "p50_ms": own[n], "p80_ms": 1.0} for name, own in factors.items()}
        row["flops"], row["bytes"] = {}, {}
    (axis,) = [axis for axis in plots.figures(found)["speedup"].axes if axis.get_visible()]
    stars = [line for line in axis.lines if line.get_marker() == "*"]
    assert [float(star.get_xdata()[0]) for star in stars] == pytest.approx([64.0, 4.0, 64.0])  # in logarithms
    assert [star.get_color() for star in stars] == [plots.STYLES[name][0] for name in ("dense", "einsum", "einsum")]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["dense", "einsum", "where it passes 1"]
    assert {text.get_bbox_patch() is None for text in axis.texts} == {False}
    axis.figure.canvas.draw()
    assert [text.get_text() for text in axis.get_yticklabels() if "$" in text.get_text()] == []
    assert "1" in [text.get_text() for text in axis.get_yticklabels()]


def test_pictures_without_ours_have_nothing_to_warn_of(measured):
    found = results.load(measured)
    for row in found["rows"]:
        for told in (row["times"], row["flops"], row["bytes"]):
            for name in told.keys() - {"einsum"}:
                told.pop(name, None)
    assert plots.figures(found).keys() <= {"memory"}


def test_weights_have_a_tick_at_each_size(measured):
    axis = plots.figures(results.load(measured))["memory"].axes[0]
    axis.figure.canvas.draw()
    assert [text.get_text() for text in axis.get_xticklabels()] == ["4k", "16k", "66k"]


def test_the_crossover_lies_between_the_batches_where_the_factor_passes_1():
    from hyperkernels.bench.plots import crossovers

    assert list(crossovers([(1, 0.5), (4, 2.0)])) == pytest.approx([2.0])
    assert list(crossovers([(1, 4.0), (16, 0.25)])) == pytest.approx([4.0])
    assert list(crossovers([(1, 0.5), (4, 2.0), (16, 0.5)])) == pytest.approx([2.0, 8.0])
    assert list(crossovers([(1, 0.5), (4, 1.0), (16, 2.0)])) == pytest.approx([4.0])
    assert list(crossovers([(1, 2.0), (4, 1.0), (16, 0.5)])) == pytest.approx([4.0])
    assert list(crossovers([(1, 2.0), (4, 3.0)])) == []


def test_the_report_needs_no_other_file(measured, tmp_path):
    path = tmp_path / "page.html"
    assert cli.main(["report", str(measured), "--output", str(path)]) == 0
    text = path.read_text()
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == text.count("<img") >= 3
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for data in pictures)
    assert not re.search(r"<script|<link|https?://", text)
    for row in results.load(measured)["rows"]:
        assert row["case"] in text
    assert "1 context of 4" in text
    assert "own FLOPs and bytes" in text


def test_unsteady_ceilings_are_said_in_the_terminal_and_in_the_report(measured, capsys):
    found = results.load(measured)
    for unsteady in (False, True):
        found["machine"]["ceilings"]["unsteady"] = unsteady
        command.print_rows(found)
        told = " ".join(capsys.readouterr().out.split())
        assert [("ceilings are unsteady" in text) for text in (told, page.page(found))] == [unsteady] * 2


@pytest.mark.skipif(not shutil.which("chromium") and not os.environ.get("CI"), reason="no chromium to look at it with")
def test_a_browser_finds_nothing_amiss_in_the_report(measured, tmp_path):
    path = tmp_path / "page.html"
    assert cli.main(["report", str(measured), "--output", str(path)]) == 0
    check = "<script>onload = () => { document.title = [...document.images].every(i => i.naturalWidth > 100) }</script>"
    path.write_text(path.read_text().replace("</body>", f"{check}</body>"))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    seen = subprocess.run([*browser, path.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    assert "<title>true</title>" in seen.stdout
    assert "CONSOLE" not in seen.stderr
