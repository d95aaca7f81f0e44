"""The command line: `hyperkernels bench`, `plot`, `report`, `env`, `explain`, `advise`."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import hyperkernels as hk

EXIT_CODES = (
    "exit codes: 0; 1 if a row failed, or nothing was measured, finished or kept; 2 for bad arguments, files that "
    "cannot be read, or what is not installed"
)
RESULTS, PAGE = Path("hyperkernels-bench.json"), Path("hyperkernels-bench.html")
JSON_HELP = f"results, kept as they come: the first row replaces what was there ({RESULTS})"


class UsageError(Exception):
    """One line that says what to do."""


class Parser(argparse.ArgumentParser):
    """Says what it cannot read in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def needs(*modules: str) -> None:
    absent = [name for name in modules if find_spec(name) is None]
    if absent:
        raise UsageError(f"{', '.join(absent)}: not installed; `pip install 'hyperkernels[bench]'` brings it")


def pair_of(wanted: str, what: str) -> Callable[[str], tuple[int, int]]:
    """A parser of two positive numbers with an x between."""

    def parse(text: str) -> tuple[int, int]:
        try:
            first, second = (int(part) for part in text.lower().split("x"))
            if min(first, second) < 1:
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {wanted}, {what}") from None
        return first, second

    return parse


shape_of = pair_of("NxK", "out and in features, such as 4096x4096")
chunk_of = pair_of("RxC", "rows and columns of a chunk, such as 16x256")


def positive(text: str) -> int:
    try:
        value = int(text)
        if value < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a positive integer") from None
    return value


def file_of(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("got '', wanted a file")
    return Path(text)


def _bench(arguments: argparse.Namespace) -> int:
    needs("rich", "pydantic")
    if arguments.calibrate:
        needs("matplotlib")
        from hyperkernels.bench.calibrate import calibrate

        others = [word for word in arguments.given[1:] if word != "--calibrate"]
        if others:
            raise UsageError(
                f"--calibrate: got {' '.join(others)} beside it, wanted nothing: it measures its own calls"
            )
        return calibrate()
    from hyperkernels.bench.command import bench

    return bench(arguments)


def _plot(arguments: argparse.Namespace) -> int:
    needs("matplotlib", "pydantic")
    from hyperkernels.bench.plots import plot

    for path in plot(arguments.results, arguments.output, arguments.format):
        print(path)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    needs("matplotlib", "pydantic")
    from hyperkernels.bench.page import write_page

    print(write_page(arguments.results, arguments.output))
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from hyperkernels.environment import environment

    found = environment()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    needs("rich")
    from rich.table import Table

    from hyperkernels.tables import wide_console

    for title, values in found.items():
        table = Table(title=title, show_header=False, title_justify="left", min_width=60)
        for name, value in values.items():
            table.add_row(name, str(value))
        wide_console().print(table)
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    import torch

    from hyperkernels.bench.suites import DTYPES, WIDTH
    from hyperkernels.planner import default_chunk

    (N, K), m = arguments.shape, arguments.width or WIDTH
    chunk = arguments.chunk or default_chunk(N, K, m)
    I, J, G = -(-N // chunk[0]), -(-K // chunk[1]), arguments.contexts
    tokens = arguments.tokens or G
    if tokens % G:
        raise UsageError(f"--tokens: got {tokens}, wanted as many for each of {G} contexts: a multiple of {G}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: torch sees no CUDA device here; leave it out for the plan on a CPU")
    like: dict[str, Any] = {"device": arguments.device, "dtype": DTYPES[arguments.dtype]}
    lead = (tokens,) if G == 1 else (G, tokens // G)
    x, head = torch.empty(*lead, K, **like), torch.empty(m, *chunk, **like)
    hidden: Any = torch.empty(I, J, m, **like)
    if G > 1:
        hidden = hk.AdditiveHidden(torch.empty(G, m, **like), hidden, "tanh")
    with contextlib.redirect_stdout(io.StringIO()):
        found = hk.explain(
            *(hk.hyper_linear, x, hidden, head),
            **{"out_features": N, "order": arguments.order, "backend": arguments.backend},
        )
    if arguments.json:
        rows = [row._asdict() for row in found.weighed]
        told = {"backend": found.backend, "ruled_out": found.ruled_out, "chunk": chunk, "plans": rows}
        print(json.dumps(told, indent=1))
        return 0
    needs("rich")
    from hyperkernels.explaining import COLUMNS
    from hyperkernels.tables import print_table

    print("\n".join(found.words))
    if found.weighed:
        print_table(COLUMNS, [row.cells for row in found.weighed], bold=[row.picked for row in found.weighed])
    return 0


def _advise(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    given = {name: getattr(arguments, name) for name in ("contexts", "budget", "device")}
    given["tokens"] = arguments.tokens or arguments.contexts
    advice = hk.advise(arguments.shape, **given)
    rows = [asdict(proposal) for proposal in advice.proposals]
    if arguments.json:
        print(json.dumps({"proposals": rows, "words": advice.words}, indent=1))
        return 0
    needs("rich")
    from hyperkernels.advising import COLUMNS
    from hyperkernels.tables import print_table

    if rows:
        print_table(COLUMNS, [proposal.cells for proposal in advice.proposals])
    print(advice.words)
    return 0


def parser() -> argparse.ArgumentParser:
    from hyperkernels import calibration
    from hyperkernels.backends import BACKENDS
    from hyperkernels.bench.suites import DTYPES, SUITES
    from hyperkernels.call import ORDERS

    whole = Parser(
        allow_abbrev=False,
        prog="hyperkernels",
        description="Hypernetworks whose weights are never formed: measure them here, and see what would run.",
        epilog=f"examples:\n  hyperkernels bench --quick\n  hyperkernels report\n  hyperkernels env\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=hk.__version__)
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Any, what: str, *examples: str, more: str = "") -> Parser:
        found = commands.add_parser(
            name,
            allow_abbrev=False,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.{more}",
            epilog="examples:\n"
            + "\n".join(f"  hyperkernels {name} {e}".rstrip() for e in examples)
            + f"\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        found.set_defaults(run=run)
        return found

    suites = "\n".join(f"  {name:11} {what}" for name, what in SUITES.items())
    bench = command(
        *("bench", _bench, "measure the suites on this machine, beside their baselines"),
        *("--quick", "linear decode --shape 4096x4096", "contexts --backend torch --json out/contexts.json"),
        *("--quick --base HEAD~1", "--calibrate"),
        more=f"\n\nsuites:\n{suites}\n\nEvery time stands beside its error against fp64: a row that is wrong "
        "has failed, however fast.\nRounds are interleaved. Ctrl-C keeps what was measured.",
    )
    bench.add_argument("suites", nargs="*", metavar="suite", help="which to run; all by default")
    bench.add_argument("--quick", action="store_true", help="small shapes, few rounds: under two minutes on two cores")
    bench.add_argument("--shape", type=shape_of, action="append", default=[], metavar="NxK", help="this layer instead")
    bench.add_argument("--dtype", choices=DTYPES, default="fp32")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    bench.add_argument("--backend", choices=tuple(BACKENDS), help="force ours to it")
    bench.add_argument("--order", choices=ORDERS, help="force ours to it")
    bench.add_argument("--rounds", type=positive, help="of each case (15; 5 with --quick)")
    bench.add_argument("--threads", type=positive, help="of torch; as torch would by default")
    bench.add_argument("--base", metavar="REF", help="compare with a commit, measured here too, or with a results file")
    bench.add_argument("--json", type=file_of, default=RESULTS, metavar="FILE", help=JSON_HELP)
    bench.add_argument("--csv", type=file_of, metavar="FILE", help="a line for each contestant, too")
    bench.add_argument(
        *("--calibrate",),
        action="store_true",
        help="fit the planner's constants to this machine in a minute, or in some where it is busy, draw how well they "
        f"do here, and keep both in {calibration.path() or 'the cache folder of a user who has a home'}; "
        "delete that file to go back",
    )
    plot = command(
        *("plot", _plot, "draw saved results: speed-up, roofline, memory, scaling"),
        *("", "out/contexts.json --output out/plots --format svg"),
    )
    page = command(
        *("report", _report, "write saved results as one HTML file, tables and plots in it"),
        *("", "out/contexts.json --output out/contexts.html"),
    )
    for each in (plot, page):
        each.add_argument("results", type=file_of, nargs="?", default=RESULTS, help=f"what bench saved ({RESULTS})")
    plot.add_argument("--output", type=Path, default=Path("."), help="folder for the pictures (here)")
    plot.add_argument("--format", choices=("png", "svg", "both"), default="both")
    page.add_argument("--output", type=file_of, default=PAGE, help=f"({PAGE})")

    env = command(
        "env", _env, "show versions, CPU features, GPUs, and which backends are there or why not", "", "--json"
    )
    explain = command(
        *("explain", _explain, "show what a layer would run, and what else was weighed"),
        *("4096x4096 --tokens 256", "1024x1024 --contexts 64 --tokens 64 --json"),
    )
    advise = command(
        *("advise", _advise, "propose how to generate a layer, and say when a plain one does better"),
        *("4096x4096", "1024x1024 --contexts 64 --tokens 64 --budget 500000"),
    )
    for each in (explain, advise):
        each.add_argument("shape", type=shape_of, metavar="NxK")
        each.add_argument("--contexts", type=positive, default=1, help="weights at a time (1)")
        each.add_argument("--tokens", type=positive, help="rows of x in all (one for each context)")
        each.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    explain.add_argument("--chunk", type=chunk_of, metavar="RxC", help="the planner's by default")
    explain.add_argument("--width", type=positive, help="m (32)")
    explain.add_argument("--dtype", choices=DTYPES, default="fp32")
    explain.add_argument("--order", choices=ORDERS)
    explain.add_argument("--backend", choices=tuple(BACKENDS))
    advise.add_argument("--budget", type=positive, help="the most parameters")
    for each in (env, explain, advise):
        each.add_argument("--json", action="store_true", help="for programs")
    return whole


def main(given: Sequence[str] | None = None) -> int:
    whole = parser()
    arguments = whole.parse_args(given)
    arguments.given = list(sys.argv[1:] if given is None else given)
    try:
        return arguments.run(arguments)
    except (UsageError, ValueError, OSError) as error:
        print(f"hyperkernels {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hyperkernels {arguments.command}: stopped", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
