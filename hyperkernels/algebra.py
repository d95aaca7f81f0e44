"""What can be told of generated weights without forming them: products, norms, distances, singular values.

`W = sum_k hidden[:, :, k] (x) head[k]`, so that `<W, W'> = sum_{k,l} (H^T H')[k,l] (P P'^T)[k,l]` with H `[I*J, m]` and
P `[m, rows*cols]`: `m x m` matrices in the place of weights. All is differentiable in hidden, head and head_bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from hyperkernels.chunking import Grid
from hyperkernels.functional import hyper_linear
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.weight import GeneratedWeight


class Matrix(NamedTuple):
    """A generated weight as a matrix: hidden `[G, I, J, m]`, head `[m, rows, cols]` or `[I*J, m, rows, cols]`, the
    positions of a kernel among its columns, and a head_bias among its heads; and a key of what the head is made of."""

    hidden: Tensor
    head: Tensor
    grid: Grid
    key: tuple[int, ...]

    @classmethod
    def of(cls, weight: GeneratedWeight, name: str = "weight") -> Matrix:
        if not isinstance(weight, GeneratedWeight):
            raise TypeError(f"{name}: got {type(weight).__name__}, wanted a GeneratedWeight")
        hidden = weight.hidden
        dense = hidden.materialize() if isinstance(hidden, AdditiveHidden) else hidden
        dense = dense if dense.dim() == 4 else dense[None]
        N, K, *kernel = (*weight.shape, 1) if weight.dim() == 1 else weight.shape
        per_chunk = weight.head.dim() == 4 + len(kernel)
        first = per_chunk + 2
        head, bias = weight.head.flatten(first), weight.settings["head_bias"]
        key = (id(weight.head), id(bias))
        if bias is not None:
            bias = bias.flatten(bias.dim() - 1 - len(kernel))
            if bias.dim() == 3 and not per_chunk:
                head = head.expand(len(bias), *head.shape)
            width = head.dim() - 3
            bias = bias.expand(*head.shape[:width], *bias.shape[-2:]).unsqueeze(width)
            head = torch.cat([head, bias], width)
            dense = torch.cat([dense, torch.ones_like(dense[..., :1])], -1)
        rows, cols = head.shape[-2:]
        scaled = weight.scale * dense if weight.scale != 1 else dense
        return cls(scaled, head, Grid(N, K * prod(kernel), rows, cols), key)


class Part(NamedTuple):
    """Chunks that are cropped alike: hidden `[G, C, m]`, what is left of the head, `[m, n]` or `[C, m, n]`, and a key
    that is equal where that is."""

    hidden: Tensor
    head: Tensor
    key: tuple[int, ...]


def _parts(matrix: Matrix) -> Iterator[Part]:
    """The whole chunks, the last row of chunks, the last column, and the corner, where they are cropped."""
    hidden, head, grid, of = matrix
    I, J = grid.I, grid.J
    for i, r in _cropped_alike(I, grid.rows, grid.out_features):
        for j, q in _cropped_alike(J, grid.cols, grid.in_features):
            own = head.unflatten(0, (I, J))[i, j].flatten(0, 1) if head.dim() == 4 else head
            key = (*of, r, q, *((i.start, j.start) if head.dim() == 4 else ()))
            yield Part(hidden[:, i, j].flatten(1, 2), own[..., :r, :q].flatten(-2), key)


def _cropped_alike(count: int, size: int, extent: int) -> list[tuple[slice, int]]:
    """Which of `count` chunks have how many of `size` rows left, or columns."""
    last = extent - (count - 1) * size
    if last == size:
        return [(slice(0, count), size)]
    return [(slice(0, count - 1), size)] * (count > 1) + [(slice(count - 1, count), last)]


def _mixed(hidden: Tensor, grams: Tensor) -> Tensor:
    """Hidden `[G, C, m]` times `[m, m']`, or one for each chunk."""
    return torch.einsum("gcm,cmn->gcn", hidden, grams) if grams.dim() == 3 else hidden @ grams


def _pairs(a: Matrix, b: Matrix) -> Iterator[tuple[Tensor, Tensor]]:
    """`<W, W'>` is the sum over these of their products: `[G, C*m']` of a, and of b."""
    for left, right in zip(_parts(a), _parts(b)):
        yield _mixed(left.hidden, left.head @ right.head.mT).flatten(1), right.hidden.flatten(1)


def _sum_of_squares(matrices: Iterable[Matrix]) -> Tensor:
    """`sum_l ||M_l||^2`, `[G]`: of chunks that read the same head `P P^T` is made once."""
    groups: dict[tuple[int, ...], list[Part]] = {}
    for matrix in matrices:
        for part in _parts(matrix):
            groups.setdefault(part.key, []).append(part)
    found = []
    for parts in groups.values():
        head = parts[0].head
        hidden = torch.cat([part.hidden for part in parts], 1) if len(parts) > 1 else parts[0].hidden
        found.append((_mixed(hidden, head @ head.mT) * hidden).sum((1, 2)))
    return torch.stack(found).sum(0).clamp_min(0)


def _matrices(a: GeneratedWeight, b: GeneratedWeight) -> tuple[Matrix, Matrix]:
    left, right = Matrix.of(a, "a"), Matrix.of(b, "b")
    if left.grid != right.grid:
        raise ValueError(f"b: got chunks of {right.grid}, wanted a's {left.grid}")
    return left, right


def _contexts(weight: GeneratedWeight) -> bool:
    return len(weight.hidden.shape) == 4 and weight.hidden.shape[0] > 1


def _root(square: Tensor) -> Tensor:
    """Its square root; of 0 the gradient is 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


def gram(a: GeneratedWeight, b: GeneratedWeight | None = None) -> Tensor:
    """`<W_g, W'_h>` for every context g of a and h of b, which is a by default: `[G, G']`.

    Args:
        a, b: generated weights of the same shape, cut into the same chunks.

    Memory: hidden `[G, I*J, m]` twice, and `m x m`. No weight is formed, and cropped edges are left out exactly.

    Raises:
        TypeError, ValueError: an argument is no generated weight, or their chunks differ.

    Example:
        >>> import torch, hyperkernels as hk
        >>> weight = hk.HyperNet({"weight": (300, 200)}, context_features=3)(torch.randn(5, 3))["weight"]
        >>> hk.algebra.gram(weight).shape
        torch.Size([5, 5])
    """
    left, right = _matrices(a, a if b is None else b)
    return torch.stack([u @ v.T for u, v in _pairs(left, right)]).sum(0)


def inner(a: GeneratedWeight, b: GeneratedWeight) -> Tensor:
    """`<W_g, W'_g> = sum_{n,k} W_g[n,k] W'_g[n,k]`, context by context: `[G]`, or a number where each has one.

    Arguments, memory and errors are those of `gram`; of one context and many the one is taken with each.

    Example:
        >>> import torch, hyperkernels as hk
        >>> weight = hk.GeneratedWeight(torch.ones(2, 2, 1), torch.ones(1, 4, 4), (7, 8))
        >>> hk.algebra.inner(weight, weight)
        tensor(56.)
    """
    left, right = _matrices(a, b)
    found = _inner(left, right)
    return found if _contexts(a) or _contexts(b) else found[0]


def _inner(left: Matrix, right: Matrix) -> Tensor:
    if min(len(left.hidden), len(right.hidden)) > 1 and len(left.hidden) != len(right.hidden):
        raise ValueError(f"b: got {len(right.hidden)} contexts, wanted a's {len(left.hidden)}, or one")
    return torch.stack([(u * v).sum(1) for u, v in _pairs(left, right)]).sum(0)


def norm(a: GeneratedWeight) -> Tensor:
    """`||W_g||`, the Frobenius norm: `[G]`, or a number. Its square, summed, is weight decay on what is generated."""
    return _root(inner(a, a))


def chunk_norms(a: GeneratedWeight) -> Tensor:
    """`||W_g[i, j]||` of every chunk, `[G, I, J]`: `sqrt(h^T (P P^T) h)`, cropped edges left out exactly."""
    matrix = Matrix.of(a, "a")
    I, J = matrix.grid.I, matrix.grid.J
    found = matrix.hidden.new_empty(len(matrix.hidden), I, J)
    for i, r in _cropped_alike(I, matrix.grid.rows, matrix.grid.out_features):
        for j, q in _cropped_alike(J, matrix.grid.cols, matrix.grid.in_features):
            head = matrix.head.unflatten(0, (I, J))[i, j] if matrix.head.dim() == 4 else matrix.head
            own = head[..., :r, :q].flatten(-2)
            grams = (own @ own.mT).expand(*matrix.hidden[0, i, j].shape, -1)
            found[:, i, j] = torch.einsum("gijk,ijkl,gijl->gij", matrix.hidden[:, i, j], grams, matrix.hidden[:, i, j])
    return _root(found)


def squared_distance(a: GeneratedWeight, b: GeneratedWeight) -> Tensor:
    """`||W_g - W'_g||^2`, context by context: `[G]`, or a number.

    Of equal widths the difference is `sum_k (h_k - h'_k) (x) p_k + h'_k (x) (p_k - p'_k)`, a generated weight as well:
    weights that nearly agree lose no digits to each other. Arguments and errors as for `inner`.
    """
    left, right = _matrices(a, b)
    found = _squared_distances([(left, right)])
    return found if _contexts(a) or _contexts(b) else found[0]


def _squared_distances(pairs: Iterable[tuple[Matrix, Matrix]]) -> Tensor:
    """`sum_l ||W_l - W'_l||^2`, `[G]`; heads that are the same are told apart once."""
    found, differences, heads = [], [], {}
    for left, right in pairs:
        if left.head.shape != right.head.shape:
            found.append(_inner(left, left) + _inner(right, right) - 2 * _inner(left, right))
            continue
        key = (*left.key, *right.key)
        if key not in heads:
            heads[key] = torch.cat([left.head, left.head - right.head], left.head.dim() - 3)
        own, others = torch.broadcast_tensors(left.hidden, right.hidden)
        differences.append(Matrix(torch.cat([own - others, others], -1), heads[key], left.grid, key))
    if differences:
        found.append(_sum_of_squares(differences))
    return torch.stack(found).sum(0).clamp_min(0)


def distance(a: GeneratedWeight, b: GeneratedWeight) -> Tensor:
    """`||W_g - W'_g||`, context by context: `[G]`, or a number. As `squared_distance`."""
    return _root(squared_distance(a, b))


def cosine(a: GeneratedWeight, b: GeneratedWeight) -> Tensor:
    """`<W_g, W'_g> / (||W_g|| ||W'_g||)`, context by context: `[G]`, or a number. As `inner`."""
    return inner(a, b) / (norm(a) * norm(b)).clamp_min(torch.finfo(a.dtype).tiny)


def spectral_norm(a: GeneratedWeight, iterations: int = 20) -> Tensor:
    """The largest singular value of `W_g` as a matrix `[N, K * positions]`: `[G]`, or a number.

    By power iteration, each round two contractions, `v <- W^T W v / ||W^T W v||`, from the same vector in every call;
    what comes back, `||W v||`, is differentiable with that v.

    Args:
        a: a generated weight.
        iterations: rounds, positive.

    Raises:
        TypeError, ValueError: a is no generated weight, or iterations no positive integer.

    Source: the power iteration of Miyato et al. 2018 (spectral normalisation).
    """
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: got {iterations!r}, wanted a positive integer")
    hidden, head, grid, _ = Matrix.of(a)
    N, K = grid.out_features, grid.in_features
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(K, generator=generator, dtype=torch.float64).to(head)
    turned = head.mT
    if head.dim() == 4:  # one for each chunk: they move with the chunks
        turned = turned.unflatten(0, (grid.I, grid.J)).transpose(0, 1).flatten(0, 1)
    with torch.no_grad():
        v = start.expand(len(hidden), 1, K)
        for _ in range(iterations):
            u = hyper_linear(v, hidden, head, out_features=N)
            v = torch.nn.functional.normalize(hyper_linear(u, hidden.transpose(1, 2), turned, out_features=K), dim=-1)
    found = hyper_linear(v, hidden, head, out_features=N).norm(dim=-1)[:, 0]
    return found if _contexts(a) else found[0]


def output_regularizer(weights: Mapping[str, GeneratedWeight], earlier: Mapping[str, GeneratedWeight]) -> Tensor:
    """`mean_g sum_l ||W_l(z_g) - W*_l(z_g)||^2`: how far what is generated for earlier tasks has moved from what was.

    Args:
        weights: `hypernet(z)`, with a context for each earlier task.
        earlier: `{name: GeneratedWeight}` of the hypernetwork as it was, for the same tasks; a copy of it, without
            gradients, gives them.

    Memory: as `gram`. No weight is formed, of either.

    Raises:
        TypeError, ValueError: the names differ, or as `inner`.

    Example:
        >>> import copy, torch, hyperkernels as hk
        >>> net, tasks = hk.HyperNet({"weight": (30, 20)}, context_features=3), torch.randn(4, 3)
        >>> with torch.no_grad():
        ...     earlier = copy.deepcopy(net)(tasks)
        >>> hk.algebra.output_regularizer(net(tasks), earlier).item()
        0.0

    Source: von Oswald et al. 2020 (Continual learning with hypernetworks), equation 2.
    """
    if weights.keys() != earlier.keys():
        raise ValueError(f"earlier: got {sorted(earlier)}, wanted {sorted(weights)}")
    return _squared_distances([_matrices(weights[name], earlier[name]) for name in weights]).mean()


def weight_decay(weights: Mapping[str, GeneratedWeight]) -> Tensor:
    """`mean_g sum_l ||W_l(z_g)||^2`: the L2 penalty on what is generated, a number."""
    return total_norm(weights).square().mean()


@torch.no_grad()
def clip_gradients_(
    parameters: Iterable[Tensor], weights: Mapping[str, GeneratedWeight], limit: float = 0.01
) -> Tensor:
    """Scale gradients in place so that `||g|| <= limit * ||W||`: no step is large beside what is generated.

    Args:
        parameters: of the hypernetwork, or any; g is all their gradients together.
        weights: what the hypernetwork generates; of several contexts, the mean norm counts.
        limit: the largest ratio, positive.

    Returns:
        `||g||` before.

    Raises:
        ValueError: limit is not positive.

    Source: adaptive gradient clipping, Brock et al. 2021, with generated weights in the place of parameters.
    """
    if not limit > 0:
        raise ValueError(f"limit: got {limit!r}, wanted a positive number")
    gradients = [p.grad for p in parameters if p.grad is not None]
    found = torch.nn.utils.get_total_norm(gradients)
    most = limit * total_norm(weights).mean()
    torch._foreach_mul_(gradients, (most / found.clamp_min(1e-12)).clamp_max(1.0).item())
    return found


def total_norm(weights: Mapping[str, GeneratedWeight]) -> Tensor:
    """`sqrt(sum_l ||W_l||^2)` over all that a hypernetwork generates: `[G]`, or a number."""
    found = _root(_sum_of_squares([Matrix.of(weight, name) for name, weight in weights.items()]))
    return found if any(map(_contexts, weights.values())) else found[0]
