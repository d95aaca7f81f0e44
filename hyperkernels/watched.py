"""Whether torch would do more with an operator than run it, or with an autograd Function than record it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


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
    """Whether torch would do more with the operator than run it: as `wrapped`, or for a profile."""
    return wrapped(*tensors) or torch.autograd.profiler._is_profiler_enabled


def wrapped(*tensors: Tensor | None) -> bool:
    """Whether there is more to the tensors than their numbers: a mode, a transform, a tracer, a subclass, another
    device, or a view that negates. What keeps derivatives is not meant: `derivatives.py` knows of them."""
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()
    for value in tensors:
        if value is not None:
            keys |= torch._C._dispatch_keys(value).raw_repr()
    return bool(keys & ~_UNSEEING)


def alone(*tensors: Tensor | None) -> bool:
    """Whether to compute is all there is to do: nobody will ask for a derivative, and nobody looks on."""
    return unrecorded(*tensors) and not watched(*tensors)


def unrecorded(*tensors: Tensor | None) -> bool:
    """Whether nobody will ask for a derivative: an autograd Function costs more than a small call."""
    recorded = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    return not (recorded or transformed())


def transformed() -> bool:
    """Whether the compiler, a transform of `torch.func` or forward mode looks on."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )
