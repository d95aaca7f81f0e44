"""`hyper_conv1d`, `2d`, `3d` and `hyper_conv_transpose2d`: convolutions with generated kernels, never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperkernels.backends import choose_backend, reference
from hyperkernels.conv_form import ConvForm, Part, Sizes, conv_form, parts
from hyperkernels.derivatives import Settings, partials
from hyperkernels.functional import add_to_new, materialize
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.operators import check_context_ids


def hyper_conv1d(
    x: Tensor,
    hidden: Tensor | AdditiveHidden,
    head: Tensor,
    *,
    out_channels: int | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bias: Tensor | None = None,
    head_bias: Tensor | None = None,
    context_ids: Tensor | None = None,
    order: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """`hyper_conv2d` in one dimension: x `[B, C, L]` or `[C, L]`, head `[m, rows, cols, kernel]`.

    Example:
        >>> import torch, hyperkernels as hk
        >>> x, hidden, head = torch.randn(5, 8, 20), torch.randn(3, 2, 16), torch.randn(16, 4, 4, 3)
        >>> hk.hyper_conv1d(x, hidden, head, padding=1).shape
        torch.Size([5, 12, 20])
    """
    form = conv_form(1, x, hidden, head, out_channels, stride, padding, dilation, groups, bias, head_bias, context_ids)
    return _hyper_conv(form, order, backend)


def hyper_conv2d(
    x: Tensor,
    hidden: Tensor | AdditiveHidden,
    head: Tensor,
    *,
    out_channels: int | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bias: Tensor | None = None,
    head_bias: Tensor | None = None,
    context_ids: Tensor | None = None,
    order: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """`y[b, i*rows+r, p] = sum_{j,k,q,s} hidden[g(b),i,j,k] head[k,r,q,s] x[b, j*cols+q, p*stride+s*dilation-padding]
    + bias`, the kernel never formed.

    Equal to `F.conv2d(x, generate_weight(hidden, head, (out_channels, C / groups, *kernel)), bias, ...)` for each
    context g. In the order head_first it is one convolution with the shared `head`, which is the same for every
    context, and a mix of its channels by `hidden`.

    Args:
        x: `[B, C, H, W]` or `[C, H, W]`, floating, any strides.
        hidden: `[I, J, m]` (or `[1, I, J, m]`, or `AdditiveHidden` with G = 1): one context for all of x.
            `[B, I, J, m]` or `AdditiveHidden` with G = B: a context per image, unless `context_ids` says otherwise.
        head: `[m, rows, cols, *kernel]` shared by all chunks, or `[I*J, m, rows, cols, *kernel]`, one per chunk. The
            chunks cut `(out_channels, C / groups)`.
        out_channels: `I*rows` by default. The last row and column of chunks are cropped.
        stride, padding, dilation, groups: as for `F.conv2d`; padding may be "same" or "valid". `rows` must divide
            `out_channels / groups`, unless groups is 1.
        bias: `[out_channels]`, or `[G, out_channels]` with a row per context.
        head_bias: `[rows, cols, *kernel]` added to every chunk, or `[I*J, rows, cols, *kernel]`.
        context_ids: `[B]`, int32 or int64: which context each image uses.
        order, backend: as for `hyper_linear`.

    Returns:
        y `[B, out_channels, *output size]`, in x's dtype and, where x is dense in one, its memory format.

    Numerics, memory: as for `hyper_linear`. With more groups than one, `AdditiveHidden` is formed where it fits half
    the workspace; where it does not, and with a head per chunk, each group takes a call.

    Raises:
        TypeError: an argument is no tensor or number of the kind above, or dtypes differ.
        ValueError: shapes, sizes or devices disagree, an id is out of range, an order or backend cannot do the call.

    Example:
        >>> import torch, hyperkernels as hk
        >>> x, hidden, head = torch.randn(5, 32, 9, 9), torch.randn(4, 2, 8), torch.randn(8, 16, 16, 3, 3)
        >>> y = hk.hyper_conv2d(x, hidden, head, padding=1)
        >>> weight = hk.generate_weight(hidden, head, (64, 32, 3, 3))
        >>> torch.allclose(y, torch.nn.functional.conv2d(x, weight, padding=1), atol=1e-2)
        True

    Source: kernels generated chunk by chunk, Ha, Dai and Le 2016 (HyperNetworks), section 3.1.
    """
    form = conv_form(2, x, hidden, head, out_channels, stride, padding, dilation, groups, bias, head_bias, context_ids)
    return _hyper_conv(form, order, backend)


def hyper_conv3d(
    x: Tensor,
    hidden: Tensor | AdditiveHidden,
    head: Tensor,
    *,
    out_channels: int | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bias: Tensor | None = None,
    head_bias: Tensor | None = None,
    context_ids: Tensor | None = None,
    order: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """`hyper_conv2d` in three dimensions: x `[B, C, D, H, W]` or `[C, D, H, W]`.

    Example:
        >>> import torch, hyperkernels as hk
        >>> x, hidden, head = torch.randn(2, 8, 5, 6, 7), torch.randn(3, 2, 16), torch.randn(16, 4, 4, 3, 3, 3)
        >>> hk.hyper_conv3d(x, hidden, head, stride=2).shape
        torch.Size([2, 12, 2, 2, 3])
    """
    form = conv_form(3, x, hidden, head, out_channels, stride, padding, dilation, groups, bias, head_bias, context_ids)
    return _hyper_conv(form, order, backend)


def hyper_conv_transpose2d(
    x: Tensor,
    hidden: Tensor | AdditiveHidden,
    head: Tensor,
    *,
    out_channels: int | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    bias: Tensor | None = None,
    head_bias: Tensor | None = None,
    context_ids: Tensor | None = None,
    order: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """`F.conv_transpose2d` with a generated kernel `[C, out_channels / groups, *kernel]`, never formed: what
    `hyper_conv2d` is differentiated by x.

    The chunks cut `(C, out_channels / groups)`: `rows` are x's channels here, and `cols` those of the result. The rest
    is as for `hyper_conv2d`; stride, padding, output_padding, groups and dilation as for `F.conv_transpose2d`.

    Example:
        >>> import torch, hyperkernels as hk
        >>> x, hidden, head = torch.randn(5, 12, 7, 7), torch.randn(3, 2, 8), torch.randn(8, 4, 16, 3, 3)
        >>> hk.hyper_conv_transpose2d(x, hidden, head, stride=2, padding=1, output_padding=1).shape
        torch.Size([5, 32, 14, 14])
    """
    arguments = (out_channels, stride, padding, dilation, groups, bias, head_bias, context_ids, output_padding)
    return _hyper_conv(conv_form(2, x, hidden, head, *arguments), order, backend)


def _hyper_conv(form: ConvForm, order: str | None, backend: str | None) -> Tensor:
    call, n, shape = form.call, form.groups, form.result_shape
    if backend == "reference":
        choose_backend(call, order, backend)
        if form.ids is not None:
            check_context_ids(form.ids, call.contexts)
    found = [_contract(part, form.transposed, order, backend) for part in parts(form)]
    y = torch.cat(found, 2) if len(found) > 1 else found[0]
    if form.pointwise:
        y = y.reshape(shape[0], -1, shape[1]).transpose(1, 2)
    if n > 1 and form.folds:
        y = y.unflatten(0, (call.entries, n)).transpose(1, 2)
    y = y.reshape(shape)
    if form.head_bias is not None:
        y = y + _head_bias_term(form, order, backend)
    if form.bias is not None:
        bias = form.bias
        if bias.dim() == 2 and form.ids is not None:
            bias = bias[form.ids]
        y = add_to_new(y, bias[(..., *[None] * len(shape[2:]))])
    if form.format != torch.contiguous_format:
        y = y.contiguous(memory_format=form.format)
    return y if form.batched else y[0]


def _contract(part: Part, transposed: bool, order: str | None, backend: str | None) -> Tensor:
    """`[L, T, N, p]`, or transposed `[L, T, K, h]`, or pointwise `[L, T*p, N]`."""
    call, x, hidden, head, ids = part
    if backend == "reference":
        if call.window is None:
            return reference.hyper_linear(x, materialize(hidden, head, call.grid, None), ids)
        kernel = materialize(hidden, head, call.grid, None, head.shape[-1:])
        return reference.hyper_conv(call.window, x, kernel, ids, transposed)  # type: ignore[arg-type]
    factors = (*((hidden.context, hidden.chunks) if isinstance(hidden, AdditiveHidden) else (hidden, None)), head)
    given = (x, *factors, None) if transposed else (None, *factors, x)
    return partials(Settings(("x",) if transposed else ("y",), call, order, backend), ids, *given)[0]


def _head_bias_term(form: ConvForm, order: str | None, backend: str | None) -> Tensor:
    """The same for every context: a head of width 1, or one per chunk, and a hidden of ones."""
    call, bias = form.call, form.head_bias
    assert bias is not None
    per_chunk = bias.dim() == form.head.dim() - call.per_chunk_heads
    once = {"width": 1, "contexts": 1, "entries": 1, "tokens": form.x.shape[0], "mapped": False, "activation": ""}
    ones = form.x.new_ones(1, call.grid.I, call.grid.J, 1)
    return _hyper_conv(
        form._replace(
            call=call._replace(**once, per_chunk_heads=per_chunk),
            hidden=ones,
            head=bias[:, None] if per_chunk else bias[None],
            ids=None,
            bias=None,
            head_bias=None,
            batched=True,
        ),
        order,
        backend,
    )
