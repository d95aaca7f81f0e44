"""How a hypernetwork starts: by the variance of what it generates, and of what its trunk makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hyperkernels.hidden import AdditiveHidden
from hyperkernels.nn.targets import Found

LEAST_VARIANCE = 1e-4  # of what is to start at zero: a scale of zero would keep it there
STRICT = 16  # with what repeats: it adds a 64th to a layer's gain, where half of hidden's directions have none of it
LEAST_MOMENT = 1e-6  # of hidden
CONTEXTS = 64  # over which hidden is measured, at least
AT_ONCE, IN_ALL = 1 << 22, 1 << 27  # numbers of hidden that are measured; of more than CONTEXTS contexts


def start_scales(found: Mapping[str, Found], init: str, nonlinearity: str) -> dict[str, float]:
    """The standard deviation that each target is to have at the start, by Chang et al. 2020.

    With c = 2 for relu and 1 otherwise, a weight varies by `c / (k d_in)`, where k is 2 if the bias of its layer is
    generated too and 1 else, and that bias by `c / 2`; or, by fan_out, `c / d_out` and
    `max(0, c (1 - d_in / d_out))`, but `LEAST_VARIANCE` for that 0: what is scaled by nothing cannot learn.
    """
    c = 2.0 if nonlinearity == "relu" else 1.0
    scales = {}
    for name, target in found.items():
        is_bias = len(target.shape) == 1
        layer = name.removesuffix("bias" if is_bias else "weight")
        d_out, d_in = found.get(f"{layer}weight", target).fans
        if is_bias:
            variance = c / 2 if init == "fan_in" else max(LEAST_VARIANCE, c * (1 - d_in / d_out))
        elif init == "fan_in":
            variance = c / ((1 + (f"{layer}bias" in found)) * d_in)
        else:
            variance = c / d_out
        scales[name] = variance**0.5
    return scales


def normal_contexts(features: int | None, width: int, like: Tensor) -> Tensor | None:
    """Standard normal z `[*, features]`, enough of them to show all of hidden's directions; none of a static
    hypernetwork."""
    if features is None:
        return None
    return torch.randn(max(CONTEXTS, 2 * width), features, dtype=like.dtype, device=like.device)


class Moments(NamedTuple):
    """Of a target's chunks, over some contexts: hidden's second moment `[m, m]`, and that of pairs of chunks in a row,
    times a row's length, and in a column, times a column's; and the largest that chance would show there."""

    hidden: Tensor
    repeated: Tensor
    chance: float


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Every part's mode comes back after."""
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@torch.no_grad()
def moments(
    hypernet: Callable[[Tensor | None], Tensor | AdditiveHidden],
    contexts: Tensor | None,
    targets: Sequence[tuple[slice, int]],
) -> list[Moments]:
    """Of each target: which of the chunks are its, row by row, and how many a row has. A first context shows how many
    there are in all, and so how many contexts are measured at once and in all."""
    if contexts is not None and not len(contexts):
        raise ValueError("context: got none, wanted one at least to measure by")
    sums: list[list[Any]] = [[0.0, 0.0, 0.0] for _ in targets]  # of squares: of hidden, of rows and columns of it
    sizes = [(0, 0)] * len(targets)
    seen, chunks, begin, some, count = 0, 0, 0, 1, 1 if contexts is None else len(contexts)
    while begin < count:
        z = None if contexts is None else contexts[begin : begin + some]
        hidden = hypernet(z)
        dense = hidden.materialize() if isinstance(hidden, AdditiveHidden) else hidden
        chunks = chunks or dense[..., 0].numel()
        every = dense.float().reshape(-1, chunks, dense.shape[-1])  # one context's, of a trunk that does not look at z
        for n, (part, columns) in enumerate(targets):
            grid = every[:, part].unflatten(1, (-1, columns))
            sizes[n] = grid.shape[1], columns
            for k, values in enumerate((grid, grid.sum(2), grid.sum(1))):
                flat = values.reshape(-1, values.shape[-1])
                sums[n][k] = sums[n][k] + flat.mT @ flat
        seen += len(every)
        numbers = max(1, every[0].numel())
        begin, some, count = begin + some, max(1, AT_ONCE // numbers), min(count, max(CONTEXTS, IN_ALL // numbers))
    return [_means(own, *size, seen) for own, size in zip(sums, sizes)]


def _means(sums: list[Tensor], I: int, J: int, seen: int) -> Moments:
    squares, of_rows, of_columns = sums
    hidden = squares / (I * J * seen)
    repeated, chance = torch.zeros_like(hidden), 0.0
    for summed, length, lines in ((of_rows, J, I * seen), (of_columns, I, J * seen)):
        if length > 1:  # a sum's square is those of its chunks, and twice each pair
            repeated += (summed / lines - length * hidden) / (length - 1)
            chance += 4 * len(hidden) / lines
    return Moments(hidden, repeated, chance**0.5)


def _apart(own: Sequence[Moments]) -> Tensor:
    """`(I + STRICT R / v)^-1` `[m, m]`, to draw a head by: R what is `repeated` beyond chance, and v hidden's second
    moment.

    What the chunks of a row or column have in common, by their context or by their place, repeats one block along it.
    Outputs then are alike, or meet inputs that are alike with a gain that grows by the number of blocks, though each
    weight varies as it should: after a few layers activations explode. So the head is drawn smaller where hidden has
    much in common. (Contexts then differ less: what they have of their own is partly in there.)
    """
    variance = torch.stack([target.hidden.trace() for target in own]).mean() / len(own[0].hidden)
    repeated = torch.stack([target.repeated for target in own]).mean(0) / variance.clamp_min(LEAST_MOMENT)
    chance = sum(target.chance for target in own) / len(own)
    values, vectors = torch.linalg.eigh(repeated.nan_to_num(0.0, 0.0, 0.0))  # of a trunk that is yet to be filled
    return vectors / (1 + STRICT * (values - chance).clamp_min(0)) @ vectors.mT


@torch.no_grad()
def draw_head_(head: Tensor, own: Sequence[Moments]) -> list[Tensor]:
    """A head `[*, m, numbers]` for the targets that read it, and how each then varies. Chunks with a head each have
    nothing in common."""
    if head.dim() > 2:
        head.normal_()
        return [target.hidden.trace().clamp_min(LEAST_MOMENT) for target in own]
    apart = _apart(own)
    head.copy_(apart @ torch.randn_like(head, dtype=torch.float32))
    return [(apart @ target.hidden @ apart).trace().clamp_min(LEAST_MOMENT) for target in own]


@torch.no_grad()
def start_heads_(
    heads: Sequence[Tensor],
    scales: Tensor | None,
    head_of: Sequence[int],
    starts: Sequence[float],
    found: list[Moments],
) -> None:
    """Heads `[*, m, numbers]`, such that target l, which reads head `head_of[l]`, varies by `starts[l]` squared where
    its hidden is as `found[l]`: what its head's targets have in common the head has, the rest `scales[l]`, where there
    are scales."""
    for n, head in enumerate(heads):
        own = [target for target, other in enumerate(head_of) if other == n]
        variances = torch.stack(draw_head_(head, [found[target] for target in own]))
        wanted = [starts[target] for target in own]
        common = wanted[0] if len(set(wanted)) == 1 and scales is not None else 1.0
        head.mul_((common * variances.mean().rsqrt()).to(head.dtype))
        if scales is not None:
            rest = torch.tensor(wanted, device=head.device) / common
            scales[own] = (rest * (variances.mean() / variances).sqrt()).to(scales.dtype)
