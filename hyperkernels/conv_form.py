"""The arguments of `hyper_conv2d` and the others, checked against each other and brought to the engine's form."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperkernels.call import Call, Window
from hyperkernels.form import (
    autocast,
    check_head_bias,
    check_ids,
    check_like,
    check_tensors,
    check_whole,
    find_grid,
    if_more_for_each,
)
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.planner import workspace_bytes

Sizes = int | tuple[int, ...]


class ConvForm(NamedTuple):
    """What a call comes to: images `[B, C, *size]`, which `call` convolves once the groups of channels are contexts of
    their own (`parts`). `entries` of the batch have `tokens` images each. Where it is `transposed`, the images are y's
    and the partial by x is wanted."""

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
    transposed: bool = False

    @property
    def result_shape(self) -> tuple[int, ...]:
        grid, window = self.call.grid, self.call.window
        assert window is not None
        if self.transposed:
            return self.x.shape[0], grid.in_features * self.groups, *window.size
        return self.x.shape[0], grid.out_features, *window.output_size

    @property
    def pointwise(self) -> bool:
        """Whether it is a linear layer at each position, of images whose channels lie side by side."""
        window = self.call.window
        assert window is not None
        alone = not self.transposed and self.groups == 1 and self.format != torch.contiguous_format
        return alone and prod(window.kernel) == 1 and not any(window.padding)

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
    output_padding: Sizes | None = None,
) -> ConvForm:
    """Raise what `hyper_conv2d` promises to raise, or return its arguments as the engine is to see them. With an
    `output_padding` the convolution is transposed."""
    transposed = output_padding is not None
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
    each = f"channels in each of {groups} groups"
    if transposed:
        outputs = _outputs(n, *shapes, groups) if out_channels is None else out_channels
        if outputs % groups:
            raise ValueError(f"out_channels: got {outputs}, wanted a multiple of {groups} groups")
        names, extents = ("x", "out_channels", each), (C, outputs // groups)
    else:
        names, extents = ("out_channels", "x", each), (out_channels, C // groups)
    grid, (contexts, _, _, width) = find_grid(*shapes, *extents, names, kernel)
    if groups > 1 and (grid.out_features % groups or grid.out_features // groups % grid.rows):
        rows = f"{grid.out_features} {'in' if transposed else 'out'}_channels / {groups} groups"
        raise ValueError(f"head: got chunks of {grid.rows} rows, wanted a divisor of {rows}")
    if output_padding is None:
        x, around = _padded(n, x, padding, kernel, **steps)
        window = Window(kernel, steps["stride"], around, steps["dilation"], tuple(x.shape[2:]))
    else:
        window = _transposed(n, x, kernel, padding, output_padding, **steps)
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
            + if_more_for_each(B, contexts, f"torch.arange({contexts})")
        )
    entries, tokens = (B, 1) if ids is not None or contexts > 1 else (1, B)
    results = grid.in_features * groups if transposed else grid.out_features
    check_like("bias", bias, x, (results,), (contexts, results))
    check_head_bias(head_bias, grid, x, kernel)
    small = prod(shapes[0]) * hidden.dtype.itemsize <= workspace_bytes() // 2
    if isinstance(hidden, AdditiveHidden) and groups > 1 and small:
        hidden = hidden.materialize()  # then groups can be contexts, in one call
    activation = hidden.activation if isinstance(hidden, AdditiveHidden) else ""
    if isinstance(hidden, Tensor) and hidden.dim() == 3:
        hidden = hidden[None]
    numbers = (width, contexts, entries, tokens, head.dim() == n + 4, ids is not None)
    call = Call(grid, *numbers, activation, x.dtype, x.device.type, window)
    return ConvForm(call, x, hidden, head, ids, bias, head_bias, groups, batched, format, transposed)


class Part(NamedTuple):
    """An engine's call: x `[L, T, K, h]` (or transposed, y `[L, T, N, p]`), hidden `[G, I, J, m]` or additive, head
    `[.., m, rows, cols, s]`; of a pointwise convolution x `[L, T*h, K]` and head `[.., m, rows, cols]`."""

    call: Call
    x: Tensor
    hidden: Tensor | AdditiveHidden
    head: Tensor
    ids: Tensor | None


def parts(form: ConvForm) -> Iterator[Part]:
    """One call whose contexts are each group of each context; or where that cannot be, one for each group."""
    call, hidden, n = form.call, form.hidden, form.groups
    L, T, I = call.entries, call.tokens, call.grid.I // n
    if form.pointwise:
        window = call.window
        assert window is not None
        x = form.x[(..., *(slice(None, None, step) for step in window.stride))]
        rows = x.movedim(1, -1).reshape(L, -1, x.shape[1])
        own = call._replace(tokens=T * prod(window.output_size), window=None)
        yield Part(own, rows, hidden, form.head.flatten(-1 - len(window.kernel)), form.ids)
        return
    grid = call.grid._replace(out_features=call.grid.out_features // n)
    head = form.head.flatten(-len(call.window.kernel))  # type: ignore[union-attr]
    images = form.x.reshape(L, T, n, form.x.shape[1] // n, prod(form.x.shape[2:]))
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
        own = hidden.with_chunks(hidden.chunks[rows]) if isinstance(hidden, AdditiveHidden) else hidden[:, rows]
        yield Part(call._replace(grid=grid), images[:, :, group], own, own_head, form.ids)


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


def _outputs(n: int, hidden: tuple[int, ...], head: tuple[int, ...], groups: int) -> int:
    """Of a transposed convolution whose chunks are whole; where shapes fit nothing, the grid refuses them."""
    return hidden[-2] * head[-1 - n] * groups if len(hidden) > 1 and len(head) > n else groups


def _transposed(
    n: int,
    x: Tensor,
    kernel: tuple[int, ...],
    padding: Sizes | str,
    output_padding: Sizes,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Window:
    """That of the convolution which makes images of x's size; of the sizes that do, `output_padding` tells which."""
    if isinstance(padding, str):
        raise ValueError(f"padding: got {padding!r}, wanted numbers: a transposed convolution has no other")
    around, more = _sizes(n, "padding", padding, 0), _sizes(n, "output_padding", output_padding, 0)
    if any(extra >= max(step, d) for extra, step, d in zip(more, stride, dilation)):
        raise ValueError(f"output_padding: got {output_padding!r}, wanted less than stride or dilation")
    size = tuple(
        (length - 1) * step - 2 * pad + d * (k - 1) + extra + 1
        for length, step, pad, d, k, extra in zip(x.shape[2:], stride, around, dilation, kernel, more)
    )
    if min(size) < 1:
        raise ValueError(f"padding: got {padding!r}, which leaves images of {list(size)}, wanted at least one number")
    return Window(kernel, stride, around, dilation, size)
