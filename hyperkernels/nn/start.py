"""How a hypernetwork starts: by the variance of what it generates, and of what its trunk makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hyperkernels.hidden import AdditiveHidden
from hyperkernels.nn.targets import Found

LEAST_VARIANCE = 1e-4  # of what is to start at zero: a scale of zero would keep it there
CONTEXTS = 16  # over which hidden's second moment is measured


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


def second_moments(
    hypernet: Callable[[Tensor | None], Tensor | AdditiveHidden], contexts: Iterable[Tensor | None]
) -> Tensor:
    """Mean of hidden squared over its width, of each context and chunk in their order: exact for a static one."""
    moments = []
    for z in contexts:
        hidden = hypernet(z)
        dense = hidden.materialize() if isinstance(hidden, AdditiveHidden) else hidden
        moments.append(dense.float().square().mean(-1).flatten())
    return torch.cat(moments).clamp_min(1e-6)


@torch.no_grad()
def start_heads_(
    heads: Sequence[Tensor], scales: Tensor | None, head_of: Sequence[int], starts: Sequence[float], moments: Tensor
) -> None:
    """Heads `[*, m, numbers]`, such that target l, which reads head `head_of[l]`, varies by `starts[l]` squared where
    the second moment of its hidden is `moments[l]`: what its head's targets have in common the head has, the rest
    `scales[l]`, where there are scales."""
    for n, head in enumerate(heads):
        own = [target for target, other in enumerate(head_of) if other == n]
        wanted, found = [starts[target] for target in own], moments[own]
        common = wanted[0] if len(set(wanted)) == 1 and scales is not None else 1.0
        head.normal_().mul_((common * (head.shape[-2] * found.mean()).rsqrt()).to(head.dtype))
        if scales is not None:
            rest = torch.tensor(wanted, device=head.device) / common
            scales[own] = (rest * (found.mean() / found).sqrt()).to(scales.dtype)
