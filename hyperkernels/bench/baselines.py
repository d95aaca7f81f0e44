"""Everything that ours is measured against, by name; each is imported here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hyperkernels as hk
from hyperkernels.backends import native_cpu
from hyperkernels.bench.case import first_line

BASELINES = {
    "dense": "the dense layer: torch's own linear or convolution, its weight there",
    "dense-tuned": "a dense layer by our own tiles, its weight packed beforehand (cpu, fp32)",
    "dense-onednn": "a dense layer by oneDNN's brgemm, its weight laid out for it beforehand (cpu, fp32)",
    "materialise": "weights formed by eager torch, then the dense layer",
    "materialise-compiled": "the same under torch.compile",
    "einsum": "torch.einsum over all three factors, on opt_einsum's path",
    "hypnettorch": "hypnettorch's chunked hypernetwork, then a dense layer for each context",
    "hyperlight": "hyperlight's hypernetwork, then one batched product",
    "grouped-conv": "a kernel formed for each image, then one convolution with a group for each",
    "fastkron": "FastKron (pyfastkron), a Kronecker product for each of the width",
}
MODULES = {"hypnettorch": "hypnettorch", "hyperlight": "hyperlight", "fastkron": "pyfastkron", "einsum": "opt_einsum"}


def missing(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Why a baseline cannot run here; nothing where it can."""
    module = MODULES.get(name)
    if module is not None and find_spec(module) is None:
        return f"{module} is not installed"
    if name == "dense-tuned" and native_cpu.MISSING:
        return native_cpu.MISSING
    if name in ("dense-tuned", "dense-onednn") and (device != "cpu" or dtype != torch.float32):
        return "it is for fp32 on a CPU"
    if name == "fastkron" and dtype not in (torch.float32, torch.float64):
        return f"it has no {dtype}"
    if name in ("hypnettorch", "hyperlight") and device != "cpu":
        return "its cases are set up on a CPU"
    return ""


def add(contestants: dict[str, Any], left_out: dict[str, str], name: str, make: Callable[[], Any], *where: Any) -> None:
    """A contestant made by `make`, or the reason why it is not there."""
    why = missing(name, *where)
    if not why:
        try:
            contestants[name] = make()
            return
        except (ImportError, AttributeError, RuntimeError, OSError) as error:
            why = first_line(error)
    left_out[name] = why


def tuned_dense(x: Tensor, weight: Tensor) -> Callable[[], dict[str, Tensor]]:
    """`F.linear(x, weight)` by the native engine's tiles; both are contiguous."""
    N, K = weight.shape
    layer = import_module("hyperkernels._cpu").Dense(weight.data_ptr(), N, K)

    def run() -> dict[str, Tensor]:
        y = torch.empty(len(x), N)
        layer.run(x.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads())
        return {"y": y}

    return run


def onednn_dense(x: Tensor, weight: Tensor) -> Callable[[], dict[str, Tensor]]:
    """`F.linear(x, weight)` by the operators that torch's compiler uses for weights that stay."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))

    @torch.no_grad()
    def run() -> dict[str, Tensor]:
        return {"y": torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")}

    return run


def fastkron(shape: tuple[int, int], x: Tensor, hidden: Tensor, head: Tensor) -> Callable[[], dict[str, Tensor]]:
    """`y = sum_k x (hidden_k kron head_k)^T`."""
    if (hidden.shape[0] * head.shape[1], hidden.shape[1] * head.shape[2]) != shape:
        raise RuntimeError("its factors cannot be cropped")
    product = import_module("pyfastkron.fastkrontorch").gemkm
    pairs = [(a.T.contiguous(), b.T.contiguous()) for a, b in zip(hidden.permute(2, 0, 1), head)]

    @torch.no_grad()
    def run() -> dict[str, Tensor]:
        y = product(x, list(pairs[0]))
        for pair in pairs[1:]:
            y += product(x, list(pair))
        return {"y": y}

    return run


def hypnettorch(N: int, K: int, chunk: int, m: int, context: int, activation: nn.Module) -> Any:
    """Its chunked hypernetwork for one weight `[N, K]`, whose trunk has one hidden layer of m."""
    net = import_module("hypnettorch.hnets").ChunkedHMLP(
        [[N, K]],
        chunk_size=chunk,
        chunk_emb_size=8,
        layers=(m,),
        cond_in_size=context,
        no_cond_weights=True,
        num_cond_embs=0,
        activation_fn=activation,
        verbose=False,
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def hyperlight(N: int, K: int, m: int, context: int) -> Any:
    """Its hypernetwork of one hidden layer of m, from a context to a whole weight `[N, K]`."""
    net = import_module("hyperlight").HyperNet(
        input_shapes={"z": (context,)}, output_shapes={"w": (N, K)}, hidden_sizes=[m]
    )
    return net.requires_grad_(False)


def grouped_conv(x: Tensor, weights: Tensor, **settings: Any) -> Tensor:
    """Image b of x `[B, C, *size]` by kernel b of `[B, N, C, *kernel]`, in one call."""
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weights.flatten(0, 1), groups=len(x), **settings)
    return y.view(len(x), -1, *y.shape[2:])


def materialised(shape: tuple[int, int], x: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    """`F.linear` with the weight formed, of one context."""
    return F.linear(x, hk.generate_weight(hidden, head, shape))


def compiled() -> Callable[..., Tensor]:
    """`materialised` under torch.compile, for one shape: what it compiled for others is forgotten, of which it would
    after a few take no more."""
    torch.compiler.reset()
    return torch.compile(materialised, dynamic=False)


def einsum(shape: tuple[int, int], x: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    """Of whole chunks, to which x is padded where the last is cropped."""
    J, cols = hidden.shape[1], head.shape[2]
    whole = x if J * cols == shape[1] else F.pad(x, (0, J * cols - shape[1]))
    y = torch.einsum("krq,bjq,ijk->bir", head, whole.view(len(x), J, cols), hidden)
    return y.reshape(len(x), -1)[:, : shape[0]]
