"""Generated weights cut into their chunks, and sums over those by `m x m` matrices: what `algebra` is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperkernels.chunking import Grid, ceil_div
from hyperkernels.deferred import made
from hyperkernels.flat import FlatWeight, stretches
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.moments import Layer, gram, moments, side_by_side
from hyperkernels.weight import AbsentWeight, is_one


class Stretch(NamedTuple):
    """Numbers `start` to `end` of a vector in chunks of `size`: how a `FlatWeight` lies in them."""

    start: int
    end: int
    size: int

    def __str__(self) -> str:
        return f"{self.size} in a flat vector, from {self.start} to {self.end}"


class Matrix(NamedTuple):
    """A generated weight, its head in fp32 at least, its head_bias among its factors: hidden `[G, I, J, m]`, formed or
    additive, head `[m, rows, cols]` or `[I*J, m, rows, cols]`, the positions of a kernel among its columns; its scale;
    and a key of what the head is made of. Of a stretch of a vector the chunks are a row, hidden `[G, 1, C, m]` and head
    `[m, 1, size]`."""

    hidden: Tensor | AdditiveHidden
    head: Tensor
    scale: float | Tensor
    cut: Grid | Stretch
    key: tuple[int, ...]

    def formed(self) -> Tensor:
        """Hidden `[G, I, J, m]`, times the scale, in the head's dtype."""
        return scaled(formed(self.hidden.to(self.head.dtype)), self.scale)

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
            hidden = weight.hidden
            if isinstance(hidden, AdditiveHidden):
                hidden = hidden.with_chunks(hidden.chunks[first : ceil_div(end, size)].transpose(0, 1))
            else:
                hidden = weight.hidden_of(first, ceil_div(end, size))[:, None]
            head, bias = head[:, None], None if bias is None else bias[None]
            cut, per_chunk, kernel = Stretch(start - first * size, end - first * size, size), False, []
        else:
            hidden = weight.hidden
            N, K, *kernel = (*weight.shape, 1) if weight.dim() == 1 else weight.shape
            per_chunk = head.dim() == 4 + len(kernel)
            head = head.flatten(per_chunk + 2)
            cut = Grid(N, K * prod(kernel), *head.shape[-2:])
            hidden = hidden if len(hidden.shape) == 4 else hidden[None]  # type: ignore[index]
        if bias is not None:
            bias = bias.flatten(bias.dim() - 1 - len(kernel))
            if bias.dim() == 3 and not per_chunk:
                head = head.expand(len(bias), *head.shape)
            width = head.dim() - 3
            bias = bias.expand(*head.shape[:width], *bias.shape[-2:]).unsqueeze(width)
            head, hidden = torch.cat([head, bias], width), formed(hidden.to(dtype))
            hidden = torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)
        own = [id(weight)] * (head.dim() == 4)  # its chunks' own heads, or biases
        key = (id(weight.head), id(weight.settings["head_bias"]), *own)
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
    """Chunks that are cropped alike: hidden `[G, C, m]` or additive `[G, C, 1, m]`, the scale, and their numbers' head,
    of which `begin` to `end` are left: `[m, n]` or `[C, m, n]`, and a key that is equal where that is."""

    hidden: Tensor | AdditiveHidden
    scale: float | Tensor
    head: Tensor
    begin: int
    end: int
    key: tuple[int, ...]

    def own(self) -> Tensor:
        """What is left of the head."""
        return self.head[..., self.begin : self.end]


def parts_of(matrix: Matrix) -> Iterator[Part]:
    """The whole chunks, the last row of chunks, the last column, and the corner, where they are cropped; of a stretch
    the first chunk, where it begins within one, the whole ones and the last."""
    hidden, head, scale, cut, of = matrix
    if isinstance(cut, Stretch):
        for first, last, begin, end in stretches(*cut):
            yield Part(_some(hidden, slice(0, 1), slice(first, last)), scale, head[:, 0], begin, end, of)
        return
    I, J = cut.I, cut.J
    for i, r in cropped_alike(I, cut.rows, cut.out_features):
        for j, q in cropped_alike(J, cut.cols, cut.in_features):
            own = head.unflatten(0, (I, J))[i, j].flatten(0, 1) if head.dim() == 4 else head
            own = own if (r, q) == (cut.rows, cut.cols) else own[..., :r, :q]
            key = (*of, r, q, *((i.start, j.start) if head.dim() == 4 else ()))
            yield Part(_some(hidden, i, j), scale, own.flatten(-2), 0, r * q, key)


def _some(hidden: Tensor | AdditiveHidden, i: slice, j: slice) -> Tensor | AdditiveHidden:
    """Of some chunks, in one row."""
    if isinstance(hidden, AdditiveHidden):
        return hidden.with_chunks(hidden.chunks[i, j].reshape(-1, 1, hidden.shape[-1]))
    return hidden[:, i, j].flatten(1, 2)


def formed(hidden: Tensor | AdditiveHidden) -> Tensor:
    """`[G, I, J, m]`."""
    return hidden.materialize() if isinstance(hidden, AdditiveHidden) else hidden


def centred(matrix: Matrix) -> Matrix:
    """Less the mean over its contexts, which is that of hidden."""
    hidden = formed(matrix.hidden.to(matrix.head.dtype))
    return matrix._replace(hidden=hidden - hidden.mean(0))


def scaled(hidden: Tensor, scale: float | Tensor) -> Tensor:
    """`scale * hidden`, not asked of torch where that is hidden."""
    return hidden if is_one(scale) else scale * hidden


def together(parts: Sequence[Part]) -> Layer:
    """The hiddens of some parts side by side; additive ones that have a context in common stay additive."""
    hiddens: list[Any] = [part.hidden for part in parts]
    first, scale = hiddens[0], None
    if not all(is_one(part.scale) for part in parts):
        like = parts[0].head
        given: Any = {"dtype": like.dtype, "device": like.device}
        scales = [torch.as_tensor(p.scale, **given).expand(p.hidden.shape[1], 1) for p in parts]
        scale = torch.cat(scales) if len(scales) > 1 else scales[0]
    dtype = parts[0].head.dtype
    additive = all(isinstance(h, AdditiveHidden) for h in hiddens)
    if additive and all(h.context is first.context and h.activation == first.activation for h in hiddens):
        joined = first.with_chunks(torch.cat([h.chunks for h in hiddens])) if len(hiddens) > 1 else first
        return Layer(joined.to(dtype), scale)
    found = [Layer(h.to(dtype), None).formed() for h in hiddens]
    return Layer(torch.cat(found, 1) if len(found) > 1 else found[0], scale)


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
        own, other = together([left]).formed(), together([right]).formed()
        yield mixed(own, left.own() @ right.own().mT).flatten(1), other.flatten(1)


def inner(left: Matrix, right: Matrix) -> Tensor:
    return torch.stack([(u * v).sum(1) for u, v in pairs(left, right)]).sum(0)


def sum_of_squares(matrices: Iterable[Matrix]) -> Tensor:
    """`sum_l ||M_l||^2`, `[G]`."""
    return _sum([(part,) for matrix in matrices for part in parts_of(matrix)]).clamp_min(0)


def squared_distances(couples: Sequence[tuple[Matrix, Matrix]]) -> Tensor:
    """`sum_l ||W_l - W'_l||^2`, `[G]`, from differences, which nearly equal weights need:
    `h P - h' P' = [h - h', h'] [P; P - P']`."""
    alike = [(left, right) for left, right in couples if left.head.shape == right.head.shape]
    found = [
        inner(left, left) + inner(right, right) - 2 * inner(left, right)
        for left, right in couples
        if left.head.shape != right.head.shape
    ]
    if alike:
        found.append(_sum([pair for left, right in alike for pair in zip(parts_of(left), parts_of(right))]))
    return torch.stack(found).sum(0).clamp_min(0)


def _sum(terms: Sequence[tuple[Part, ...]]) -> Tensor:
    """`sum ||h P||^2` of parts, or of couples `sum ||h P - h' P'||^2`, `[G]`. Of those that read the same numbers the
    moments are taken at once, and products of a head, of what lies between the ends of its parts, are made once."""
    groups: dict[tuple[Any, ...], dict[tuple[int, int], list[tuple[Part, ...]]]] = {}
    for parts in terms:
        same = groups.setdefault(tuple(part.key for part in parts), {})
        same.setdefault((parts[0].begin, parts[0].end), []).append(parts)
    found = []
    for spans in groups.values():
        heads = [part.head for part in next(iter(spans.values()))[0]]
        ends = sorted({end for span in spans for end in span})
        widths = [b - a for a, b in pairwise(ends)]
        pieces = zip(*[head[..., ends[0] : ends[-1]].split(widths, -1) for head in heads])
        between = _Sums([gram(*own) for own in pieces])
        for (begin, end), alike in spans.items():
            squares = between.of(ends.index(begin), ends.index(end))
            if squares.dim() == 3:  # one for each chunk
                each = [side_by_side(*[together([part]) for part in parts]) for parts in alike]
                found += [(mixed(hidden, squares) * hidden).sum((1, 2)) for hidden in each]
            else:
                layers = [together(parts) for parts in zip(*alike)]
                found.append((moments(*layers) * squares).sum((1, 2)))
    return torch.stack(found).sum(0)


class _Sums:
    """Sums of neighbours; those that reach an end of the row are made in one walk from there."""

    def __init__(self, terms: Sequence[Tensor]) -> None:
        self.terms = terms
        self.first = list(accumulate(terms))
        self.last = list(accumulate(reversed(terms)))[::-1]

    def of(self, begin: int, end: int) -> Tensor:
        if begin == 0:
            return self.first[end - 1]
        if end == len(self.terms):
            return self.last[begin]
        return sum(self.terms[begin + 1 : end], self.terms[begin])
