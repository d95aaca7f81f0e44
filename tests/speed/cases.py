"""Cases of the repository's own that no suite has: what is told of generated weights, a layer's fit, a call's cost."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import hyperkernels as hk
from hyperkernels.algebra import output_regularizer
from hyperkernels.bench.case import OURS, Case, Contestants
from hyperkernels.weight import AbsentWeight, form


def regularizer(tasks: int, layers: int, size: int, m: int, chunk: tuple[int, int] | int = (64, 64)) -> Case:
    """von Oswald et al.'s output regulariser and its gradients, of all earlier tasks: against all their weights formed,
    now and as they were. A chunk of one number is one of a flat vector."""
    shapes = {str(n): (size, size) for n in range(layers)}
    layout = "flat" if isinstance(chunk, int) else "tiles"
    net = hk.HyperNet(shapes, context_features=32, chunk=chunk, width=m, layout=layout)
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

    weights, cut = layers * size * size, f"{chunk}" if isinstance(chunk, int) else "x".join(map(str, chunk))
    contestants: Contestants = {
        "materialise": lambda: step(formed),
        OURS: lambda: step(output_regularizer),
    }
    return Case(
        f"output regulariser and its gradients, {tasks} tasks, {weights / 1e6:.2g}M weights, chunks {cut}, m={m}",
        contestants,
        exact,
        values={"contexts": tasks, "weights": weights, "m": m},
    )


def generated_weight() -> Case:
    """What `F.linear` of a `GeneratedWeight` costs beside `hyper_linear` of what it is made of."""
    hidden, head, x = torch.randn(8, 8, 16), torch.randn(16, 8, 8), torch.randn(1, 64)
    weight = hk.GeneratedWeight(hidden, head, (64, 64))

    def many(call: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for _ in range(1000):
                    call()

        return run

    def check() -> None:
        assert torch.equal(F.linear(x, weight), hk.hyper_linear(x, hidden, head))

    contestants: Contestants = {
        "hyper_linear": many(lambda: hk.hyper_linear(x, hidden, head)),
        OURS: many(lambda: F.linear(x, weight)),
    }
    return Case("1000 calls of F.linear with a GeneratedWeight, 64x64", contestants, check=check)


def fitted(size: int, chunk: tuple[int, int], m: int) -> Case:
    """The closed-form fit, and the least of it: the singular vectors of W as its chunks lie."""
    weight = torch.randn(size, size) @ torch.diag(torch.arange(1, size + 1) ** -0.5)

    def check() -> None:
        hidden, head, error = hk.fit(weight, chunk, m)
        found = (weight - hk.generate_weight(hidden, head, weight.shape)).double().norm() / weight.double().norm()
        assert abs(error - found.item()) < 1e-6

    contestants: Contestants = {
        "torch.svd_lowrank": lambda: torch.svd_lowrank(weight, m + 32, 6),
        OURS: lambda: hk.fit(weight, chunk, m),
    }
    return Case(f"fit a {size}x{size} layer, chunks {chunk[0]}x{chunk[1]}, m={m}", contestants, check=check)
