"""Time and memory against the number of weights that a layer has, or that its contexts have."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

import hyperkernels as hk
from hyperkernels.bench.case import OURS, Case, Contestants
from hyperkernels.bench.linear import AS_PLANNED, Ours, unusual
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
    ours: Ours = AS_PLANNED,
) -> Case:
    """Forward and backward of a square layer in chunks that the planner picks: against a dense layer, and the same
    function with the weight formed, as long as the machine has memory for those."""
    size = round(math.sqrt(weights))
    generated = hk.HyperLinear(size, size, width=m, bias=False, device=device, dtype=dtype)
    hidden, grid = generated.hidden()[0], generated.grid
    assert isinstance(hidden, Tensor)
    name = f"forward and backward, {size:,}x{size:,}, chunks {grid.rows}x{grid.cols}, m={m}, B={B}" + unusual(dtype)
    x, dy = (torch.randn(B, size, device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    ours.check(name, canonical_form(x, hidden, generated.head, out_features=size).call)
    picked = torch.arange(0, size, max(1, size // 16), device=device)  # of outputs and of inputs, those that are judged

    def step(module: nn.Module) -> dict[str, Tensor]:
        y = module(x)
        y.backward(dy)
        assert x.grad is not None
        found = {"y": y.detach()[:, picked], "dx": x.grad[:, picked]}
        module.zero_grad()  # here, so that gradients are memory of the step that made them
        x.grad = None
        return found

    def run(backend: str | None, order: str | None = None) -> dict[str, Tensor]:
        generated.backend, generated.order = backend, order
        return step(generated)

    def line_by_line(dtype: torch.dtype) -> dict[str, Tensor]:
        """Of the weight's rows and columns, each of which is formed alone."""
        with torch.no_grad():
            own, head = hidden.to(dtype), generated.head.to(dtype)
            rows = torch.einsum("njk,knq->njq", own[picked // grid.rows], head[:, picked % grid.rows])
            cols = torch.einsum("ink,krn->irn", own[:, picked // grid.cols], head[:, :, picked % grid.cols])
            y = x.to(dtype) @ rows.flatten(1)[:, :size].T
            return {"y": y, "dx": dy.to(dtype) @ cols.flatten(0, 1)[:size]}

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
    judged = {"materialise": lambda: line_by_line(dtype), OURS: contestants[OURS]}  # where nothing eager fits
    return Case(
        name,
        contestants,
        lambda: line_by_line(torch.float64),
        missing=left_out,
        proof=Case("", judged, lambda: line_by_line(torch.float64)) if left_out else None,
        values={"N": size, "K": size, "chunk": [grid.rows, grid.cols], "m": m, "B": B, "weights": size * size},
    )
