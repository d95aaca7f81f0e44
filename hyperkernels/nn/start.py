"""How a hypernetwork starts: by the variance of what it generates, and of what its trunk makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperkernels.hidden import AdditiveHidden
from hyperkernels.nn.targets import Found

LEAST_VARIANCE = 1e-4  # of what is to start at zero: a scale of zero would keep it there
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


class Seen(NamedTuple):
    """What some contexts showed of a target's chunks: hidden's second moment `[m, m]`, and that of its mean over the
    chunks, weighed by how many more than one there are; None of one chunk."""

    moment: Tensor
    common: Tensor | None


@torch.no_grad()
def seen(
    hypernet: Callable[[Tensor | None], Tensor | AdditiveHidden],
    contexts: Tensor | None,
    parts: Sequence[slice] = (slice(None),),
) -> list[Seen]:
    """Of each part of the chunks, in their order, which are a target's. A first context shows how many there are, and
    so how many contexts are measured at once and in all."""
    moments: list[Any] = [0.0] * len(parts)
    means: list[list[Tensor]] = [[] for _ in parts]
    sizes, chunks, begin, some, count = [0] * len(parts), 0, 0, 1, 1 if contexts is None else len(contexts)
    while begin < count:
        z = None if contexts is None else contexts[begin : begin + some]
        hidden = hypernet(z)
        dense = hidden.materialize() if isinstance(hidden, AdditiveHidden) else hidden
        chunks = chunks or dense[..., 0].numel()
        rows = dense.float().reshape(-1, chunks, dense.shape[-1])  # one context's, of a trunk that does not look at z
        for n, part in enumerate(parts):
            own = rows[:, part]
            flat, sizes[n] = own.flatten(0, 1), own.shape[1]
            moments[n] = moments[n] + flat.mT @ flat
            means[n].append(own.mean(1))
        numbers = max(1, rows[0].numel())
        begin, some, count = begin + some, max(1, AT_ONCE // numbers), min(count, max(CONTEXTS, IN_ALL // numbers))
    found = []
    for moment, size, own in zip(moments, sizes, means):
        mean = torch.cat(own)
        common = (size - 1) / len(mean) * mean.mT @ mean if size > 1 else None
        found.append(Seen(moment / (size * len(mean)), common))
    return found


def _apart(own: Sequence[Seen]) -> Tensor | None:
    """`(I + common / v)^-1` `[m, m]`, v hidden's second moment: to draw a head by. None where that is I.

    What all chunks of a context have in common repeats one block all over the weight. Such a weight meets inputs that
    repeat alike, as outputs of such a layer do, with a gain that grows by the number of blocks, though each weight
    varies as it should: after a few layers activations explode. So the head is drawn smaller where hidden has much in
    common. (Contexts then differ less: what they have of their own is partly in there.)
    """
    repeated = [target.common for target in own if target.common is not None]
    if not repeated:
        return None
    variance = torch.stack([target.moment.trace() for target in own]).mean() / len(own[0].moment)
    common = torch.stack(repeated).sum(0) / len(own) / variance.clamp_min(LEAST_MOMENT)
    return torch.linalg.inv(torch.eye(len(common)).to(common) + common)


@torch.no_grad()
def draw_head_(head: Tensor, own: Sequence[Seen], fixed: bool = True) -> list[Tensor]:
    """A head `[*, m, numbers]` for the targets that read it, and how each then varies. Chunks with a head each have
    nothing in common, and where targets are not fixed others will have something else."""
    apart = _apart(own) if fixed and head.dim() == 2 else None
    if apart is None:
        head.normal_()
        return [target.moment.trace().clamp_min(LEAST_MOMENT) for target in own]
    head.copy_(apart @ torch.randn_like(head, dtype=torch.float32))
    return [(apart @ target.moment @ apart).trace().clamp_min(LEAST_MOMENT) for target in own]


@torch.no_grad()
def start_heads_(
    heads: Sequence[Tensor], scales: Tensor | None, head_of: Sequence[int], starts: Sequence[float], found: list[Seen]
) -> None:
    """Heads `[*, m, numbers]`, such that target l, which reads head `head_of[l]`, varies by `starts[l]` squared where
    its hidden is as `found[l]`: what its head's targets have in common the head has, the rest `scales[l]`, where there
    are scales."""
    for n, head in enumerate(heads):
        own = [target for target, other in enumerate(head_of) if other == n]
        variances = torch.stack(draw_head_(head, [found[target] for target in own], scales is not None))
        wanted = [starts[target] for target in own]
        common = wanted[0] if len(set(wanted)) == 1 and scales is not None else 1.0
        head.mul_((common * variances.mean().rsqrt()).to(head.dtype))
        if scales is not None:
            rest = torch.tensor(wanted, device=head.device) / common
            scales[own] = (rest * (variances.mean() / variances).sqrt()).to(scales.dtype)
