"""What can be told of generated weights without forming them: products, norms, distances, singular values.

`W = sum_k hidden[:, :, k] (x) head[k]`, so that `<W, W'> = sum_{k,l} (H^T H')[k,l] (P P'^T)[k,l]` with H `[I*J, m]` and
P `[m, rows*cols]`: `m x m` matrices in the place of weights. All is differentiable in hidden, head and head_bias.
Weights in chunks of a flat vector are taken as well, except by `chunk_norms`. Of weights in half precision, and under
autocast, all is computed in fp32, and so returned: a sum of squares soon exceeds fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperkernels import matrices
from hyperkernels.chunking import Grid, check_sizes
from hyperkernels.deferred import made
from hyperkernels.flat import FlatWeight
from hyperkernels.functional import hyper_linear
from hyperkernels.matrices import Matrix, all_of
from hyperkernels.moments import unrounded
from hyperkernels.weight import AbsentWeight, shape_of


def _matrices(a: AbsentWeight, b: AbsentWeight) -> tuple[Matrix, Matrix]:
    left = Matrix.of(a, "a")
    right = left if b is a else Matrix.of(b, "b")
    dtype = torch.promote_types(left.head.dtype, right.head.dtype)
    left, right = (m._replace(head=m.head.to(dtype)) for m in (left, right))
    return left, right


def _check_chunks(left: Matrix, right: Matrix, name: str = "b") -> tuple[Matrix, Matrix]:
    if left.cut != right.cut:
        raise ValueError(f"{name}: got chunks of {right.cut}, wanted {left.cut}")
    return left, right


def _check_pair(left: Matrix, right: Matrix, name: str = "b") -> tuple[Matrix, Matrix]:
    """To be taken context by context."""
    own, other = left.hidden.shape[0], right.hidden.shape[0]
    if min(own, other) > 1 and own != other:
        raise ValueError(f"{name}: got {other} contexts, wanted {own}, or one")
    return _check_chunks(left, right, name)


def _root(square: Tensor) -> Tensor:
    """Its square root; of 0 the gradient is 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


def _mean(found: Tensor) -> Tensor:
    """Over contexts; of none 0, as before a first task."""
    return found.sum() / max(1, found.numel())


def _each(found: Tensor) -> Tensor:
    """`[G]`, or of one context a number."""
    return found[0] if len(found) == 1 else found


@unrounded
def gram(a: AbsentWeight, b: AbsentWeight | None = None, *, centred: bool = False) -> Tensor:
    """`<W_g, W'_h>` for every context g of a and h of b, which is a by default: `[G, G']`.

    Args:
        a, b: generated weights of the same shape, cut into the same chunks.
        centred: whether of weights less the mean over their contexts. As W is linear in hidden, that is less its mean:
            contexts that nearly agree lose no digits, as they would in a Gram matrix that is centred afterwards.

    Memory: hidden `[G, I*J, m]` twice, and `m x m`. No weight is formed, and cropped edges are left out exactly.

    Raises:
        TypeError, ValueError: an argument is no generated weight, or their chunks differ.

    Example:
        >>> import torch, hyperkernels as hk
        >>> weight = hk.HyperNet({"weight": (300, 200)}, context_features=3)(torch.randn(5, 3))["weight"]
        >>> hk.algebra.gram(weight).shape
        torch.Size([5, 5])
    """
    left, right = _check_chunks(*_matrices(a, a if b is None else b))
    if centred:
        left, right = matrices.centred(left), matrices.centred(right)
    return torch.stack([u @ v.T for u, v in matrices.pairs(left, right)]).sum(0)


@unrounded
def inner(a: AbsentWeight, b: AbsentWeight) -> Tensor:
    """`<W_g, W'_g> = sum_{n,k} W_g[n,k] W'_g[n,k]`, context by context: `[G]`, or a number where each has one.

    Arguments, memory and errors are those of `gram`; of one context and many the one is taken with each.

    Example:
        >>> import torch, hyperkernels as hk
        >>> weight = hk.GeneratedWeight(torch.ones(2, 2, 1), torch.ones(1, 4, 4), (7, 8))
        >>> hk.algebra.inner(weight, weight)
        tensor(56.)
    """
    return _each(matrices.inner(*_check_pair(*_matrices(a, b))))


@unrounded
def norm(a: AbsentWeight) -> Tensor:
    """`||W_g||`, the Frobenius norm: `[G]`, or a number. Its square, summed, is weight decay on what is generated.

    Memory: `[G, m, m]`, or as many for each thread where contexts are fewer. Hidden `[G, I*J, m]` is formed, unless it
    is additive, on a CPU, and has no head_bias, no heads for each chunk and no scale that learns.
    """
    return _each(_root(matrices.sum_of_squares([Matrix.of(a, "a")])))


@unrounded
def chunk_norms(a: AbsentWeight) -> Tensor:
    """`||W_g[i, j]||` of every chunk, `[G, I, J]`: `sqrt(h^T (P P^T) h)`, cropped edges left out exactly."""
    matrix = Matrix.of(a, "a")
    grid = matrix.cut
    if not isinstance(grid, Grid):
        raise ValueError(f"a: got chunks of {grid}, wanted some that are blocks of the weight")
    I, J, hidden = grid.I, grid.J, matrix.formed()
    found = hidden.new_empty(len(hidden), I, J)
    for i, r in matrices.cropped_alike(I, grid.rows, grid.out_features):
        for j, q in matrices.cropped_alike(J, grid.cols, grid.in_features):
            head = matrix.head.unflatten(0, (I, J))[i, j] if matrix.head.dim() == 4 else matrix.head
            own = head[..., :r, :q].flatten(-2)
            grams = (own @ own.mT).expand(*hidden[0, i, j].shape, -1)
            found[:, i, j] = torch.einsum("gijk,ijkl,gijl->gij", hidden[:, i, j], grams, hidden[:, i, j])
    return _root(found)


@unrounded
def squared_distance(a: AbsentWeight, b: AbsentWeight) -> Tensor:
    """`||W_g - W'_g||^2`, context by context: `[G]`, or a number.

    Of equal widths the difference is `sum_k (h_k - h'_k) (x) p_k + h'_k (x) (p_k - p'_k)`, a generated weight as well:
    weights that nearly agree lose no digits to each other. Arguments and errors as for `inner`.

    Memory: as `norm`, of `[G, 2 m, 2 m]` and hidden `[G, I*J, 2 m]`, which one context beside many has formed, too;
    and twice the head.
    """
    return _each(matrices.squared_distances([_check_pair(*_matrices(a, b))]))


@unrounded
def distance(a: AbsentWeight, b: AbsentWeight) -> Tensor:
    """`||W_g - W'_g||`, context by context: `[G]`, or a number. As `squared_distance`."""
    return _root(squared_distance(a, b))


@unrounded
def cosine(a: AbsentWeight, b: AbsentWeight) -> Tensor:
    """`<W_g, W'_g> / (||W_g|| ||W'_g||)`, context by context: `[G]`, or a number. As `inner`."""
    a, b = made(a), made(b)
    found = inner(a, b)
    return found / (norm(a) * norm(b)).clamp_min(torch.finfo(found.dtype).tiny)


@unrounded
def spectral_norm(a: AbsentWeight, iterations: int = 1000, tol: float = 1e-4) -> Tensor:
    """The largest singular value of `W_g` as a matrix `[N, K * positions]`: `[G]`, or a number.

    By power iteration, each round two contractions, `v <- W^T W v / ||W^T W v||`, from the same vector in every call;
    what comes back, `||W v||`, never too large but for rounding, is differentiable with that v.

    Args:
        a: a generated weight.
        iterations: the most rounds, positive.
        tol: the relative error at which rounds end, estimated by the last gain times the rounds so far, which is what
            is missing where many singular values lie close. 0 runs all rounds, and never waits for the device.

    Raises:
        TypeError, ValueError: a is no generated weight, iterations no positive integer, or tol negative.

    Example:
        >>> import torch, hyperkernels as hk
        >>> hk.algebra.spectral_norm(hk.GeneratedWeight(torch.ones(2, 2, 1), torch.ones(1, 4, 4), (8, 8)))
        tensor(8.)

    Source: the power iteration of Miyato et al. 2018 (spectral normalisation).
    """
    check_sizes(iterations=iterations)
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not tol >= 0:
        raise ValueError(f"tol: got {tol!r}, wanted 0 or more")
    along, back, v = _products(made(a))
    with torch.no_grad():
        before = None
        for n in range(iterations):
            u = along(v)
            found = u.norm(dim=-1)
            if tol and before is not None and bool((n * (found - before) <= tol * found).all()):
                break
            before, v = found, F.normalize(back(u), dim=-1)
    return _each(along(v).norm(dim=-1)[:, 0])


def _products(a: AbsentWeight) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]:
    """`v -> W v` and `u -> W^T u`, of a context's entry each, and the first v, of length 1."""
    matrix = Matrix.of(a, "a")
    N, K = (*shape_of(a)[:1], prod(shape_of(a)[1:]))
    generator = torch.Generator().manual_seed(0)
    v = F.normalize(torch.randn(K, generator=generator, dtype=torch.float64), dim=0)
    v = v.to(matrix.head).expand(a.contexts, 1, K)
    hidden, head, cut = matrix.formed(), matrix.head, matrix.cut
    if isinstance(cut, Grid):
        turned = head.mT
        if head.dim() == 4:  # one for each chunk: they move with the chunks
            turned = turned.unflatten(0, (cut.I, cut.J)).transpose(0, 1).flatten(0, 1)
        back = partial(hyper_linear, hidden=hidden.transpose(1, 2), head=turned, out_features=K)
        return partial(hyper_linear, hidden=hidden, head=head, out_features=N), back, v
    along = partial(F.linear, weight=FlatWeight(hidden[:, 0], head[:, 0], (N, K), cut.start))

    @torch.enable_grad()
    def back_through(u: Tensor) -> Tensor:
        v = u.new_zeros(len(u), 1, K, requires_grad=True)
        return torch.autograd.grad(along(v), v, u)[0]

    return along, back_through, v


@unrounded
def output_regularizer(weights: Mapping[str, AbsentWeight], earlier: Mapping[str, AbsentWeight]) -> Tensor:
    """`mean_g sum_l ||W_l(z_g) - W*_l(z_g)||^2`: how far what is generated for earlier tasks has moved from what was.

    Args:
        weights: `hypernet(z)`, with a context for each earlier task.
        earlier: `{name: GeneratedWeight}` of the hypernetwork as it was, for the same tasks; a copy of it, without
            gradients, gives them.

    Memory: as `squared_distance`, and in the layout "flat" a matrix `[2 m, 2 m]` for each border between weights. No
    weight is formed, of either. Time goes with `G * I*J * m^2` and the head's numbers times m: chunks of 64x64 and
    larger, of which a weight has few, make it cheap.

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
    own, others = all_of(weights), all_of(earlier, "earlier")
    if own.keys() != others.keys():
        raise ValueError(f"earlier: got {sorted(others)}, wanted {sorted(own)}")
    couples = [_check_pair(own[name], others[name], f"earlier[{name!r}]") for name in own]
    for name, (left, right) in zip(own, couples):
        if left.hidden.shape[0] != right.hidden.shape[0]:
            got, wanted = right.hidden.shape[0], left.hidden.shape[0]
            raise ValueError(f"earlier[{name!r}]: got {got} contexts, wanted {wanted}, those of the same tasks")
    return _mean(matrices.squared_distances(couples))


@unrounded
def weight_decay(weights: Mapping[str, AbsentWeight]) -> Tensor:
    """`mean_g sum_l ||W_l(z_g)||^2`: the L2 penalty on what is generated, a number."""
    return _mean(total_norm(weights).square())


@torch.no_grad()
def clip_gradients_(parameters: Iterable[Tensor], weights: Mapping[str, AbsentWeight], limit: float = 0.01) -> Tensor:
    """Scale gradients in place so that `||g|| <= limit * ||W||`: no step is large beside what is generated.

    Args:
        parameters: of the hypernetwork, or any; g is all their gradients together.
        weights: what the hypernetwork generates; of several contexts, the mean norm counts.
        limit: the largest ratio, positive.

    Returns:
        `||g||` before, 0 where there are no gradients.

    Raises:
        TypeError, ValueError: parameters is a tensor or module, limit not positive, or as `total_norm`.

    Source: adaptive gradient clipping, Brock et al. 2021, with generated weights in the place of parameters.
    """
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
        raise ValueError(f"limit: got {limit!r}, wanted a positive number")
    several = isinstance(parameters, Iterable) and not isinstance(parameters, (Tensor, nn.Module, Mapping))
    given: list[Any] = list(parameters) if several else [parameters]
    wrong = [type(p).__name__ for p in given if not (several and isinstance(p, Tensor))]
    if wrong:
        raise TypeError(f"parameters: got {wrong[0]}, wanted several tensors, as module.parameters() gives them")
    most = limit * total_norm(weights).mean()
    gradients = [p.grad for p in given if p.grad is not None]
    found = torch.nn.utils.get_total_norm(gradients)
    if gradients:
        torch._foreach_mul_(gradients, (most / found.clamp_min(1e-12)).clamp_max(1.0).item())
    return found


@unrounded
def total_norm(weights: Mapping[str, AbsentWeight]) -> Tensor:
    """`sqrt(sum_l ||W_l||^2)` over all that a hypernetwork generates: `[G]`, or a number."""
    return _each(_root(matrices.sum_of_squares(all_of(weights).values())))
