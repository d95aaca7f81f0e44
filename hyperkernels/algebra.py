"""What can be told of generated weights without forming them: products, norms, distances, singular values.

`W = sum_k hidden[:, :, k] (x) head[k]`, so that `<W, W'> = sum_{k,l} (H^T H')[k,l] (P P'^T)[k,l]` with H `[I*J, m]` and
P `[m, rows*cols]`: `m x m` matrices in the place of weights. All is differentiable in hidden, head and head_bias.
Weights in chunks of a flat vector are taken as well, except by `chunk_norms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperkernels import matrices
from hyperkernels.chunking import Grid
from hyperkernels.deferred import made
from hyperkernels.flat import FlatWeight
from hyperkernels.functional import hyper_linear
from hyperkernels.matrices import Matrix
from hyperkernels.weight import AbsentWeight, shape_of


def _matrices(a: AbsentWeight, b: AbsentWeight) -> tuple[Matrix, Matrix]:
    left = Matrix.of(a, "a")
    right = left if b is a else Matrix.of(b, "b")
    if left.cut != right.cut:
        raise ValueError(f"b: got chunks of {right.cut}, wanted a's {left.cut}")
    return left, right


def _root(square: Tensor) -> Tensor:
    """Its square root; of 0 the gradient is 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


def _each(found: Tensor) -> Tensor:
    """`[G]`, or of one context a number."""
    return found[0] if len(found) == 1 else found


def gram(a: AbsentWeight, b: AbsentWeight | None = None) -> Tensor:
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
    return torch.stack([u @ v.T for u, v in matrices.pairs(left, right)]).sum(0)


def inner(a: AbsentWeight, b: AbsentWeight) -> Tensor:
    """`<W_g, W'_g> = sum_{n,k} W_g[n,k] W'_g[n,k]`, context by context: `[G]`, or a number where each has one.

    Arguments, memory and errors are those of `gram`; of one context and many the one is taken with each.

    Example:
        >>> import torch, hyperkernels as hk
        >>> weight = hk.GeneratedWeight(torch.ones(2, 2, 1), torch.ones(1, 4, 4), (7, 8))
        >>> hk.algebra.inner(weight, weight)
        tensor(56.)
    """
    left, right = _matrices(a, b)
    return _each(matrices.inner(left, right))


def norm(a: AbsentWeight) -> Tensor:
    """`||W_g||`, the Frobenius norm: `[G]`, or a number. Its square, summed, is weight decay on what is generated."""
    return _root(inner(a, a))


def chunk_norms(a: AbsentWeight) -> Tensor:
    """`||W_g[i, j]||` of every chunk, `[G, I, J]`: `sqrt(h^T (P P^T) h)`, cropped edges left out exactly."""
    matrix = Matrix.of(a, "a")
    grid = matrix.cut
    if not isinstance(grid, Grid):
        raise ValueError(f"a: got {grid}, wanted chunks that are blocks of the weight")
    I, J, hidden = grid.I, grid.J, matrices.formed(matrix.hidden)
    found = hidden.new_empty(len(hidden), I, J)
    for i, r in matrices.cropped_alike(I, grid.rows, grid.out_features):
        for j, q in matrices.cropped_alike(J, grid.cols, grid.in_features):
            head = matrix.head.unflatten(0, (I, J))[i, j] if matrix.head.dim() == 4 else matrix.head
            own = head[..., :r, :q].flatten(-2)
            grams = (own @ own.mT).expand(*hidden[0, i, j].shape, -1)
            found[:, i, j] = torch.einsum("gijk,ijkl,gijl->gij", hidden[:, i, j], grams, hidden[:, i, j])
    return _root(found)


def squared_distance(a: AbsentWeight, b: AbsentWeight) -> Tensor:
    """`||W_g - W'_g||^2`, context by context: `[G]`, or a number.

    Of equal widths the difference is `sum_k (h_k - h'_k) (x) p_k + h'_k (x) (p_k - p'_k)`, a generated weight as well:
    weights that nearly agree lose no digits to each other. Arguments and errors as for `inner`.
    """
    left, right = _matrices(a, b)
    return _each(matrices.squared_distances([(left, right)]))


def distance(a: AbsentWeight, b: AbsentWeight) -> Tensor:
    """`||W_g - W'_g||`, context by context: `[G]`, or a number. As `squared_distance`."""
    return _root(squared_distance(a, b))


def cosine(a: AbsentWeight, b: AbsentWeight) -> Tensor:
    """`<W_g, W'_g> / (||W_g|| ||W'_g||)`, context by context: `[G]`, or a number. As `inner`."""
    a, b = made(a), made(b)
    return inner(a, b) / (norm(a) * norm(b)).clamp_min(torch.finfo(a.dtype).tiny)


def spectral_norm(a: AbsentWeight, iterations: int = 20) -> Tensor:
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
    a = made(a)
    along, back, K = _products(a)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(K, generator=generator, dtype=torch.float64).to(a.head).expand(a.contexts, 1, K)
    with torch.no_grad():
        for _ in range(iterations):
            v = F.normalize(back(along(v)), dim=-1)
    return _each(along(v).norm(dim=-1)[:, 0])


def _products(a: AbsentWeight) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], int]:
    """`v -> W v` and `u -> W^T u`, of a context's entry each, and how long v is."""
    if not isinstance(a, FlatWeight):
        matrix = Matrix.of(a, "a")
        hidden, head, cut = matrices.formed(matrix.hidden), matrix.head, matrix.cut
        assert isinstance(cut, Grid)
        N, K, turned = cut.out_features, cut.in_features, head.mT
        if head.dim() == 4:  # one for each chunk: they move with the chunks
            turned = turned.unflatten(0, (cut.I, cut.J)).transpose(0, 1).flatten(0, 1)
        back = partial(hyper_linear, hidden=hidden.transpose(1, 2), head=turned, out_features=K)
        return partial(hyper_linear, hidden=hidden, head=head, out_features=N), back, K
    N, K = shape_of(a)[0], prod(shape_of(a)[1:])
    given = {"head_bias": a.settings["head_bias"], "scale": a.scale}
    along = partial(F.linear, weight=FlatWeight(a.hidden, a.head, (N, K), a.start, **given))

    @torch.enable_grad()
    def back_through(u: Tensor) -> Tensor:
        v = u.new_zeros(len(u), 1, K, requires_grad=True)
        return torch.autograd.grad(along(v), v, u)[0]

    return along, back_through, K


def output_regularizer(weights: Mapping[str, AbsentWeight], earlier: Mapping[str, AbsentWeight]) -> Tensor:
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
    return matrices.squared_distances([_matrices(weights[name], earlier[name]) for name in weights]).mean()


def weight_decay(weights: Mapping[str, AbsentWeight]) -> Tensor:
    """`mean_g sum_l ||W_l(z_g)||^2`: the L2 penalty on what is generated, a number."""
    return total_norm(weights).square().mean()


@torch.no_grad()
def clip_gradients_(parameters: Iterable[Tensor], weights: Mapping[str, AbsentWeight], limit: float = 0.01) -> Tensor:
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


def total_norm(weights: Mapping[str, AbsentWeight]) -> Tensor:
    """`sqrt(sum_l ||W_l||^2)` over all that a hypernetwork generates: `[G]`, or a number."""
    return _each(_root(matrices.sum_of_squares([Matrix.of(weight, name) for name, weight in weights.items()])))
