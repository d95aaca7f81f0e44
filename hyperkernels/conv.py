"""`hyper_conv1d`, `hyper_conv2d` and `hyper_conv3d`: convolutions whose kernels are generated, and never formed."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperkernels.backends import choose_backend, reference
from hyperkernels.call import Call, Window
from hyperkernels.derivatives import Settings, partials
from hyperkernels.form import (
    autocast,
    check_head_bias,
    check_ids,
    check_like,
    check_tensors,
    check_whole,
    find_grid,
)
from hyperkernels.functional import materialize
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.operators import check_context_ids

Sizes = int | tuple[int, ...]


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

    Numerics, memory: as for `hyper_linear`. With more groups than one, `AdditiveHidden` or a head per chunk take one
    call for each group.

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


class ConvForm(NamedTuple):
    """What a call comes to: images `[B, C, *size]`, which `call` convolves once the groups of channels are contexts of
    their own (`parts`). `entries` of the batch have `tokens` images each."""

    call: Call
    x: Tensor
    hidden: Tensor | AdditiveHidden
    head: Tensor
    ids: Tensor | None
    bias: Tensor | None
    head_bias: Tensor | None
    groups: int
    batched: bool
    format: torch.memory_format

    @property
    def folds(self) -> bool:
        """Whether each group of channels can be a context: it has a hidden of its own, and the same head."""
        return self.groups == 1 or not (self.call.activation or self.call.per_chunk_heads)


def conv_form(
    n: int,
    x: Tensor,
    hidden: Tensor | AdditiveHidden,
    head: Tensor,
    out_channels: int | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bias: Tensor | None = None,
    head_bias: Tensor | None = None,
    context_ids: Tensor | None = None,
) -> ConvForm:
    """Raise what `hyper_conv2d` promises to raise, or return its arguments as the engine is to see them."""
    x, hidden, head, bias, head_bias = autocast(x, hidden, head, bias, head_bias)
    check_tensors(x, hidden, head)
    if x.dim() not in (n + 1, n + 2):
        raise ValueError(f"x: got shape {list(x.shape)}, wanted [B, C, {_star(n)}] or [C, {_star(n)}]")
    batched = x.dim() == n + 2
    layouts = {2: torch.channels_last, 3: torch.channels_last_3d}
    format = torch.contiguous_format
    if batched and n in layouts and not x.is_contiguous() and x.is_contiguous(memory_format=layouts[n]):
        format = layouts[n]
    x = x if batched else x[None]
    steps = {name: _sizes(n, name, v, 1) for name, v in (("stride", stride), ("dilation", dilation))}
    check_whole("groups", groups)
    B, C = x.shape[:2]
    if groups < 1 or C % groups:
        raise ValueError(f"groups: got {groups}, wanted a positive divisor of x's {C} channels")
    if out_channels is not None:
        check_whole("out_channels", out_channels)
    kernel = tuple(head.shape[-n:])
    shapes = tuple(hidden.shape), tuple(head.shape)
    grid, (contexts, _, _, width) = find_grid(
        *shapes, out_channels, C // groups, ("out_channels", "x", f"channels in each of {groups} groups"), kernel
    )
    if groups > 1 and (grid.out_features % groups or grid.out_features // groups % grid.rows):
        each = f"{grid.out_features} out_channels / {groups} groups"
        raise ValueError(f"head: got chunks of {grid.rows} rows, wanted a divisor of {each}")
    x, around = _padded(n, x, padding, kernel, **steps)
    window = Window(kernel, steps["stride"], around, steps["dilation"], tuple(x.shape[2:]))
    if min(kernel) < 1 or min(window.output_size) < 1:
        reach = [d * (k - 1) + 1 for k, d in zip(kernel, window.dilation)]
        padded = [size + 2 * pad for size, pad in zip(window.size, around)]
        raise ValueError(f"x: got an image of {padded}, padding included, wanted at least the kernel's {reach}")
    ids = None
    if context_ids is not None:
        check_ids(context_ids, x, 1)
        ids = context_ids.to(torch.int64)
    elif contexts not in (1, B):
        raise ValueError(
            f"x: got {B} images, wanted {contexts}, one for each of hidden's contexts; or give context_ids"
        )
    entries, tokens = (B, 1) if ids is not None or contexts > 1 else (1, B)
    check_like("bias", bias, x, (grid.out_features,), (contexts, grid.out_features))
    check_head_bias(head_bias, grid, x, kernel)
    activation = hidden.activation if isinstance(hidden, AdditiveHidden) else ""
    if isinstance(hidden, Tensor) and hidden.dim() == 3:
        hidden = hidden[None]
    numbers = (width, contexts, entries, tokens, head.dim() == n + 4, ids is not None)
    call = Call(grid, *numbers, activation, x.dtype, x.device.type, window)
    return ConvForm(call, x, hidden, head, ids, bias, head_bias, groups, batched, format)


class Part(NamedTuple):
    """An engine's call: x `[L, T, K, h]`, hidden `[G, I, J, m]` or additive, head `[.., m, rows, cols, s]`."""

    call: Call
    x: Tensor
    hidden: Tensor | AdditiveHidden
    head: Tensor
    ids: Tensor | None


def parts(form: ConvForm) -> Iterator[Part]:
    """One call whose contexts are each group of each context; or where that cannot be, one for each group."""
    call, hidden, n = form.call, form.hidden, form.groups
    L, T, I = call.entries, call.tokens, call.grid.I // n
    grid = call.grid._replace(out_features=call.grid.out_features // n)
    head = form.head.flatten(-len(call.window.kernel))  # type: ignore[union-attr]
    images = form.x.reshape(L, T, n, grid.in_features, prod(form.x.shape[2:]))
    if form.folds and isinstance(hidden, Tensor):
        ids = form.ids
        if ids is not None:
            ids = (ids[:, None] * n + torch.arange(n, device=ids.device)).flatten()
        folded = call._replace(grid=grid, contexts=call.contexts * n, entries=L * n)
        yield Part(folded, images.transpose(1, 2).flatten(0, 1), hidden.unflatten(1, (n, I)).flatten(0, 1), head, ids)
        return
    for group in range(n):
        rows = slice(group * I, (group + 1) * I)
        own_head = head[group * I * grid.J : (group + 1) * I * grid.J] if call.per_chunk_heads else head
        if isinstance(hidden, AdditiveHidden):
            own = AdditiveHidden(hidden.context, hidden.chunks[rows], hidden.activation)
        else:
            own = hidden[:, rows]
        yield Part(call._replace(grid=grid), images[:, :, group], own, own_head, form.ids)


def _hyper_conv(form: ConvForm, order: str | None, backend: str | None) -> Tensor:
    call, n = form.call, form.groups
    B, N, size = form.x.shape[0], call.grid.out_features, call.window.output_size  # type: ignore[union-attr]
    if backend == "reference":
        choose_backend(call, order, backend)
        if form.ids is not None:
            check_context_ids(form.ids, call.contexts)
    found = [_contract(part, order, backend) for part in parts(form)]
    y = torch.cat(found, 2) if len(found) > 1 else found[0]
    if n > 1 and form.folds:
        y = y.unflatten(0, (call.entries, n)).transpose(1, 2)
    y = y.reshape(B, N, *size)
    if form.head_bias is not None:
        y = y + _head_bias_term(form, order, backend)
    if form.bias is not None:
        bias = form.bias
        if bias.dim() == 2 and form.ids is not None:
            bias = bias[form.ids]
        y = y + bias[(..., *[None] * len(size))]
    if form.format != torch.contiguous_format:
        y = y.contiguous(memory_format=form.format)
    return y if form.batched else y[0]


def _contract(part: Part, order: str | None, backend: str | None) -> Tensor:
    """`[L, T, N, p]`."""
    call, x, hidden, head, ids = part
    if backend == "reference":
        kernel = materialize(hidden, head, call.grid, None, head.shape[-1:])
        return reference.hyper_conv(call.window, x, kernel, ids)  # type: ignore[arg-type]
    factors = (hidden.context, hidden.chunks) if isinstance(hidden, AdditiveHidden) else (hidden, None)
    return partials(Settings(("y",), call, order, backend), ids, None, *factors, head, x)[0]


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
            format=torch.contiguous_format,
        ),
        order,
        backend,
    )


def _star(n: int) -> str:
    return ", ".join(("D", "H", "W")[-n:]) if n > 1 else "L"


def _sizes(n: int, name: str, value: Any, least: int) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,) * n
    if len(sizes) == 1:
        sizes *= n
    if len(sizes) != n or not all(isinstance(v, (int, torch.SymInt)) and v >= least for v in sizes):
        raise ValueError(f"{name}: got {value!r}, wanted an integer of at least {least}, or {n} of them")
    return sizes


def _padded(
    n: int, x: Tensor, padding: Sizes | str, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """What is to be padded on either side alike; where "same" wants one zero more at the end, x has it."""
    if padding == "valid":
        return x, (0,) * n
    if padding != "same":
        if isinstance(padding, str):
            raise ValueError(f'padding: got {padding!r}, wanted numbers, "same" or "valid"')
        return x, _sizes(n, "padding", padding, 0)
    if prod(stride) != 1:
        raise ValueError(f'padding: got "same" with stride {stride}, wanted stride 1')
    total = [d * (k - 1) for k, d in zip(kernel, dilation)]
    if any(t % 2 for t in total):
        x = F.pad(x, [pad for t in reversed(total) for pad in (0, t % 2)])
    return x, tuple(t // 2 for t in total)
