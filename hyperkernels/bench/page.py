"""`hyperkernels report`: saved results as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from hyperkernels.bench import files
from hyperkernels.bench import results as saved
from hyperkernels.bench.baselines import BASELINES
from hyperkernels.bench.plots import figures
from hyperkernels.bench.suites import SUITES

CAPTIONS = {
    "speedup": "How many times faster ours is, against the rows in a batch.",
    "roofline": "Each row under the machine's roof, by each contestant's own FLOPs and bytes.",
    "memory": "What a call holds at once, against how many weights its contexts have.",
    "scaling": "A training step against how many weights the layer has.",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
table { border-collapse: collapse; margin: .4rem 0 1.4rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
tr.ours { font-weight: 600; background: #eef5fb; }
tr.wrong, p.failed { color: #b00020; font-weight: 600; }
tr.missing { color: #666; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption { color: #444; }
.wide { overflow-x: auto; }
"""


def write_page(path: Path, output: Path) -> Path:
    results = saved.load(path)
    if not results["rows"]:
        raise saved.ResultsError(f"{path}: it has no rows: nothing was measured")
    files.write(output, page(results).encode())
    return output


def page(results: saved.Results) -> str:
    """The whole document."""
    machine = f"{saved.told(results['machine'])}; hyperkernels {results['machine']['hyperkernels']}"
    parts = [f"<p>{_text(machine)}</p>", f"<p><code>{_text(results['command'])}</code></p>"]
    if unsteady := saved.unsteady_ceilings(results["machine"]):
        parts.append(f"<p>{_text(unsteady)}.</p>")
    if not results["complete"]:
        parts.append("<p class=failed>Stopped before its end: these are the rows that were measured.</p>")
    for name, figure in figures(results).items():
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=110)
        source = base64.b64encode(data.getvalue()).decode()
        caption = _text(CAPTIONS[name])
        image = f'<img src="data:image/png;base64,{source}" alt="{caption}">'
        parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    for suite in dict.fromkeys(row["suite"] for row in results["rows"]):
        parts.append(f"<h2>{_text(suite)}</h2><p>{_text(SUITES.get(suite, ''))}.</p>")
        parts += [_table(row) for row in results["rows"] if row["suite"] == suite]
    parts.append(f"<h2>Columns</h2>{_terms(saved.TERMS)}")
    used = {name for row in results["rows"] for name in (*row["times"], *row["missing"])}
    parts.append(f"<h2>Baselines</h2>{_terms({n: what for n, what in BASELINES.items() if n in used})}")
    title = "hyperkernels, measured"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(parts)
    start = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n'
    return f"{start}<body><h1>{title}</h1>\n{body}\n</body></html>\n"


def _table(row: saved.Row) -> str:
    head = ["<tr>" + "".join(f"<th>{name}</th>" for name in saved.COLUMNS) + "</tr>"]
    lines = head if row["times"] else []
    for line in saved.lines(row):
        kind = "wrong" if line.verdict == "wrong" else "ours" if line.ours else ""
        lines.append(f'<tr class="{kind}">' + "".join(f"<td>{_text(cell)}</td>" for cell in line.cells) + "</tr>")
    for name, why in row["missing"].items():
        lines.append(f'<tr class="missing"><td>{_text(name)}</td><td colspan="8">not here: {_text(why)}</td></tr>')
    failed = f"<p class=failed>Failed: {_text(row['failed'])}</p>" if row["failed"] else ""
    unsteady = f"<p>{_text(saved.unsteady(row))}.</p>" if saved.unsteady(row) else ""
    return f'<h3>{_text(row["case"])}</h3>{failed}{unsteady}<div class="wide"><table>{"".join(lines)}</table></div>'


def _terms(terms: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(n)}</dt><dd>{_text(what)}.</dd>" for n, what in terms.items()) + "</dl>"


def _text(value: str) -> str:
    return html.escape(value)
