"""Time and memory against the number of weights that a layer has, or that its contexts have."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import hyperkernels as hk
from hyperkernels.bench.case import OURS, Case, Contestants
from hyperkernels.bench.linear import Ours

COPIES = 3  # of its weights that a dense step holds at once: they, their gradient, and what forms them


def free_bytes() -> int:
    """Of memory, as Linux counts it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def layer(weights: float, B: int = 4, m: int = 16, ours: Ours = Ours()) -> Case:  # noqa: B008 - frozen
    """Forward and backward of a square layer in chunks that the planner picks: against a dense layer, and the same
    function with the weight formed, as long as the machine has memory for those."""
    size = round(math.sqrt(weights))
    generated = hk.HyperLinear(size, size, width=m, bias=False)
    hidden, grid = generated.hidden()[0], generated.grid
    assert isinstance(hidden, Tensor)
    x = torch.randn(B, size, requires_grad=True)
    picked = torch.arange(0, size, max(1, size // 16))  # neurons that are judged

    def run(backend: str | None, order: str | None = None) -> dict[str, Tensor]:
        generated.backend, generated.order = backend, order
        generated.zero_grad()  # as after an optimizer's step: nobody pays for adding to what was there
        y = generated(x)
        y.square().mean().backward()
        return {"y": y.detach()[:, picked]}

    def exact() -> dict[str, Tensor]:
        """Neuron by neuron, each of whose weights is formed alone."""
        with torch.no_grad():
            rows = hidden.double()[picked // grid.rows]
            heads = generated.head.double()[:, picked % grid.rows]
            weight = torch.einsum("njk,knq->njq", rows, heads).flatten(1)[:, :size]
            return {"y": x.double() @ weight.T}

    contestants: Contestants = {}
    needed, free = 4 * COPIES * size * size, free_bytes()
    left_out = {}
    if needed < free / 2:
        dense = nn.Linear(size, size, bias=False)
        contestants["dense"] = _step(dense, x)
        contestants["materialise"] = lambda: run("reference")
    else:
        why = f"it would hold {needed >> 20:,} MiB of weights; {free >> 20:,} MiB are free"
        left_out = {"dense": why, "materialise": why}
    contestants[OURS] = lambda: run(ours.backend, ours.order)
    eager = "materialise" if "materialise" in contestants else OURS
    return Case(
        f"forward and backward, {size:,}x{size:,}, chunks {grid.rows}x{grid.cols}, m={m}, B={B}",
        contestants,
        exact,
        eager,
        missing=left_out,
        values={"N": size, "K": size, "chunk": [grid.rows, grid.cols], "m": m, "B": B, "weights": size * size},
        check=None if eager != OURS else lambda: _close(run(ours.backend, ours.order)["y"], exact()["y"]),
    )


def _step(module: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad()
        module(x).square().mean().backward()

    return run


def _close(y: Tensor, exact: Tensor) -> None:
    """Where nothing eager fits: fp32's rounding of a sum this long."""
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-4)
