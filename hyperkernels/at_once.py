"""A product of a few rows, asked for again: to check, plan and dispatch it takes far longer than to compute it.

A call like one that was checked before, which nobody watches and whose plan comes to `native_cpu.FewRows`, goes
straight to that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperkernels.backends import native_cpu, plan_call
from hyperkernels.call import Call
from hyperkernels.form import checked, signature_of
from hyperkernels.planner import workspace_bytes
from hyperkernels.watched import alone

MOST_ROWS = 64  # of more, what is done here is no longer seen


def few_rows(
    x: Any, hidden: Any, head: Any, out_features: int | None, bias: Any, order: str | None, backend: str | None
) -> Tensor | None:
    """y of `hyper_linear` without ids or a head bias; None where it is to be had in the usual way."""
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return None
    factors = (x, hidden, head) if bias is None else (x, hidden, head, bias)
    for value in factors:
        if not isinstance(value, Tensor):
            return None
    lead = x.shape[:-1]
    if lead.numel() > MOST_ROWS or not x.is_cpu:
        return None
    settings = torch.get_num_threads(), workspace_bytes(), native_cpu.INSTRUCTIONS
    key = (signature_of(x, hidden, head, out_features, bias, None, None), order, backend, settings)
    if key not in _found:
        call = checked(key[0])
        if call is None:
            return None
        if len(_found) >= 4096:
            _found.clear()
        _found[key] = _find(call, order, backend, settings)
    found = _found[key]
    if found is None or not alone(*factors):
        return None
    for value in factors:
        if not value.is_contiguous():
            return None
    y = x.new_empty(*lead, found.features)
    workspace = native_cpu.workspace(found.workspace_bytes)
    found.native.run(
        *[value.data_ptr() for value in (x, hidden, head)],
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        found.rows,
        workspace.data_ptr(),
    )
    return y


class Found(NamedTuple):
    native: Any
    rows: int
    features: int
    workspace_bytes: int


_found: dict[Any, Found | None] = {}


def _find(call: Call, order: str | None, backend: str | None, settings: tuple[int, int, str]) -> Found | None:
    name, plan = plan_call(call, ("y",), order, backend)
    if name != "cpu" or not call.entries * call.tokens * call.width:
        return None
    run = native_cpu.runs(call, plan.wanted, plan.steps, True, True, *settings)[1][0]
    if not isinstance(run.native, native_cpu.FewRows):
        return None
    return Found(run.native, call.entries * call.tokens, call.grid.out_features, run.workspace_bytes)
