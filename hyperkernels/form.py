"""The arguments of `hyper_linear`, checked against each other and brought to the engine's form."""

from __future__ import annotations

from collections.abc import Sequence
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
    x, hidden, head, bias, head_bias = autocast(x, hidden, head, bias, head_bias)
    given = (x, hidden, head, out_features, bias, head_bias, context_ids)
    call = signature = None
    if not torch.compiler.is_compiling():
        try:
            signature = signature_of(*given)
            call = checked(signature)
        except (AttributeError, TypeError):  # not even tensors, or their sizes are symbols
            signature = None
    if call is None:
        call = _check(*given)
        if signature is not None:
            if len(_checked) >= 4096:
                _checked.clear()
            _checked[signature] = call
    if isinstance(hidden, Tensor) and hidden.dim() == 3:
        hidden = hidden.unsqueeze(0)
    ids = None if context_ids is None else context_ids.reshape(-1).to(torch.int64)
    return Form(call, shaped(x, (call.entries, call.tokens, x.shape[-1])), hidden, head, ids, bias, head_bias)


def shaped(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`value.reshape(shape)`, not asked of torch where it is so already."""
    return value if value.shape == shape else value.reshape(shape)


_checked: dict[Any, Call] = {}  # what was checked once need not be again, where it follows from shapes, dtypes, devices


def checked(signature: tuple[Any, ...]) -> Call | None:
    return _checked.get(signature)


def signature_of(x: Any, hidden: Any, head: Any, out_features: Any, *others: Any) -> tuple[Any, ...]:
    if isinstance(hidden, AdditiveHidden):
        parts, activation = (x, hidden.context, hidden.chunks, head, *others), hidden.activation
    else:
        parts, activation = (x, hidden, head, *others), None
    return (
        activation,
        out_features,
        type(out_features),
        *[None if v is None else (v.shape, v.dtype, v.device) for v in parts],
    )


def _check(
    x: Tensor,
    hidden: Tensor | AdditiveHidden,
    head: Tensor,
    out_features: int | None,
    bias: Tensor | None,
    head_bias: Tensor | None,
    context_ids: Tensor | None,
) -> Call:
    check_tensors(x, hidden, head)
    if x.dim() < 1:
        raise ValueError("x: got a scalar, wanted [*, K]")
    if out_features is not None:
        check_whole("out_features", out_features)
    by_ids = None
    if context_ids is not None:
        check_ids(context_ids, x, x.dim() - 1)
        by_ids = context_ids.dim()
    activation = hidden.activation if isinstance(hidden, AdditiveHidden) else ""
    shapes = tuple(x.shape), tuple(hidden.shape), tuple(head.shape)
    call = _find_call(*shapes, out_features, by_ids, activation, x.dtype, x.device.type)
    check_like("bias", bias, x, (call.grid.out_features,), (call.contexts, call.grid.out_features))
    check_head_bias(head_bias, call.grid, x)
    return call


def _find_call(
    x: tuple[int, ...],
    hidden: tuple[int, ...],
    head: tuple[int, ...],
    out_features: int | None,
    by_ids: int | None,
    activation: str,
    dtype: torch.dtype,
    device: str,
) -> Call:
    """From the shapes of x, hidden and head; `by_ids` is how many of x's dimensions `context_ids` has."""
    K, lead = x[-1], x[:-1]
    grid, (contexts, _, _, width) = find_grid(hidden, head, out_features, K, ("out_features", "x", "last size"))
    if by_ids is not None:
        entries, tokens = prod(lead[:by_ids]), prod(lead[by_ids:])
    elif contexts == 1:
        entries, tokens = 1, prod(lead)
    else:
        if not lead or lead[0] != contexts:
            raise ValueError(
                f"x: got shape {list(x)}, wanted [{contexts}, *, {K}], an entry for each of hidden's "
                f"{contexts} contexts; or give context_ids"
                + (if_more_for_each(lead[0], contexts, f"torch.arange({contexts})") if lead else "")
            )
        entries, tokens = contexts, prod(lead[1:])
    return Call(grid, width, contexts, entries, tokens, len(head) == 4, by_ids is not None, activation, dtype, device)


def check_whole(name: str, value: int) -> None:
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {value!r}, wanted an integer")


def grid_of_weight(hidden: Tensor | AdditiveHidden, head: Tensor, shape: Sequence[int]) -> Grid:
    """The grid of a weight of `shape`: `(N, K)`, and a kernel's."""
    if not isinstance(shape, Sequence) or len(shape) < 2:
        raise ValueError(f"shape: got {shape!r}, wanted (N, K) or (N, K, *kernel)")
    for value in shape:
        check_whole("shape", value)
    N, K, *kernel = shape
    return find_grid(tuple(hidden.shape), tuple(head.shape), N, K, ("shape", "shape", "columns"), tuple(kernel))[0]


def find_grid(
    hidden: tuple[int, ...],
    head: tuple[int, ...],
    out_features: int | None,
    K: int,
    names: tuple[str, str, str],
    kernel: tuple[int, ...] = (),
) -> tuple[Grid, tuple[int, int, int, int]]:
    """The grid that the shapes of hidden and head and the extents agree on, and hidden's shape with its contexts.

    Errors call the extents by `names`: N's argument, K's, and what of that argument K is."""
    n = len(kernel)
    if len(head) not in (3 + n, 4 + n):
        each = ", ".join(["m, rows, cols", *(["*kernel"] if n else [])])
        raise ValueError(f"head: got shape {list(head)}, wanted [{each}] or [I*J, {each}]")
    if len(hidden) not in (3, 4):
        raise ValueError(f"hidden: got shape {list(hidden)}, wanted [I, J, m] or [G, I, J, m]")
    G, I, J, m = hidden if len(hidden) == 4 else (1, *hidden)
    width, rows, cols, *own_kernel = head[len(head) - 3 - n :]
    if tuple(own_kernel) != kernel:
        raise ValueError(f"head: got shape {list(head)}, wanted one that ends in the kernel's {list(kernel)}")
    if min(rows, cols) < 1 or min(I, J) < 1:
        raise ValueError(f"head: got shape {list(head)} with hidden {list(hidden)}, wanted at least one chunk")
    if width != m:
        raise ValueError(f"head: got width {width} in shape {list(head)}, wanted hidden's width {m}")
    if len(head) == 4 + n and head[0] != I * J:
        raise ValueError(f"head: got {head[0]} heads, wanted one or {I * J}, hidden's {I} x {J} chunks")
    N = I * rows if out_features is None else out_features
    n_name, k_name, k_what = names
    if ceil_div(K, cols) != J:
        what = f"{k_name}: got {k_what} {K}" if k_what == "last size" else f"{k_name}: got {K} {k_what}"
        raise ValueError(f"{what}, wanted {(J - 1) * cols + 1} to {J * cols}: hidden has {J} chunks of {cols} columns")
    if ceil_div(N, rows) != I:
        what = f"{n_name}: got {N}{' rows' * (n_name == 'shape')}"
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


def check_ids_are_whole(context_ids: Tensor) -> None:
    if not isinstance(context_ids, Tensor) or context_ids.dtype not in (torch.int32, torch.int64):
        got = context_ids.dtype if isinstance(context_ids, Tensor) else type(context_ids).__name__
        raise TypeError(f"context_ids: got {got}, wanted an int32 or int64 tensor")
    if context_ids.dim() < 1:
        raise ValueError("context_ids: got a scalar, wanted leading dimensions of x")


def check_ids(context_ids: Tensor, x: Tensor, most: int) -> None:
    check_ids_are_whole(context_ids)
    depth, shape = context_ids.dim(), list(context_ids.shape)
    if depth > most or context_ids.shape != x.shape[:depth]:
        more = if_more_for_each(x.shape[0], shape[0], "context_ids") if depth == 1 else ""
        raise ValueError(f"context_ids: got shape {shape}, wanted leading dimensions of x {list(x.shape)}{more}")
    if context_ids.device != x.device:
        raise ValueError(f"context_ids: on {context_ids.device}, wanted x's device {x.device}")


def if_more_for_each(entries: int, ids: int, name: str) -> str:
    """What to do where x has several entries for each id: beams of a search, samples of a request, parts of an image"""
    if ids == 0 or entries <= ids or entries % ids:
        return ""
    each = entries // ids
    return (
        f": x has {entries} entries, {each} for each of {ids}, as of {each} beams: {name}.repeat_interleave({each}), "
        "with the outputs of an encoder, which sees each once, made before. A mixture's experts see tokens without "
        "their entries, and take one context at a time"
    )


def check_head_bias(head_bias: Tensor | None, grid: Grid, like: Tensor, kernel: tuple[int, ...] = ()) -> None:
    chunk = (grid.rows, grid.cols, *kernel)
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


def autocast(*values: Any) -> tuple[Any, ...]:
    """Under autocast of the first argument's device, every floating one takes autocast's dtype, as `F.linear`'s do
    (fp64 stays)."""
    if not torch._C._is_any_autocast_enabled():
        return values
    kind = values[0].device.type if isinstance(values[0], Tensor) else "cpu"
    if not autocast_enabled(kind):
        return values
    dtype = torch.get_autocast_dtype(kind)

    def cast(value: Any) -> Any:
        floating = isinstance(value, AdditiveHidden) or (isinstance(value, Tensor) and value.is_floating_point())
        return value.to(dtype) if floating and value.dtype not in (torch.float64, dtype) else value

    return tuple(cast(value) for value in values)
