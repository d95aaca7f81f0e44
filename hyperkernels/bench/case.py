"""What is measured: one piece of work, whoever does it, and what makes a result right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hyperkernels.call import Call
from hyperkernels.testing import FLOOR, Error, error

OURS = "hyperkernels"
ENGINES = (OURS, "triton")  # the contestants that are ours
Contestants = dict[str, Callable[[], Any]]


class NotHere(Exception):
    """What was asked for leaves nothing to measure: the case's name, and why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name


@dataclass
class Case:
    """`contestants[OURS]` against the others, by name (`baselines.py`); `missing` says why one is not there.

    A contestant returns its results by name, or nothing where it is only timed. `exact` gives the same in fp64, perhaps
    of the first entries alone, and a result may be off by twice what that of `eager` is, plus the floor of its dtype.
    Where that would be too slow, or random, `proof` is another case of the same contestants that is judged instead.
    `parts` are contestants that do a part of the work, timed to show where the time goes. Of a contestant whose
    arithmetic torch's counters do not see, `counted` is a call that they see do the same.

    What the repository claims: `faster` and `smaller`, by what factor ours should beat a baseline in time and in peak
    memory; `of_peak`, what share of the FMA peak it should reach; `check` raises if ours is wrong otherwise.
    """

    name: str
    contestants: Contestants
    exact: Callable[[], dict[str, Tensor]] | None = None
    eager: str = "materialise"
    missing: dict[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    counted: Contestants = field(default_factory=dict)
    proof: Case | None = None
    call: Call | None = None
    outputs: tuple[str, ...] = ("y",)
    values: dict[str, Any] = field(default_factory=dict)  # what a plot has along its axes
    check: Callable[[], None] | None = None
    faster: dict[str, float] = field(default_factory=dict)
    smaller: dict[str, float] = field(default_factory=dict)
    of_peak: float | None = None


def claim(make: Callable[..., Case], *given: Any, faster: Any = None, smaller: Any = None, of_peak: Any = None, **more):
    """The case, once it is asked for, with what is claimed of it."""
    return lambda: replace(make(*given, **more), faster=faster or {}, smaller=smaller or {}, of_peak=of_peak)


@dataclass
class Verdict:
    """The larger of a contestant's errors over its results, and whether each is within what is allowed."""

    error: Error
    right: bool


def results_of(call: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor | None) -> dict[str, Tensor]:
    """y of (x, hidden, head) or (x, weight), and where dy is given the gradients by each."""
    with torch.set_grad_enabled(dy is not None):
        y = call(*leaves)
    if dy is None:
        return {"y": y}
    names = ("dx", "dhidden", "dhead") if len(leaves) == 3 else ("dx", "dweight")
    return {"y": y, **dict(zip(names, torch.autograd.grad(y, leaves, dy)))}


def judge(case: Case) -> tuple[dict[str, Verdict], dict[str, str]]:
    """Of each contestant that returns results, its errors against fp64; of each baseline that raises, what it said."""
    case = case.proof or case
    if case.exact is None:
        return {}, {}
    exact = case.exact()
    torch.manual_seed(0)
    eager = _first(case.contestants[case.eager](), exact)
    allowed = {name: error(value, exact[name]) for name, value in eager.items()}
    found, raised = {}, {}
    for name, run in case.contestants.items():
        try:
            results = run()
        except Exception as said:  # what is not ours may raise anything, a compiler's errors and a device's included
            if name in ENGINES:
                raise
            raised[name] = first_line(said)
            continue
        if name in ENGINES and eager.keys() - results.keys():
            raise ValueError(f"{name} gives no {', '.join(eager.keys() - results.keys())}")
        if isinstance(results, Mapping) and results.keys() & exact.keys():
            found[name] = _verdict(_first(results, exact), exact, allowed)
    return found, raised


def first_line(error: Exception) -> str:
    """What an exception says, in a line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _first(results: Mapping[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries that `exact` has."""
    return {name: v[: len(exact[name])] if v.dim() else v for name, v in results.items() if name in exact}


def _verdict(results: dict[str, Tensor], exact: dict[str, Tensor], allowed: dict[str, Error]) -> Verdict:
    errors, right = [], True
    for name, value in results.items():
        found, floor = error(value, exact[name]), FLOOR[value.dtype]
        mosts = allowed.get(name) or _largest(allowed.values())  # of the same work, laid out otherwise
        right = right and all(got <= 2 * most + floor for got, most in zip(found, mosts))
        errors.append(found)
    return Verdict(_largest(errors), right)


def _largest(errors: Iterable[Error]) -> Error:
    return Error(*(max(kind) for kind in zip(*errors)))


def assert_right(case: Case, engines: Sequence[str] = ENGINES) -> None:
    """That ours are, that every baseline runs, and whatever else the case checks."""
    verdicts, raised = judge(case)
    assert not raised, f"{case.name}: {raised}"
    for name, verdict in verdicts.items():
        assert verdict.right or name not in engines, f"{name}: error {verdict.error} against fp64 in {case.name}"
    if case.check is not None:
        case.check()
