"""A product asked for again: to check, plan and dispatch a small one takes far longer than to compute it.

A call like one that was checked before, that nobody watches, goes straight to its backend, which may have a shorter way
for it (`Backend.again`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperkernels.backends import BACKENDS, Again, native_cpu, plan_call
from hyperkernels.call import Call
from hyperkernels.form import checked, signature_of
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.planner import workspace_bytes
from hyperkernels.watched import alone


def again(
    x: Any,
    hidden: Any,
    head: Any,
    out_features: int | None,
    bias: Any,
    head_bias: Any,
    order: str | None,
    backend: str | None,
) -> Tensor | None:
    """y of `hyper_linear` without ids; None where it is to be had in the usual way."""
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return None
    if isinstance(hidden, AdditiveHidden):
        factors = {"x": x, "hidden": hidden.context, "chunks": hidden.chunks, "head": head}
    else:
        factors = {"x": x, "hidden": hidden, "head": head}
    for value in factors.values():
        if not isinstance(value, Tensor):
            return None
    settings = torch.get_num_threads(), workspace_bytes(), native_cpu.INSTRUCTIONS
    key = (signature_of(x, hidden, head, out_features, bias, head_bias, None), order, backend, settings)
    if key not in _found:
        call = checked(key[0])
        if call is None:
            return None
        if len(_found) >= 4096:
            _found.clear()
        _found[key] = _find(call, order, backend, head_bias)
    found = _found[key]
    if found is None or not alone(*factors.values(), bias, head_bias):
        return None
    return found(factors, bias, head_bias)


def _find(call: Call, order: str | None, backend: str | None, head_bias: Tensor | None) -> Again | None:
    name, plan = plan_call(call, ("y",), order, backend)
    per_chunk = head_bias is not None and head_bias.dim() == 3
    summed = call.entries * call.tokens * call.width * call.contexts
    return BACKENDS[name].again(call, plan, head_bias is not None) if summed and not per_chunk else None


_found: dict[Any, Again | None] = {}
