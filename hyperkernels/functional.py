"""`hyper_linear` and `generate_weight`: the public functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from hyperkernels.at_once import again
from hyperkernels.backends import choose_backend, reference
from hyperkernels.chunking import Grid
from hyperkernels.derivatives import Settings, partials
from hyperkernels.form import canonical_form, check_head_bias, check_tensors, grid_of_weight, shaped
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.operators import check_context_ids
from hyperkernels.watched import transformed, watched


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
    The same bits come back for the same shapes, strides, device and thread count.

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
    if context_ids is None:
        y = again(x, hidden, head, out_features, bias, head_bias, order, backend)
        if y is not None:
            return y
    form = canonical_form(x, hidden, head, out_features, bias, head_bias, context_ids)
    call, grid, bias, head_bias = form.call, form.call.grid, form.bias, form.head_bias
    if backend == "reference":
        choose_backend(call, order, backend)  # raises if the order cannot be had; the operator does for the others
        if form.ids is not None:
            check_context_ids(form.ids, call.contexts)
        y = reference.hyper_linear(form.x, materialize(form.hidden, form.head, grid, head_bias), form.ids)
    else:
        hidden = form.hidden
        parts = (hidden.context, hidden.chunks) if isinstance(hidden, AdditiveHidden) else (hidden, None)
        factors = (None, *parts, form.head, form.x)
        term = None if head_bias is None else _of_head_bias(form.x, head_bias, grid)  # before: x and y stay in cache
        (y,) = partials(Settings(("y",), call, order, backend), form.ids, *factors)
        if term is not None:
            y = add_to_new(
                shaped(y, (call.entries, call.tokens, grid.out_features // term.shape[-1], term.shape[-1])), term
            )
    if bias is not None:
        if bias.dim() == 2:
            bias = (bias if form.ids is None else bias[form.ids])[:, None]
        y = add_to_new(shaped(y, (call.entries, call.tokens, grid.out_features)), bias)
    return shaped(y, (*x.shape[:-1], grid.out_features))


def generate_weight(
    hidden: Tensor | AdditiveHidden,
    head: Tensor,
    shape: Sequence[int],
    *,
    head_bias: Tensor | None = None,
) -> Tensor:
    """`W[g, i*rows+r, j*cols+q] = sum_k hidden[g,i,j,k] head[k,r,q] (+ head_bias[r,q])`, formed whole.

    For export and as the reference; `hyper_linear`, `hyper_conv2d` and the others apply W without it.

    Args:
        hidden, head, head_bias: as for `hyper_linear`, or `hyper_conv2d`.
        shape: `(N, K)`, or of a convolution `(out_channels, in_channels / groups, *kernel)`.

    Returns:
        W in this shape for hidden `[I, J, m]`, else `[G, *shape]`.

    Raises:
        TypeError, ValueError: as `hyper_linear`, and when `shape` does not fit the grid of chunks.

    Example:
        >>> import torch, hyperkernels as hk
        >>> hk.generate_weight(torch.randn(2, 3, 8), torch.randn(8, 4, 5), (8, 14)).shape
        torch.Size([8, 14])
    """
    check_tensors(head, hidden, head)
    grid = grid_of_weight(hidden, head, shape)
    kernel = tuple(shape[2:])
    check_head_bias(head_bias, grid, head, kernel)
    weight = materialize(hidden, head, grid, head_bias, kernel)
    return weight[0] if isinstance(hidden, Tensor) and hidden.dim() == 3 else weight


def materialize(
    hidden: Tensor | AdditiveHidden, head: Tensor, grid: Grid, head_bias: Tensor | None, kernel: tuple[int, ...] = ()
) -> Tensor:
    """`[G, N, K, *kernel]`."""
    dense = hidden.materialize() if isinstance(hidden, AdditiveHidden) else hidden
    if dense.dim() == 3:
        dense = dense[None]

    def positions_last(v: Tensor) -> Tensor:
        return v.flatten(-len(kernel)) if kernel else v[..., None]

    bias = None if head_bias is None else positions_last(head_bias)
    weight = reference.materialize(dense, positions_last(head), grid.out_features, grid.in_features, bias)
    return weight.reshape(*weight.shape[:3], *kernel)


def add_to_new(y: Tensor, bias: Tensor) -> Tensor:
    """`y + bias`, in the memory of y, which nobody else has seen: to touch memory anew takes as long as a product. Not
    in that of a view, where autograd would lose its way."""
    seen = transformed() or watched(y, bias) or (y.requires_grad and y._is_view())
    return y + bias if seen else y.add_(bias)


def _of_head_bias(x: Tensor, head_bias: Tensor, grid: Grid) -> Tensor:
    """`sum_{j,q} head_bias[r,q] x[.., j*cols+q]`, the same for every row i of chunks: `[L, T, 1, rows]`, or `[.., N]`
    where the last row of chunks is cropped, or each chunk's bias its own."""
    if head_bias.dim() == 3:
        ones = x.new_ones(grid.I, grid.J, 1)
        return hyper_linear(x, ones, head_bias[:, None], out_features=grid.out_features)[..., None, :]
    whole, rest = divmod(grid.in_features, grid.cols)
    summed = shaped(x[..., : whole * grid.cols] if rest else x, (*x.shape[:-1], whole, grid.cols)).sum(-2)
    if rest:
        summed = summed + F.pad(x[..., whole * grid.cols :], (0, grid.cols - rest))
    term = F.linear(summed, head_bias)[..., None, :]
    return term.repeat(1, 1, 1, grid.I)[..., : grid.out_features] if grid.out_features % grid.rows else term
