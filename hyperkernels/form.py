"""The arguments of `hyper_linear`, checked against each other and brought to the engine's form."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperkernels.call import Call
from hyperkernels.chunking import Grid, ceil_div
from hyperkernels.hidden import AdditiveHidden


class Form(NamedTuple):
    """x `[L, T, K]`, hidden `[G, I, J, m]` or additive, context_ids `[L]`; in one dtype."""

    call: Call
    x: Tensor
    hidden: Tensor | AdditiveHidden
    head: Tensor
    ids: Tensor | None
    bias: Tensor | None
    head_bias: Tensor | None


def canonical_form(
    x: Tensor,
    hidden: Tensor | AdditiveHidden,
    head: Tensor,
    out_features: int | None = None,
    bias: Tensor | None = None,
    head_bias: Tensor | None = None,
    context_ids: Tensor | None = None,
) -> Form:
    """Raise what `hyper_linear` promises to raise, or return its arguments in the engine's form."""
    x, hidden, head = autocast(x, hidden, head)
    check_tensors(x, hidden, head)
    if x.dim() < 1:
        raise ValueError("x: got a scalar, wanted [*, K]")
    K, lead = x.shape[-1], x.shape[:-1]
    grid, hidden_shape = grid_of(hidden, head, out_features, K, "out_features")
    contexts, width = hidden_shape[0], hidden_shape[-1]
    ids = None
    if context_ids is not None:
        _check_ids(context_ids, x)
        ids = context_ids.reshape(-1).to(torch.int64)
        entries, tokens = ids.shape[0], prod(lead[context_ids.dim() :])
    elif contexts == 1:
        entries, tokens = 1, prod(lead)
    else:
        if not lead or lead[0] != contexts:
            raise ValueError(
                f"x: got shape {list(x.shape)}, wanted [{contexts}, *, {K}], an entry for each of hidden's "
                f"{contexts} contexts; or give context_ids"
            )
        entries, tokens = contexts, prod(lead[1:])
    activation = hidden.activation if isinstance(hidden, AdditiveHidden) else ""
    numbers = (width, contexts, entries, tokens, head.dim() == 4, ids is not None)
    call = Call(grid, *numbers, activation, x.dtype, x.device.type)
    if isinstance(hidden, Tensor):
        hidden = hidden.reshape(hidden_shape)
    bias, head_bias = autocast(bias, head_bias, kind=call.device)
    check_like("bias", bias, x, (grid.out_features,), (contexts, grid.out_features))
    check_head_bias(head_bias, grid, x)
    return Form(call, x.reshape(entries, tokens, K), hidden, head, ids, bias, head_bias)


def grid_of(
    hidden: Tensor | AdditiveHidden, head: Tensor, out_features: int | None, K: int, source: str
) -> tuple[Grid, tuple[int, int, int, int]]:
    """The grid that hidden, head and the extents agree on, and hidden's shape with its context dimension."""
    if head.dim() not in (3, 4):
        raise ValueError(f"head: got shape {list(head.shape)}, wanted [m, rows, cols] or [I*J, m, rows, cols]")
    shape = tuple(hidden.shape)
    if len(shape) not in (3, 4):
        raise ValueError(f"hidden: got shape {list(shape)}, wanted [I, J, m] or [G, I, J, m]")
    G, I, J, m = shape if len(shape) == 4 else (1, *shape)
    width, rows, cols = head.shape[-3:]
    if min(rows, cols) < 1 or min(I, J) < 1:
        raise ValueError(f"head: got shape {list(head.shape)} with hidden {list(shape)}, wanted at least one chunk")
    if width != m:
        raise ValueError(f"head: got width {width} in shape {list(head.shape)}, wanted hidden's width {m}")
    if head.dim() == 4 and head.shape[0] != I * J:
        raise ValueError(f"head: got {head.shape[0]} heads, wanted one or {I * J}, hidden's {I} x {J} chunks")
    N = I * rows if out_features is None else out_features
    for value in (N, K):
        if not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{source}: got {value!r}, wanted an integer")
    if ceil_div(K, cols) != J:
        what = f"x: got last size {K}" if source == "out_features" else f"shape: got {K} columns"
        raise ValueError(f"{what}, wanted {(J - 1) * cols + 1} to {J * cols}: hidden has {J} chunks of {cols} columns")
    if ceil_div(N, rows) != I:
        what = f"out_features: got {N}" if source == "out_features" else f"shape: got {N} rows"
        raise ValueError(f"{what}, wanted {(I - 1) * rows + 1} to {I * rows}: hidden has {I} chunks of {rows} rows")
    return Grid(N, K, rows, cols), (G, I, J, m)


def check_tensors(x: Tensor, hidden: Tensor | AdditiveHidden, head: Tensor) -> None:
    for name, value in (("x", x), ("hidden", hidden), ("head", head)):
        if not isinstance(value, Tensor) and not (name == "hidden" and isinstance(value, AdditiveHidden)):
            raise TypeError(f"{name}: got {type(value).__name__}, wanted a tensor")
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name}: got {value.dtype}, wanted a floating dtype")
        _check_dtype_and_device(name, value, x)


def _check_dtype_and_device(name: str, value: Tensor | AdditiveHidden, x: Tensor) -> None:
    if value.dtype != x.dtype:
        raise TypeError(f"{name}: got {value.dtype}, wanted x's dtype {x.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: on {value.device}, wanted x's device {x.device}")


def _check_ids(context_ids: Tensor, x: Tensor) -> None:
    if not isinstance(context_ids, Tensor) or context_ids.dtype not in (torch.int32, torch.int64):
        got = context_ids.dtype if isinstance(context_ids, Tensor) else type(context_ids).__name__
        raise TypeError(f"context_ids: got {got}, wanted an int32 or int64 tensor")
    depth = context_ids.dim()
    if depth == 0 or depth >= x.dim() or context_ids.shape != x.shape[:depth]:
        raise ValueError(
            f"context_ids: got shape {list(context_ids.shape)}, wanted leading dimensions of x {list(x.shape)}"
        )
    if context_ids.device != x.device:
        raise ValueError(f"context_ids: on {context_ids.device}, wanted x's device {x.device}")


def check_head_bias(head_bias: Tensor | None, grid: Grid, like: Tensor) -> None:
    chunk = (grid.rows, grid.cols)
    check_like("head_bias", head_bias, like, chunk, (grid.I * grid.J, *chunk))


def check_like(name: str, value: Tensor | None, like: Tensor, *shapes: tuple[int, ...]) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a tensor")
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{name}: got shape {list(value.shape)}, wanted {' or '.join(str(list(s)) for s in shapes)}")
    _check_dtype_and_device(name, value, like)


def autocast_enabled(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def autocast(*values: Any, kind: str | None = None) -> tuple[Any, ...]:
    """Under autocast every floating argument takes autocast's dtype, as `F.linear`'s do (fp64 stays). The device type
    `kind` is that of the first argument by default."""
    if kind is None:
        kind = values[0].device.type if isinstance(values[0], Tensor) else "cpu"
    if not autocast_enabled(kind):
        return values
    dtype = torch.get_autocast_dtype(kind)

    def cast(value: Any) -> Any:
        floating = isinstance(value, AdditiveHidden) or (isinstance(value, Tensor) and value.is_floating_point())
        return value.to(dtype) if floating and value.dtype not in (torch.float64, dtype) else value

    return tuple(cast(value) for value in values)
