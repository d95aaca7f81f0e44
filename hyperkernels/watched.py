"""Whether torch would do more with an operator than run it."""

from __future__ import annotations

import torch
from torch import Tensor


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in names:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


_UNSEEING = _keys(
    *("CPU", "CUDA", "BackendSelect", "ADInplaceOrView"),
    *("AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"),
)


def watched(*tensors: Tensor | None) -> bool:
    """Whether torch would do more with the operator than run it: for a mode, a transform, a tracer, a subclass, another
    device, a view that negates, or a profile. What keeps derivatives is not meant: `derivatives.py` knows of them."""
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()
    for value in tensors:
        if value is not None:
            keys |= torch._C._dispatch_keys(value).raw_repr()
    return bool(keys & ~_UNSEEING) or torch.autograd.profiler._is_profiler_enabled
