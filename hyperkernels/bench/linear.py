"""Linear layers of one context, and what of ours is forced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hyperkernels as hk
from hyperkernels.backends import BACKENDS, triton_fused
from hyperkernels.bench import baselines
from hyperkernels.bench.case import OURS, Case, Contestants, NotHere, results_of
from hyperkernels.call import Call
from hyperkernels.chunking import ceil_div
from hyperkernels.form import canonical_form


@dataclass(frozen=True)
class Ours:
    """What of ours is forced: nothing by default."""

    order: str | None = None
    backend: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"order": self.order, "backend": self.backend}

    def check(self, name: str, call: Call) -> None:
        """Raises NotHere where the backend that was asked for cannot do the call."""
        if self.backend is not None:
            able, reason = BACKENDS[self.backend].supports(call, self.order)
            if not able:
                raise NotHere(name, f"{self.backend}: {reason}")


AS_PLANNED = Ours()


def with_triton(
    contestants: Contestants, missing: dict[str, str], make: Callable[..., Callable[[], Any]], call: Call, ours: Ours
) -> None:
    """Ours by the Triton kernels beside ours as planned, where there may be any and nobody asked for a backend."""
    if ours.backend is None and find_spec("triton") and (call.device == "cuda" or triton_fused.interpreted()):
        able, reason = BACKENDS["triton"].supports(call, ours.order)
        if able:
            contestants["triton"] = make(backend="triton", order=ours.order)
        else:
            missing["triton"] = reason


def linear(
    shape: tuple[int, int],
    chunk: tuple[int, int],
    m: int,
    B: int,
    *,
    train: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    ours: Ours = AS_PLANNED,
    more: bool = False,
) -> Case:
    """One context: against a dense layer of the same weight, and the same function with the weight formed. With `more`
    also the baselines that are slow to set up."""
    (N, K), (rows, cols) = shape, chunk
    I, J = ceil_div(N, rows), ceil_div(K, cols)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, dtype=dtype).requires_grad_()

    what = "forward and backward" if train else "forward"
    name = f"{what}, {N}x{K}, chunks {rows}x{cols}, m={m}, B={B}" + unusual(dtype)
    x, hidden, head, dy = draw(B, K), draw(I, J, m), draw(m, rows, cols), draw(B, N).detach()
    leaves = [x, hidden, head]
    planned = canonical_form(x, hidden, head, out_features=N).call
    ours.check(name, planned)
    weight = hk.generate_weight(hidden, head, shape).detach().contiguous().requires_grad_()

    def run(call: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor = dy) -> dict[str, Tensor]:
        return results_of(call, leaves, dy if train else None)

    contestants: Contestants = {"dense": lambda: run(F.linear, [x, weight])}
    left_out: dict[str, str] = {}
    add = partial(baselines.add, contestants, left_out)
    if not train:
        add("dense-tuned", lambda: baselines.tuned_dense(x.detach(), weight.detach()), device, dtype)
    if more and not train:
        add("dense-onednn", lambda: baselines.onednn_dense(x.detach(), weight.detach()), device, dtype)
    contestants["materialise"] = lambda: run(partial(baselines.materialised, shape), leaves)
    if more:
        add("materialise-compiled", lambda: partial(run, partial(baselines.compiled(), shape), leaves))
    add("einsum", lambda: lambda: run(partial(baselines.einsum, shape), leaves))
    if more and not train:
        add("fastkron", lambda: baselines.fastkron(shape, *(v.detach() for v in leaves)), device, dtype)

    def layer(**settings: Any) -> Callable[[], Any]:
        return lambda: run(partial(hk.hyper_linear, out_features=N, **settings), leaves)

    contestants[OURS] = layer(**ours.settings)
    with_triton(contestants, left_out, layer, planned, ours)

    def exact() -> dict[str, Tensor]:
        return run(
            partial(baselines.materialised, shape), [v.detach().double().requires_grad_() for v in leaves], dy.double()
        )

    return Case(
        name,
        contestants,
        exact,
        missing=left_out,
        counted={
            **dict.fromkeys(("dense-tuned", "dense-onednn"), contestants["dense"]),
            "fastkron": layer(backend="torch", order="head_first"),
        },
        call=planned,
        outputs=("y", "hidden", "head", "x") if train else ("y",),
        values={"N": N, "K": K, "chunk": list(chunk), "m": m, "B": B, "weights": N * K},
    )


def unusual(dtype: torch.dtype) -> str:
    """A dtype that a case's name does not go without."""
    return "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
