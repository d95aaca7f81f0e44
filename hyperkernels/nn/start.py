"""How a hypernetwork starts: by the variance of what it generates, and of what its trunk makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperkernels.hidden import AdditiveHidden
from hyperkernels.nn.targets import Found

LEAST_VARIANCE = 1e-4  # of what is to start at zero: a scale of zero would keep it there
LEAST_MOMENT = 1e-6  # of hidden
CONTEXTS = 64  # over which hidden is measured


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


def normal_contexts(features: int | None, like: Tensor) -> list[Tensor | None]:
    """A few standard normal z `[1, features]`; of a static hypernetwork, none of them once."""
    if features is None:
        return [None]
    return list(torch.randn(CONTEXTS, 1, features, dtype=like.dtype, device=like.device))


class Seen(NamedTuple):
    """What a few contexts showed of a target's chunks: hidden's second moments `[m, m]`, and those of its mean over the
    chunks, weighed by how many more than one there are."""

    all: Tensor
    common: Tensor


@torch.no_grad()
def seen(
    hypernet: Callable[[Tensor | None], Tensor | AdditiveHidden],
    contexts: Iterable[Tensor | None],
    parts: Sequence[slice] = (slice(None),),
) -> list[Seen]:
    """Of each part of the chunks, in their order, which are a target's: exact for a static hypernetwork."""
    found: list[list[Seen]] = [[] for _ in parts]
    for z in contexts:
        hidden = hypernet(z)
        dense = hidden.materialize() if isinstance(hidden, AdditiveHidden) else hidden
        rows = dense.float().flatten(0, -2)
        for part, own in zip(parts, found):
            h = rows[part]
            mean = h.mean(0)
            own.append(Seen(h.mT @ h / len(h), (len(h) - 1) * torch.outer(mean, mean)))
    return [Seen(*(torch.stack(moments).mean(0) for moments in zip(*own))) for own in found]


def _apart(own: Sequence[Seen]) -> Tensor:
    """`(I + common / v)^-1` `[m, m]`, v hidden's second moment: to draw a head by.

    What all chunks of a context have in common repeats one block all over the weight. Such a weight meets inputs that
    repeat alike, as outputs of such a layer do, with a gain that grows by the number of blocks, though each weight
    varies as it should: after a few layers activations explode. So the head is drawn smaller where hidden has much in
    common.
    """
    variance = torch.stack([target.all.trace() for target in own]).mean() / len(own[0].all)
    common = torch.stack([target.common for target in own]).mean(0)
    return torch.linalg.inv(torch.eye(len(common)).to(common) + common / variance.clamp_min(LEAST_MOMENT))


@torch.no_grad()
def draw_head_(head: Tensor, own: Sequence[Seen], fixed: bool = True) -> list[Tensor]:
    """A head `[*, m, numbers]` for the targets that read it, and how each then varies. Chunks with a head each have
    nothing in common, and where targets are not fixed others will have something else."""
    apart = _apart(own) if fixed and head.dim() == 2 else torch.eye(head.shape[-2], device=head.device)
    head.copy_(apart @ torch.randn_like(head, dtype=torch.float32))
    return [(apart @ target.all @ apart).trace().clamp_min(LEAST_MOMENT) for target in own]


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
