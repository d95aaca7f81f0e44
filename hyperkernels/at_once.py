"""A product asked for again: to check, plan and dispatch a small one takes far longer than to compute it.

A call that nobody watches goes straight to its backend, which may have a shorter way for it (`Backend.again`); what it
takes to check and plan one is kept by all that it follows from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperkernels.backends import BACKENDS, Straight, native_cpu, plan_call
from hyperkernels.call import Call
from hyperkernels.form import canonical_form, checked, signature_of
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
    """y of `hyper_linear` without ids; None where it is to be had in the usual way.

    Raises what that does, of what is wrong.
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return None
    if isinstance(hidden, AdditiveHidden):
        factors = {"x": x, "hidden": hidden.context, "chunks": hidden.chunks, "head": head}
    else:
        factors = {"x": x, "hidden": hidden, "head": head}
    given = [*factors.values(), *[v for v in (bias, head_bias) if v is not None]]
    for value in given:
        if not isinstance(value, Tensor):
            return None
    if not alone(*given):
        return None
    settings = torch.get_num_threads(), workspace_bytes(), native_cpu.INSTRUCTIONS
    key = (signature_of(x, hidden, head, out_features, bias, head_bias, None), order, backend, settings)
    try:
        found = _found.get(key, _UNKNOWN)
    except TypeError:  # a size that is a symbol
        return None
    if found is _UNKNOWN:
        call = checked(key[0]) or canonical_form(x, hidden, head, out_features, bias, head_bias).call
        if len(_found) >= 4096:
            _found.clear()
        found = _found[key] = _find(call, order, backend, head_bias)
    return None if found is None else found(factors, bias, head_bias)


def _find(call: Call, order: str | None, backend: str | None, head_bias: Tensor | None) -> Straight | None:
    name, plan = plan_call(call, ("y",), order, backend)
    empty = not call.entries * call.tokens * call.width * call.contexts
    if empty or (head_bias is not None and head_bias.dim() == 3):  # each chunk's own
        return None
    return BACKENDS[name].again(call, plan, head_bias is not None)


_UNKNOWN: Any = object()
_found: dict[Any, Straight | None] = {}
