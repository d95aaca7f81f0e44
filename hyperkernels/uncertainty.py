"""What an ensemble of generated networks says: means, variances, entropies. Noise or dropout makes the members, each a
context of one batched call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hyperkernels.chunking import check_sizes
from hyperkernels.weight import AbsentWeight


class Classes(NamedTuple):
    """Of an ensemble of classifiers: mean probabilities `[*, C]` and their variance over members; entropies in nats
    `[*]`: that of the mean, and how much of it is the members' disagreement (mutual information); the rest is noise."""

    mean: Tensor
    variance: Tensor
    entropy: Tensor
    disagreement: Tensor


class Values(NamedTuple):
    """Of an ensemble of regressors: mean and variance over members, `[*]`."""

    mean: Tensor
    variance: Tensor


def members(x: Tensor, count: int) -> Tensor:
    """x `[*]` once for each member, `[count, *]`, not copied: with `count` contexts each entry meets its own weights.

    Raises:
        TypeError, ValueError: x is no tensor, or count no positive integer.

    Example:
        >>> import torch, hyperkernels as hk
        >>> net = hk.HyperNet({"weight": (3, 6)}, context_features=4, encoder=hk.nn.Noise(4))
        >>> logits = torch.nn.functional.linear(hk.uncertainty.members(torch.randn(5, 6), 16), net(16)["weight"])
        >>> hk.uncertainty.of_classes(logits).entropy.shape
        torch.Size([5])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, wanted a tensor [*]")
    check_sizes(count=count)
    return x.expand(count, *x.shape)


def of_classes(logits: Tensor) -> Classes:
    """`mean = E_s softmax(logits_s)`, its entropy `H(mean)`, and the members' disagreement `H(mean) - E_s H(p_s)`.

    Args:
        logits: `[S, *, C]`, of S members; -inf for a class that cannot be.

    Raises:
        TypeError, ValueError: no floating tensor, fewer than two dimensions, or no member.
    """
    _check("logits", logits, 2, "[S, *, C]")
    p = logits.softmax(-1)
    mean = p.mean(0)
    entropy, of_each = _entropy(mean), _entropy(p).mean(0)
    return Classes(mean, p.var(0, correction=0), entropy, (entropy - of_each).clamp_min(0))


def _entropy(p: Tensor) -> Tensor:
    """`-sum_c p_c log p_c`, where 0 log 0 is 0, and so is its part of a gradient through a softmax."""
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


def of_values(y: Tensor) -> Values:
    """`E_s y_s` and `Var_s y_s` of y `[S, *]`, S members, one at least."""
    _check("y", y, 1, "[S, *]")
    return Values(y.mean(0), y.var(0, correction=0))


def _check(name: str, value: Tensor, dims: int, wanted: str) -> None:
    plain = isinstance(value, Tensor) and not isinstance(value, AbsentWeight)
    if not plain or not value.is_floating_point():
        got = value.dtype if plain else type(value).__name__
        raise TypeError(f"{name}: got {got}, wanted a floating tensor {wanted}")
    if value.dim() < dims or not len(value) or not value.shape[-1]:
        raise ValueError(f"{name}: got shape {list(value.shape)}, wanted {wanted}, one member at least")
