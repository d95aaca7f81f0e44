"""What is told of generated weights without forming them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import hyperkernels as hk
from hyperkernels.algebra import output_regularizer
from hyperkernels.bench.case import OURS, Case, Contestants
from hyperkernels.weight import AbsentWeight, form


def regularizer(tasks: int, layers: int, size: int, m: int) -> Case:
    """von Oswald et al.'s output regulariser and its gradients, of all earlier tasks: against all their weights formed,
    now and as they were."""
    shapes = {str(n): (size, size) for n in range(layers)}
    net = hk.HyperNet(shapes, context_features=32, chunk=(64, 64), width=m)
    z, parameters = torch.randn(tasks, 32), list(net.parameters())
    before = copy.deepcopy(net).requires_grad_(False)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.01 * torch.randn_like(parameter))

    def formed(weights: dict[str, AbsentWeight], earlier: dict[str, AbsentWeight]) -> Tensor:
        moved = [(form(weights[n]) - form(earlier[n])).square().flatten(1).sum(1) for n in weights]
        return torch.stack(moved).sum(0).mean()

    def step(penalty: Callable[..., Tensor]) -> dict[str, Tensor]:
        net.zero_grad()
        value = penalty(net(z), before(z))
        value.backward()
        return {"value": value.detach(), **{n: p.grad for n, p in net.named_parameters() if p.grad is not None}}

    def exact() -> dict[str, Tensor]:
        high, old = copy.deepcopy(net).double(), copy.deepcopy(before).double()
        high.zero_grad()
        value = formed(high(z.double()), old(z.double()))
        value.backward()
        return {"value": value.detach(), **{n: p.grad for n, p in high.named_parameters() if p.grad is not None}}

    weights = layers * size * size
    contestants: Contestants = {
        "materialise": lambda: step(formed),
        OURS: lambda: step(output_regularizer),
    }
    return Case(
        f"output regulariser and its gradients, {tasks} tasks, {weights / 1e6:.2g}M weights, chunks 64x64, m={m}",
        contestants,
        exact,
        values={"contexts": tasks, "weights": weights, "m": m},
    )
