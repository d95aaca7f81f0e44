"""Generated weights cut into their chunks, and sums over those by `m x m` matrices: what `algebra` is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperkernels.chunking import Grid, ceil_div
from hyperkernels.deferred import made
from hyperkernels.flat import FlatWeight, stretches
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.watched import transformed
from hyperkernels.weight import AbsentWeight, is_one


def unrounded(run: Callable[..., Any]) -> Callable[..., Any]:
    """Outside of autocast, which would take products, and squares with them, in half precision."""

    @wraps(run)
    def full(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return run(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return run(*args, **kwargs)

    return full


class Stretch(NamedTuple):
    """Numbers `start` to `end` of a vector in chunks of `size`: how a `FlatWeight` lies in them."""

    start: int
    end: int
    size: int

    def __str__(self) -> str:
        return f"{self.size} in a flat vector, from {self.start} to {self.end}"


class Matrix(NamedTuple):
    """A generated weight in fp32 at least, its head_bias among its factors: hidden `[G, I, J, m]`, formed or additive,
    head `[m, rows, cols]` or `[I*J, m, rows, cols]`, the positions of a kernel among its columns; its scale; and a key
    of what the head is made of. Of a stretch of a vector the chunks are a row, hidden `[G, 1, C, m]` and head `[m, 1,
    size]`."""

    hidden: Tensor | AdditiveHidden
    head: Tensor
    scale: float | Tensor
    cut: Grid | Stretch
    key: tuple[int, ...]

    def formed(self) -> Tensor:
        """Hidden `[G, I, J, m]`, times the scale."""
        return scaled(formed(self.hidden), self.scale)

    @classmethod
    def of(cls, weight: AbsentWeight, name: str = "weight") -> Matrix:
        weight = made(weight)  # of a layer's own
        if not isinstance(weight, AbsentWeight):
            raise TypeError(f"{name}: got {type(weight).__name__}, wanted a GeneratedWeight")
        dtype = torch.promote_types(weight.head.dtype, torch.float32)
        head, bias = weight.head.to(dtype), weight.settings["head_bias"]
        bias = bias if bias is None else bias.to(dtype)
        if isinstance(weight, FlatWeight):
            start, end, size = weight.start, weight.start + weight.numel(), head.shape[-1]
            first = start // size
            hidden = weight.hidden_of(first, ceil_div(end, size))[:, None].to(dtype)
            head, bias = head[:, None], None if bias is None else bias[None]
            cut, per_chunk, kernel = Stretch(start - first * size, end - first * size, size), False, []
        else:
            hidden = weight.hidden.to(dtype)
            N, K, *kernel = (*weight.shape, 1) if weight.dim() == 1 else weight.shape
            per_chunk = head.dim() == 4 + len(kernel)
            head = head.flatten(per_chunk + 2)
            cut = Grid(N, K * prod(kernel), *head.shape[-2:])
            hidden = hidden if len(hidden.shape) == 4 else hidden[None]  # type: ignore[index]
        key = (id(weight.head), id(weight.settings["head_bias"]), *[id(weight)] * per_chunk)  # its chunks' own heads
        if bias is not None:
            bias = bias.flatten(bias.dim() - 1 - len(kernel))
            if bias.dim() == 3 and not per_chunk:
                head = head.expand(len(bias), *head.shape)
            width = head.dim() - 3
            bias = bias.expand(*head.shape[:width], *bias.shape[-2:]).unsqueeze(width)
            head, hidden = torch.cat([head, bias], width), formed(hidden)
            hidden = torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)
        scale = weight.scale.reshape(()).to(dtype) if isinstance(weight.scale, Tensor) else weight.scale
        return cls(hidden, head, scale, cut, key)


def all_of(weights: Mapping[str, AbsentWeight], argument: str = "weights") -> dict[str, Matrix]:
    """Of weights by name, of as many contexts each."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"{argument}: got {type(weights).__name__}, wanted generated weights by name, as a HyperNet returns them"
        )
    found = {name: Matrix.of(weight, f"{argument}[{name!r}]") for name, weight in weights.items()}
    if not found:
        raise ValueError(f"{argument}: got none, wanted at least one")
    wanted = next(iter(found.values())).hidden.shape[0]
    for name, matrix in found.items():
        if matrix.hidden.shape[0] != wanted:
            got = matrix.hidden.shape[0]
            raise ValueError(f"{argument}[{name!r}]: got {got} contexts, wanted {wanted}, as the first has")
    return found


class Part(NamedTuple):
    """Chunks that are cropped alike: hidden `[G, C, m]` or additive `[G, C, 1, m]`, what is left of the head, `[m, n]`
    or `[C, m, n]`, the scale, and a key that is equal where that is left."""

    hidden: Tensor | AdditiveHidden
    head: Tensor
    scale: float | Tensor
    key: tuple[int, ...]


def parts_of(matrix: Matrix) -> Iterator[Part]:
    """The whole chunks, the last row of chunks, the last column, and the corner, where they are cropped; of a stretch
    the first chunk, where it begins within one, the whole ones and the last."""
    hidden, head, scale, cut, of = matrix
    if isinstance(cut, Stretch):
        for first, last, begin, end in stretches(*cut):
            yield Part(formed(hidden)[:, 0, first:last], head[:, 0, begin:end], scale, (*of, begin, end))
        return
    I, J = cut.I, cut.J
    for i, r in cropped_alike(I, cut.rows, cut.out_features):
        for j, q in cropped_alike(J, cut.cols, cut.in_features):
            own = head.unflatten(0, (I, J))[i, j].flatten(0, 1) if head.dim() == 4 else head
            own = own if (r, q) == (cut.rows, cut.cols) else own[..., :r, :q]
            key = (*of, r, q, *((i.start, j.start) if head.dim() == 4 else ()))
            if isinstance(hidden, AdditiveHidden):
                some: Any = hidden.with_chunks(hidden.chunks[i, j].reshape(-1, 1, hidden.shape[-1]))
            else:
                some = hidden[:, i, j].flatten(1, 2)
            yield Part(some, own.flatten(-2), scale, key)


def formed(hidden: Tensor | AdditiveHidden) -> Tensor:
    """`[G, I, J, m]`."""
    return hidden.materialize() if isinstance(hidden, AdditiveHidden) else hidden


def centred(matrix: Matrix) -> Matrix:
    """Less the mean over its contexts, which is that of hidden."""
    hidden = formed(matrix.hidden)
    return matrix._replace(hidden=hidden - hidden.mean(0))


def scaled(hidden: Tensor, scale: float | Tensor) -> Tensor:
    """`scale * hidden`, not asked of torch where that is hidden."""
    return hidden if is_one(scale) else scale * hidden


def together(parts: Sequence[Part]) -> Tensor:
    """The hiddens of some parts side by side, `[G, C, m]`, times their scales; of additive ones that have a context in
    common, formed at once."""
    hiddens: list[Any] = [part.hidden for part in parts]
    first, scale = hiddens[0], parts[0].scale
    if any(part.scale is not scale for part in parts):
        like = parts[0].head
        given: Any = {"dtype": like.dtype, "device": like.device}
        scale = torch.cat([torch.as_tensor(p.scale, **given).expand(p.hidden.shape[1], 1) for p in parts])
    if all(isinstance(h, AdditiveHidden) for h in hiddens):
        alike = all(h.context is first.context and h.activation == first.activation for h in hiddens)
        if alike and len(hiddens) > 1:
            hiddens = [first.with_chunks(torch.cat([h.chunks for h in hiddens]))]
    found = [h.materialize()[:, :, 0] if isinstance(h, AdditiveHidden) else h for h in hiddens]
    return scaled(torch.cat(found, 1) if len(found) > 1 else found[0], scale)


def cropped_alike(count: int, size: int, extent: int) -> list[tuple[slice, int]]:
    """Which of `count` chunks have how many of `size` rows left, or columns."""
    last = extent - (count - 1) * size
    if last == size:
        return [(slice(0, count), size)]
    return [(slice(0, count - 1), size)] * (count > 1) + [(slice(count - 1, count), last)]


def mixed(hidden: Tensor, grams: Tensor) -> Tensor:
    """Hidden `[G, C, m]` times `[m, m']`, or one for each chunk."""
    return torch.einsum("gcm,cmn->gcn", hidden, grams) if grams.dim() == 3 else hidden @ grams


def pairs(a: Matrix, b: Matrix) -> Iterator[tuple[Tensor, Tensor]]:
    """`<W, W'>` is the sum over these of their products: `[G, C*m']` of a, and of b."""
    for left, right in zip(parts_of(a), parts_of(b)):
        own, other = together([left]), together([right])
        yield mixed(own, left.head @ right.head.mT).flatten(1), other.flatten(1)


def sum_of_squares(matrices: Iterable[Matrix]) -> Tensor:
    """`sum_l ||M_l||^2`, `[G]`: of chunks that read the same head `P P^T` is made once."""
    groups: dict[tuple[int, ...], list[Part]] = {}
    for matrix in matrices:
        for part in parts_of(matrix):
            groups.setdefault(part.key, []).append(part)
    found = [_squares(together(parts), parts[0].head) for parts in groups.values()]
    return torch.stack(found).sum(0).clamp_min(0)


def _squares(hidden: Tensor, head: Tensor) -> Tensor:
    return (squares if transformed() else Squares.apply)(hidden, head)  # type: ignore[return-value]


def squares(hidden: Tensor, head: Tensor) -> Tensor:
    """`sum_c h_c P P^T h_c^T` of every context, `[G]`."""
    return (mixed(hidden, head @ head.mT) * hidden).sum((1, 2))


class Squares(torch.autograd.Function):
    """`squares`, whose backward knows that `P P^T` and `H^T H` are symmetric: half the products."""

    @staticmethod
    def forward(ctx, hidden, head):
        through = mixed(hidden, head @ head.mT)
        ctx.save_for_backward(hidden, head, through)
        return (through * hidden).sum((1, 2))

    @staticmethod
    @unrounded
    def backward(ctx, d):
        hidden, head, through = ctx.saved_tensors
        needs, factors = ctx.needs_input_grad, (hidden, head)
        if torch.is_grad_enabled():  # this is to be differentiated again
            wanted = [factor for factor, needed in zip(factors, needs) if needed]
            found = iter(torch.autograd.grad(squares(*factors), wanted, d, create_graph=True))
            return tuple(next(found) if needed else None for needed in needs)
        d = 2 * d[:, None, None]
        dhead = _over_chunks(d * hidden, hidden, head) if needs[1] else None
        return d * through if needs[0] else None, dhead


def _over_chunks(left: Tensor, right: Tensor, head: Tensor) -> Tensor:
    """`sum left^T right head`: of one head the sum over its chunks, of each chunk's its own."""
    left, right = (v.transpose(0, 1) if head.dim() == 3 else v.flatten(0, 1) for v in (left, right))
    return left.mT @ right @ head


def apart(own: Tensor, others: Tensor, head: Tensor, other: Tensor) -> Tensor:
    """`sum_c ||h_c P - h'_c P'||^2` of every context, `[G]`, from differences, which nearly equal weights need:
    `h P - h' P' = (h - h') P + h' (P - P')`."""
    return squares(torch.cat([own - others, others], -1), torch.cat([head, head - other], -2))


class Apart(torch.autograd.Function):
    """`apart`. With R = h P - h' P' its derivatives are `2 R P^T` and `2 h^T R`, and minus those of the other side; R
    stays a product of two factors, `[h - h', h']` and `[P; P - P']`."""

    @staticmethod
    def forward(ctx, own, others, head, other):
        m = own.shape[-1]
        hidden, both = own.new_empty(*own.shape[:-1], 2 * m), head.new_empty(*head.shape[:-2], 2 * m, head.shape[-1])
        torch.sub(own, others, out=hidden[..., :m])
        hidden[..., m:] = others
        both[..., :m, :] = head
        torch.sub(head, other, out=both[..., m:, :])
        through = mixed(hidden, both @ both.mT)
        ctx.save_for_backward(own, others, head, other, hidden, both, through)
        return (through * hidden).sum((1, 2))

    @staticmethod
    @unrounded
    def backward(ctx, d):
        *factors, hidden, both, through = ctx.saved_tensors
        needs, (own, others, *_) = ctx.needs_input_grad, factors
        if torch.is_grad_enabled():  # this is to be differentiated again
            wanted = [factor for factor, needed in zip(factors, needs) if needed]
            found = iter(torch.autograd.grad(apart(*factors), wanted, d, create_graph=True))
            return tuple(next(found) if needed else None for needed in needs)
        d = 2 * d[:, None, None]
        near, far = through.chunk(2, -1)
        return (
            d * near if needs[0] else None,
            d * (far - near) if needs[1] else None,
            _over_chunks(d * own, hidden, both) if needs[2] else None,
            _over_chunks(-d * others, hidden, both) if needs[3] else None,
        )


def inner(left: Matrix, right: Matrix) -> Tensor:
    return torch.stack([(u * v).sum(1) for u, v in pairs(left, right)]).sum(0)


def squared_distances(couples: Iterable[tuple[Matrix, Matrix]]) -> Tensor:
    """`sum_l ||W_l - W'_l||^2`, `[G]`; of chunks that read the same heads those are told apart once."""
    found: list[Tensor] = []
    groups: dict[tuple[int, ...], list[tuple[Part, Part]]] = {}
    for left, right in couples:
        if left.head.shape != right.head.shape:
            found.append(inner(left, left) + inner(right, right) - 2 * inner(left, right))
            continue
        for pair in zip(parts_of(left), parts_of(right)):
            groups.setdefault((*pair[0].key, *pair[1].key), []).append(pair)
    for alike in groups.values():
        lefts, rights = zip(*alike)
        own, others = torch.broadcast_tensors(together(lefts), together(rights))
        distance = apart if transformed() else Apart.apply
        found.append(distance(own, others, lefts[0].head, rights[0].head))  # type: ignore[arg-type]
    return torch.stack(found).sum(0).clamp_min(0)
