"""What is told of generated weights without forming them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from cases import OURS, Case
from torch import Tensor

import hyperkernels as hk
from hyperkernels.algebra import output_regularizer
from hyperkernels.testing import assert_no_worse_than_eager
from hyperkernels.weight import AbsentWeight, form


def regularizer(tasks: int, layers: int, size: int, m: int, *, faster: dict[str, float]) -> Case:
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

    def step(penalty: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        net.zero_grad()
        value = penalty(net(z), before(z))
        value.backward()
        return (value.detach(), *(p.grad for p in parameters if p.grad is not None))

    def check() -> None:
        exact, old = copy.deepcopy(net).double(), copy.deepcopy(before).double()
        value = formed(exact(z.double()), old(z.double()))
        wanted = (value.detach(), *torch.autograd.grad(value, list(exact.parameters())))
        for n, values in enumerate(zip(step(output_regularizer), step(formed), wanted)):
            assert_no_worse_than_eager(f"result {n}", *values)

    weights = layers * size * size
    name = f"output regulariser and its gradients, {tasks} tasks, {weights / 1e6:.2g}M weights, chunks 64x64, m={m}"
    contestants = {"materialise": lambda: step(formed), OURS: lambda: step(output_regularizer)}
    return Case(name, contestants, check, faster)


ALGEBRA_CASES: dict[str, Callable[[], Case]] = {
    "algebra_regularizer": lambda: regularizer(10, 4, 512, 16, faster={"materialise": 20}),
    "algebra_regularizer_wide": lambda: regularizer(10, 4, 512, 32, faster={"materialise": 20}),
}
