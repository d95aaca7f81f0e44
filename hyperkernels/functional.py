"""`hyper_linear` and `generate_weight`: arguments checked and brought to the engine's form, nothing computed twice."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperkernels.backends import choose_backend, reference
from hyperkernels.chunking import Grid, ceil_div, to_chunks
from hyperkernels.derivatives import Settings, partials
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.operators import check_context_ids, sizes_of
from hyperkernels.planner import Call


def hyper_linear(
    x: Tensor,
    hidden: Tensor | AdditiveHidden,
    head: Tensor,
    *,
    out_features: int | None = None,
    bias: Tensor | None = None,
    head_bias: Tensor | None = None,
    context_ids: Tensor | None = None,
    order: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """`y[b, i*rows+r] = sum_{j,k,q} hidden[g(b),i,j,k] head[k,r,q] x[b, j*cols+q] + bias`, W never formed.

    Equal to `F.linear(x, generate_weight(hidden, head, (N, K)), bias)` for each context g.

    Args:
        x: `[*, K]`, floating, any strides; empty leading dimensions work.
        hidden: `[I, J, m]` (or `[1, I, J, m]`, or `AdditiveHidden` with G = 1): one context for all of x.
            `[G, I, J, m]` or `AdditiveHidden` with G > 1: entry g along x's first dimension (of size G) uses
            context g, unless `context_ids` says otherwise.
        head: `[m, rows, cols]` shared by all chunks, or `[I*J, m, rows, cols]`, one per chunk.
        out_features: N; `I*rows` by default. The last row and column of chunks are cropped to N and K.
        bias: `[N]`, or `[G, N]` with a row per context.
        head_bias: `[rows, cols]` added to every chunk, or `[I*J, rows, cols]`.
        context_ids: int32 or int64, shaped as leading dimensions of x; which context each entry uses.
        order: `generate`, `head_first` or `hidden_first` for y and its derivatives; planned by default.
        backend: a name in `hyperkernels.backends.BACKENDS`; chosen by default.

    Returns:
        y `[*, N]`, in x's dtype (under autocast, in autocast's).

    Numerics: products accumulate in fp32 or wider; the intermediate of the order is rounded to x's dtype once.
    The same bits come back for the same shapes, device and thread count.

    Memory: neither W nor its gradient is formed; workspace is bounded by `set_workspace_mib` (64 MiB). Backward
    saves x, hidden and head. An edge that is cropped costs a padded copy of y, accumulating in fp32 one of a
    16-bit gradient.

    Raises:
        TypeError: an argument is no tensor, is not floating (or `context_ids` not integer), or dtypes differ.
        ValueError: shapes or devices disagree, an id is out of range, an order or backend is unknown or cannot
            do the call.

    Example:
        >>> import torch, hyperkernels as hk
        >>> x, hidden, head = torch.randn(5, 100), torch.randn(8, 4, 16), torch.randn(16, 8, 25)
        >>> y = hk.hyper_linear(x, hidden, head)
        >>> torch.allclose(y, x @ hk.generate_weight(hidden, head, (64, 100)).T, atol=1e-4)
        True

    Source: chunk-wise hypernetworks, Ha, Dai and Le 2016 (HyperNetworks), section 3.1.
    """
    x, hidden, head, bias, head_bias = _autocast(x, hidden, head, bias, head_bias)
    form = canonical_form(x, hidden, head, out_features, context_ids)
    _check_like("bias", bias, x, (form.call.grid.out_features,), (form.call.contexts, form.call.grid.out_features))
    _check_head_bias(head_bias, form.call.grid, x)
    call = form.call
    if choose_backend(call, order, backend)[0] == "reference":
        weight = _materialize(hidden, head, call.grid, head_bias)
        if form.ids is not None:
            check_context_ids(form.ids, call.contexts)
        y = reference.hyper_linear(form.x, weight, form.ids)
    else:
        settings = Settings(sizes_of(call), call.activation, order or "", backend or "")
        if isinstance(hidden, AdditiveHidden):
            factors = (hidden.context, hidden.chunks)
        else:
            factors = (hidden.reshape(form.hidden_shape), None)
        (y,) = partials(("y",), settings, form.ids, None, *factors, head, form.x)
        if head_bias is not None:
            y = y + _head_bias_term(form.x, head_bias, call.grid)
    if bias is not None:
        if bias.dim() == 2:
            bias = (bias if form.ids is None else bias[form.ids])[:, None]
        y = y + bias
    return y.reshape(*x.shape[:-1], call.grid.out_features)


def generate_weight(
    hidden: Tensor | AdditiveHidden,
    head: Tensor,
    shape: tuple[int, int],
    *,
    head_bias: Tensor | None = None,
) -> Tensor:
    """`W[g, i*rows+r, j*cols+q] = sum_k hidden[g,i,j,k] head[k,r,q] (+ head_bias[r,q])`, formed whole.

    For export and as the reference; `hyper_linear` applies W without it.

    Args:
        hidden, head, head_bias: as for `hyper_linear`.
        shape: `(N, K)`.

    Returns:
        `[N, K]` for hidden `[I, J, m]`, else `[G, N, K]`.

    Raises:
        TypeError, ValueError: as `hyper_linear`, and when `shape` does not fit the grid of chunks.

    Example:
        >>> import torch, hyperkernels as hk
        >>> hk.generate_weight(torch.randn(2, 3, 8), torch.randn(8, 4, 5), (8, 14)).shape
        torch.Size([8, 14])
    """
    _check_tensors(head, hidden, head)
    if len(shape) != 2:
        raise ValueError(f"shape: got {tuple(shape)}, wanted (N, K)")
    grid, _ = _grid(hidden, head, int(shape[0]), int(shape[1]), "shape")
    _check_head_bias(head_bias, grid, head)
    weight = _materialize(hidden, head, grid, head_bias)
    return weight[0] if isinstance(hidden, Tensor) and hidden.dim() == 3 else weight


class Form(NamedTuple):
    """Arguments in the engine's form: x `[L, T, K]`, ids `[L]`."""

    call: Call
    x: Tensor
    ids: Tensor | None
    hidden_shape: tuple[int, int, int, int]


def canonical_form(
    x: Tensor, hidden: Tensor | AdditiveHidden, head: Tensor, out_features: int | None, context_ids: Tensor | None
) -> Form:
    """Check the arguments against each other and bring them to the engine's form."""
    _check_tensors(x, hidden, head)
    if x.dim() < 1:
        raise ValueError("x: got a scalar, wanted [*, K]")
    K, lead = x.shape[-1], x.shape[:-1]
    grid, hidden_shape = _grid(hidden, head, out_features, K, "out_features")
    contexts = hidden_shape[0]
    ids = None
    if context_ids is not None:
        _check_ids(context_ids, x)
        depth = context_ids.dim()
        ids = context_ids.reshape(-1).to(torch.int64)
        entries, tokens = ids.shape[0], prod(lead[depth:])
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
    call = Call(
        grid,
        hidden_shape[-1],
        contexts,
        entries,
        tokens,
        head.dim() == 4,
        ids is not None,
        activation,
        x.dtype,
        x.device.type,
    )
    return Form(call, x.reshape(entries, tokens, K), ids, hidden_shape)


def _grid(
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
    if ceil_div(K, cols) != J:
        what = f"x: got last size {K}" if source == "out_features" else f"shape: got {K} columns"
        raise ValueError(f"{what}, wanted {(J - 1) * cols + 1} to {J * cols}: hidden has {J} chunks of {cols} columns")
    N = I * rows if out_features is None else out_features
    if ceil_div(N, rows) != I:
        raise ValueError(
            f"{source}: got {N}, wanted {(I - 1) * rows + 1} to {I * rows}: hidden has {I} chunks of {rows} rows"
        )
    return Grid(N, K, rows, cols), (G, I, J, m)


def _check_tensors(x: Tensor, hidden: Tensor | AdditiveHidden, head: Tensor) -> None:
    for name, value in (("x", x), ("hidden", hidden), ("head", head)):
        if not isinstance(value, Tensor) and not (name == "hidden" and isinstance(value, AdditiveHidden)):
            raise TypeError(f"{name}: got {type(value).__name__}, wanted a tensor")
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name}: got {value.dtype}, wanted a floating dtype")
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


def _check_head_bias(head_bias: Tensor | None, grid: Grid, like: Tensor) -> None:
    chunk = (grid.rows, grid.cols)
    _check_like("head_bias", head_bias, like, chunk, (grid.I * grid.J, *chunk))


def _check_like(name: str, value: Tensor | None, like: Tensor, *shapes: tuple[int, ...]) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a tensor")
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{name}: got shape {list(value.shape)}, wanted {' or '.join(str(list(s)) for s in shapes)}")
    if value.dtype != like.dtype:
        raise TypeError(f"{name}: got {value.dtype}, wanted x's dtype {like.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: on {value.device}, wanted x's device {like.device}")


def _autocast(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """Under autocast every floating argument takes autocast's dtype, as `F.linear`'s do (fp64 stays)."""
    kind = x.device.type if isinstance(x, Tensor) else "cpu"
    if not torch.is_autocast_enabled(kind):
        return x, *others
    dtype = torch.get_autocast_dtype(kind)
    kept = (torch.float64, dtype)

    def cast(value: Any) -> Any:
        floating = isinstance(value, AdditiveHidden) or (isinstance(value, Tensor) and value.is_floating_point())
        return value.to(dtype) if floating and value.dtype not in kept else value

    return tuple(cast(value) for value in (x, *others))


def _materialize(hidden: Tensor | AdditiveHidden, head: Tensor, grid: Grid, head_bias: Tensor | None) -> Tensor:
    dense = hidden.materialize() if isinstance(hidden, AdditiveHidden) else hidden
    if dense.dim() == 3:
        dense = dense[None]
    return reference.materialize(dense, head, grid.out_features, grid.in_features, head_bias)


def _head_bias_term(x: Tensor, head_bias: Tensor, grid: Grid) -> Tensor:
    """`sum_{j,q} head_bias[r,q] x[.., j*cols+q]`, the same for every row i of chunks; `[L, T, N]`."""
    if head_bias.dim() == 3:
        ones = x.new_ones(grid.I, grid.J, 1)
        return hyper_linear(x, ones, head_bias[:, None], out_features=grid.out_features)
    whole = grid.in_features // grid.cols * grid.cols
    summed = to_chunks(x[..., :whole], grid.cols).sum(-2)
    if whole < grid.in_features:
        summed = summed + F.pad(x[..., whole:], (0, whole + grid.cols - grid.in_features))
    term = summed @ head_bias.T
    return term.repeat(1, 1, grid.I)[..., : grid.out_features]
