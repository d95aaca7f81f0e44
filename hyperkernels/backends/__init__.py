"""The backends, and the one table of who can do what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from hyperkernels.backends import reference, torch_matmul
from hyperkernels.planner import Call, Plan

Contract = Callable[[Call, Plan, dict[str, Tensor], Tensor | None, Tensor | None], Sequence[Tensor]]


class Backend(NamedTuple):
    """`supports(call, order)` answers `(ok, reason)`; `contract` runs a plan on canonical factors, and is None for
    the reference, which is written in differentiable torch and needs no engine."""

    supports: Callable[[Call, str | None], tuple[bool, str]]
    contract: Contract | None


BACKENDS: dict[str, Backend] = {
    "torch": Backend(torch_matmul.supports, torch_matmul.contract),
    "reference": Backend(reference.supports, None),
}
PREFERENCE = ("torch",)


def choose_backend(call: Call, order: str | None, backend: str | None) -> str:
    """The forced backend if it can do the call, else the first in `PREFERENCE` that can."""
    if backend is None:
        return next(name for name in PREFERENCE if BACKENDS[name].supports(call, order)[0])
    check_backend(backend)
    ok, reason = BACKENDS[backend].supports(call, order)
    if not ok:
        raise ValueError(f"backend: {backend!r} cannot do this call: {reason}")
    return backend


def check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted None or one of {', '.join(BACKENDS)}")
