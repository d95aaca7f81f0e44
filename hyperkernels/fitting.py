"""The hypernetwork that generates a given weight best: a truncated singular value decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperkernels.chunking import Grid, check_chunk
from hyperkernels.functional import generate_weight

EXACT = 512  # chunks, or numbers in one, up to which all singular values are found
MORE, ROUNDS = 32, 6  # of the randomised decomposition: vectors beside the wanted ones, and power iterations


@torch.no_grad()
def fit(weight: Tensor, chunk: tuple[int, int], width: int) -> tuple[Tensor, Tensor, float]:
    """`min ||W - sum_k hidden[:, :, k] (x) head[k]||`: W's chunks as rows `[I*J, rows*cols]`, cut to `width` singular
    vectors, which is the best there is where the chunks divide W. Larger ones by a randomised decomposition, the same
    in every call.

    Args:
        weight: `[N, K]`, of a convolution `[N, K, *kernel]`, floating; it is fitted in fp32 or wider.
        chunk: `(rows, cols)`.
        width: m. What singular vectors W has not, are zeros.

    Returns:
        hidden `[I, J, m]`, head `[m, rows, cols, *kernel]`, in W's dtype, and the relative error
        `||W - W_fitted|| / ||W||` that was measured, block by block of W.

    Memory: W as its chunks lie, in fp32 or wider, once more.

    Raises:
        TypeError, ValueError: weight, chunk or width is nothing of the kind above, or weight not finite.

    Example:
        >>> import torch, hyperkernels as hk
        >>> hidden, head, error = hk.fit(torch.kron(torch.randn(3, 4), torch.randn(5, 6)), (5, 6), 1)
        >>> hidden.shape, head.shape, error < 1e-5
        (torch.Size([3, 4, 1]), torch.Size([1, 5, 6]), True)

    Source: Van Loan and Pitsianis 1993; the randomised one Halko, Martinsson and Tropp 2011.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight: got {got}, wanted a floating tensor")
    if weight.dim() < 2:
        raise ValueError(f"weight: got shape {list(weight.shape)}, wanted [N, K] or [N, K, *kernel]")
    chunk = check_chunk(chunk)
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width: got {width!r}, wanted a positive integer")
    if not weight.isfinite().all():
        raise ValueError("weight: got numbers that are not finite, wanted finite ones")
    N, K, *kernel = weight.shape
    grid = Grid(N, K, *chunk)
    (rows, cols), I, J = chunk, grid.I, grid.J
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).reshape(N, K, prod(kernel))
    padded = F.pad(wide, (0, 0, 0, J * cols - K, 0, I * rows - N))
    chunks = padded.reshape(I, rows, J, cols, -1).transpose(1, 2).reshape(I * J, -1)
    left, values, right = _largest(chunks, min(width, *chunks.shape))
    absent = width - len(values)
    root = values.sqrt()
    hidden = F.pad(left * root, (0, absent)).reshape(I, J, width).to(weight.dtype)
    head = F.pad(right * root, (0, absent)).T.reshape(width, rows, cols, *kernel).to(weight.dtype).contiguous()
    return hidden, head, _error(wide, hidden, head, grid, kernel)


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest singular values, and their vectors as columns."""
    if min(matrix.shape) <= max(EXACT, count + MORE):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :count], values[:count], right[:count].T
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, count + MORE, ROUNDS)
    return left[:, :count], values[:count], right[:, :count]


def _error(weight: Tensor, hidden: Tensor, head: Tensor, grid: Grid, kernel: Sequence[int]) -> float:
    wrong = total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for i, own in enumerate(weight.split(grid.rows)):
        fitted = generate_weight(hidden[i : i + 1], head, (len(own), grid.in_features, *kernel))
        wrong = wrong + (own - fitted.reshape(own.shape)).double().square().sum()
        total = total + own.double().square().sum()
    return (wrong / total).sqrt().item() if total > 0 else 0.0
