"""Rows of a generated weight: slices of it, and `F.embedding`, which takes some rows by number."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hyperkernels.chunking import Grid, ceil_div
from hyperkernels.form import check_ids, grid_of_weight
from hyperkernels.hidden import ACTIVATIONS, AdditiveHidden
from hyperkernels.operators import check_context_ids
from hyperkernels.planner import workspace_bytes
from hyperkernels.watched import transformed
from hyperkernels.weight import GENERATED, GeneratedWeight, is_one, shape_of


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """`W[g][ids]`, a row for each id: with more contexts than one, entry g of the ids has those of context g."""
    if not isinstance(weight, GeneratedWeight) or weight.dim() != 2 or scale_grad_by_freq:
        return NotImplemented
    if max_norm is not None:
        raise RuntimeError("embedding: max_norm would change a generated weight in place")
    N, K = shape_of(weight)
    if input.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input: got {input.dtype}, wanted int32 or int64")
    if padding_idx is not None and not -N <= padding_idx < N:
        raise ValueError(f"padding_idx: got {padding_idx}, wanted {-N} to {N - 1}")
    _check("input", input, 0, N - 1)
    y = _rows(weight, input).reshape(*input.shape, K)
    if padding_idx is None:
        return y
    return torch.where((input == padding_idx % N)[..., None], y.detach(), y)


def _check(name: str, ids: Tensor, low: int, high: int) -> None:
    if ids.numel() and not (ids.is_meta or transformed()) and not low <= ids.min() <= ids.max() <= high:
        raise IndexError(f"{name}: got {ids.min()} to {ids.max()}, wanted {low} to {high}")


def _rows(weight: Any, ids: Tensor) -> Tensor:
    """`[ids, K * positions]`, as many at once as fit half the workspace; backward gathers their heads again."""
    shape = shape_of(weight)
    grid = grid_of_weight(weight.hidden, weight.head, shape)
    contexts = _contexts_of(weight, ids)
    i, r = ids.flatten().long() // grid.rows, ids.flatten().long() % grid.rows
    numbers = weight.head.numel() // grid.rows // (grid.I if _per_chunk(weight) else 1)
    most = max(1, workspace_bytes() // 2 // (numbers * weight.head.element_size()))
    found = []
    for block in range(0, max(len(i), 1), most):
        own = slice(block, block + most)
        given = (weight, grid, i[own], r[own], None if contexts is None else contexts[own])
        if torch.is_grad_enabled() and len(i) > most:
            found.append(checkpoint(_some_rows, *given, use_reentrant=False))
        else:
            found.append(_some_rows(*given))
    return torch.cat(found) if len(found) > 1 else found[0]


def _some_rows(weight: Any, grid: Grid, i: Tensor, r: Tensor, g: Tensor | None) -> Tensor:
    """`y[t, (j, q)] = scale * (sum_k hidden[g(t),i(t),j,k] head[k,r(t),q] (+ head_bias[r(t),q]))`, cropped."""
    hidden, bias = weight.hidden, weight.settings["head_bias"]
    if isinstance(hidden, AdditiveHidden):
        context = hidden.context if g is None else hidden.context[g]
        own = ACTIVATIONS[hidden.activation].apply_(hidden.chunks[i] + context[:, None])
    elif hidden.dim() == 3:
        own = hidden[i]
    else:
        own = hidden[0, i] if g is None else hidden[g, i]
    kernel, per_chunk = len(shape_of(weight)) - 2, _per_chunk(weight)
    head = _row_of(weight.head, kernel, grid, i, r, per_chunk)
    y = torch.einsum("tjk,tjkq->tjq" if per_chunk else "tjk,tkq->tjq", own, head.flatten(head.dim() - 1 - kernel))
    if bias is not None:
        per_chunk = bias.dim() == 3 + kernel
        added = _row_of(bias, kernel, grid, i, r, per_chunk)
        y = y + (added if per_chunk else added[:, None]).flatten(2)
    y = y.unflatten(2, (grid.cols, -1)).flatten(1, 2)[:, : grid.in_features].flatten(1)
    return y if is_one(weight.scale) else weight.scale * y


def _row_of(head: Tensor, kernel: int, grid: Grid, i: Tensor, r: Tensor, per_chunk: bool) -> Tensor:
    """Row r of every chunk of the head or its bias, `[t, *]`, and of one for each chunk `[t, J, *]`."""
    rows = head.movedim(-2 - kernel, 0)
    if not per_chunk:
        return rows[r]
    return rows.unflatten(1, (grid.I, grid.J))[r, i]


def _per_chunk(weight: Any) -> bool:
    return weight.head.dim() == len(shape_of(weight)) + 2


def _contexts_of(weight: Any, ids: Tensor) -> Tensor | None:
    """Which context each of the ids takes, flat; None of one context."""
    given, G = weight.settings["context_ids"], weight.contexts
    if G == 1:
        return None
    if given is None:
        if ids.dim() == 0 or ids.shape[0] != G:
            raise ValueError(f"input: got shape {list(ids.shape)}, wanted [{G}, *], an entry for each context")
        given = torch.arange(G, device=ids.device)
    else:
        check_ids(given, ids, ids.dim())
        check_context_ids(given, G)
    return given.reshape(*given.shape, *[1] * (ids.dim() - given.dim())).expand(ids.shape).flatten()


def _getitem(weight: Any, index: Any) -> Any:
    """Rows as a slice, which is a generated weight again where it begins with a chunk; by number, formed."""
    N, *rest = shape_of(weight)
    if isinstance(index, tuple) and 0 < len(index) <= len(rest) + 1 and all(map(_is_whole, index[1:])):
        index = index[0]
    if not isinstance(weight, GeneratedWeight) or not rest:
        return NotImplemented
    if isinstance(index, slice):
        begin, end, step = index.indices(N)
        rows = grid_of_weight(weight.hidden, weight.head, (N, *rest)).rows
        if step == 1 and begin % rows == 0 and begin < end:
            return _stretch(weight, begin, end, rows)
        if step < 0:
            raise ValueError(f"index: got a step of {step}, wanted a positive one")
        index = torch.arange(begin, max(begin, end), step, device=weight.head.device)
    elif isinstance(index, int) and not isinstance(index, bool):
        index = torch.tensor(index, device=weight.head.device)
    if not (isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64)) or weight.contexts > 1:
        return NotImplemented
    _check("index", index, -N, N - 1)
    return _rows(weight, index % N).reshape(*index.shape, *rest)


def _is_whole(index: Any) -> bool:
    return index is Ellipsis or (isinstance(index, slice) and index == slice(None))


def _stretch(weight: Any, begin: int, end: int, rows: int) -> GeneratedWeight:
    """Rows begin to end, where begin is a chunk's first."""
    chunks, hidden = slice(begin // rows, ceil_div(end, rows)), weight.hidden
    if isinstance(hidden, AdditiveHidden):
        own: Any = hidden.with_chunks(hidden.chunks[chunks])
    else:
        own = hidden[..., chunks, :, :]
    I, J = hidden.shape[-3:-1]

    def of_chunks(v: Tensor | None, dimensions: int) -> Tensor | None:
        if v is None or v.dim() == dimensions:
            return v
        return v.unflatten(0, (I, J))[chunks].flatten(0, 1)

    shape = shape_of(weight)
    head = of_chunks(weight.head, len(shape) + 1)
    bias = of_chunks(weight.settings["head_bias"], len(shape))
    given = weight.settings | {"head_bias": bias, "scale": weight.scale}
    return GeneratedWeight(own, head, (end - begin, *shape[1:]), **given)  # type: ignore[arg-type]


def _split(weight: Any, size: Any, dim: int = 0) -> Any:
    N = shape_of(weight)[0]
    if not isinstance(weight, GeneratedWeight) or dim not in (0, -weight.dim()):
        return NotImplemented
    if isinstance(size, int) and size < 1:
        raise ValueError(f"split_size: got {size}, wanted a positive number")
    sizes = [size] * (N // size) + [N % size] * (N % size > 0) if isinstance(size, int) else list(size)
    if sum(sizes) != N:
        return NotImplemented  # torch says what is wrong
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    found = tuple(_getitem(weight, slice(end - own, end)) for own, end in zip(sizes, ends))
    return NotImplemented if any(part is NotImplemented for part in found) else found


def _chunk(weight: Any, chunks: int, dim: int = 0) -> Any:
    return _split(weight, ceil_div(shape_of(weight)[0], chunks), dim) if chunks > 0 else NotImplemented


GENERATED.update(
    {
        F.embedding: _embedding,
        Tensor.__getitem__: _getitem,
        **dict.fromkeys((Tensor.split, torch.split), _split),
        **dict.fromkeys((Tensor.chunk, torch.chunk), _chunk),
    }
)
