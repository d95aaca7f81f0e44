"""Time and memory against the number of weights that a layer has, or that its contexts have."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

import hyperkernels as hk
from hyperkernels.bench.case import OURS, Case, Contestants
from hyperkernels.bench.linear import Ours, unusual
from hyperkernels.form import canonical_form

COPIES = 3  # of its weights that a dense step holds at once: they, their gradient, and what forms them


def free_bytes(device: str) -> int:
    """Of the device's memory; a CPU's as Linux counts it."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def layer(
    weights: float,
    B: int = 4,
    m: int = 16,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    ours: Ours = Ours(),  # noqa: B008 - frozen
) -> Case:
    """Forward and backward of a square layer in chunks that the planner picks: against a dense layer, and the same
    function with the weight formed, as long as the machine has memory for those."""
    size = round(math.sqrt(weights))
    generated = hk.HyperLinear(size, size, width=m, bias=False, device=device, dtype=dtype)
    hidden, grid = generated.hidden()[0], generated.grid
    assert isinstance(hidden, Tensor)
    name = f"forward and backward, {size:,}x{size:,}, chunks {grid.rows}x{grid.cols}, m={m}, B={B}" + unusual(dtype)
    x = torch.randn(B, size, device=device, dtype=dtype, requires_grad=True)
    ours.check(name, canonical_form(x, hidden, generated.head, out_features=size).call)
    picked = torch.arange(0, size, max(1, size // 16), device=device)  # neurons that are judged

    def step(module: nn.Module) -> dict[str, Tensor]:
        module.zero_grad()  # as after an optimizer's step: nobody pays for adding to what was there
        y = module(x)
        y.square().mean().backward()
        return {"y": y.detach()[:, picked]}

    def run(backend: str | None, order: str | None = None) -> dict[str, Tensor]:
        generated.backend, generated.order = backend, order
        return step(generated)

    def neuron_by_neuron(dtype: torch.dtype) -> dict[str, Tensor]:
        """Each of whose weights is formed alone."""
        with torch.no_grad():
            rows = hidden.to(dtype)[picked // grid.rows]
            heads = generated.head.to(dtype)[:, picked % grid.rows]
            weight = torch.einsum("njk,knq->njq", rows, heads).flatten(1)[:, :size]
            return {"y": x.to(dtype) @ weight.T}

    contestants: Contestants = {}
    needed, free = x.itemsize * COPIES * size * size, free_bytes(device)
    left_out = {}
    if needed < free / 2:
        dense = nn.Linear(size, size, bias=False, device=device, dtype=dtype)
        with torch.no_grad():
            dense.weight.copy_(generated.to_dense().weight)
        contestants["dense"] = lambda: step(dense)
        contestants["materialise"] = lambda: run("reference")
    else:
        why = f"it would hold {needed >> 20:,} MiB of weights; {free >> 20:,} MiB are free"
        left_out = {"dense": why, "materialise": why}
    contestants[OURS] = lambda: run(ours.backend, ours.order)
    judged = {"materialise": lambda: neuron_by_neuron(dtype), OURS: contestants[OURS]}  # where nothing eager fits
    return Case(
        name,
        contestants,
        lambda: neuron_by_neuron(torch.float64),
        missing=left_out,
        proof=Case("", judged, lambda: neuron_by_neuron(torch.float64)) if left_out else None,
        values={"N": size, "K": size, "chunk": [grid.rows, grid.cols], "m": m, "B": B, "weights": size * size},
    )
