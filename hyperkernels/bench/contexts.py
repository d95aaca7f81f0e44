"""Linear layers of many contexts, through an additive hidden layer or a trunk of their own."""

from __future__ import annotations

import copy
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hyperkernels as hk
from hyperkernels.backends import native_cpu
from hyperkernels.bench import baselines
from hyperkernels.bench.case import OURS, Case, Contestants, NotHere
from hyperkernels.bench.linear import AS_PLANNED, Ours, unusual, with_triton
from hyperkernels.chunking import ceil_div
from hyperkernels.form import canonical_form
from hyperkernels.testing import peak_bytes


def contexts(
    G: int,
    activation: str = "relu",
    N: int = 1024,
    K: int = 1024,
    rows: int = 16,
    cols: int = 64,
    m: int = 32,
    ours: Ours = AS_PLANNED,
) -> Case:
    """A context for each sample, through a trunk of one hidden layer: against hypnettorch's chunked hypernetwork.

    Both sides hold hypnettorch's own parameters. Its flat chunks are laid out as ours are, `rows x cols` tiles of W,
    and the generated weights are checked to be the same numbers.
    """
    if N % rows or K % cols:
        raise NotHere(
            "a context per sample", f"chunks of {rows}x{cols} do not divide {N}x{K}, as hypnettorch's have to"
        )
    I, J, embedding, context = N // rows, K // cols, 8, 16
    x, z = torch.randn(G, K), torch.randn(G, context)
    left_out: dict[str, str] = {}
    contestants: Contestants = {}
    why = baselines.missing("hypnettorch")
    if why:
        left_out["hypnettorch"] = why
        shapes = ((m, embedding + context), (m,), (rows * cols, m), (rows * cols,), (I * J, embedding))
        trunk, trunk_bias, out, out_bias, embeddings = (0.1 * torch.randn(shape) for shape in shapes)
    else:
        net = baselines.hypnettorch(N, K, rows * cols, m, context, {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]())
        trunk, trunk_bias, out, out_bias, embeddings = (v.detach() for v in net.parameters())

        @torch.no_grad()
        def of_flat_chunks(net: Any, x: Tensor, z: Tensor) -> dict[str, Tensor]:
            weights = net.forward(cond_input=z)
            return {"y of flat chunks": torch.cat([F.linear(x[g : g + 1], w) for g, (w,) in enumerate(weights)])}

        contestants["hypnettorch"] = lambda: of_flat_chunks(net, x, z)
    head, head_bias = out.T.reshape(m, rows, cols).contiguous(), out_bias.view(rows, cols)

    def hidden(dtype: torch.dtype = torch.float32) -> hk.AdditiveHidden:
        own = [v.to(dtype) for v in (embeddings, trunk, trunk_bias, z)]
        chunks = F.linear(own[0], own[1][:, :embedding], own[2]).view(I, J, m)
        return hk.AdditiveHidden(F.linear(own[3], own[1][:, embedding:]), chunks, activation)

    @torch.no_grad()
    def run(backend: str | None = ours.backend) -> dict[str, Tensor]:
        given: dict[str, Any] = {"head_bias": head_bias, "backend": backend, "order": ours.order}
        return {"y": hk.hyper_linear(x, hidden(), head, **given)}

    @torch.no_grad()
    def formed() -> dict[str, Tensor]:
        weights = hk.generate_weight(hidden(), head, (N, K), head_bias=head_bias)
        return {"y": torch.bmm(x[:, None], weights.transpose(1, 2))[:, 0]}

    contestants |= {"materialise": formed, "torch backend": lambda: run("torch"), OURS: run}

    @torch.no_grad()
    def exact() -> dict[str, Tensor]:
        own = hidden(torch.float64)
        few = hk.AdditiveHidden(own.context[:8], own.chunks, activation)
        weights = hk.generate_weight(few, head.double(), (N, K), head_bias=head_bias.double())
        found = {"y": torch.einsum("gnk,gk->gn", weights, x[:8].double())}
        if not left_out:
            found |= of_flat_chunks(copy.deepcopy(net).double(), x[:8].double(), z[:8].double())
        return found

    @torch.no_grad()
    def check() -> None:
        if ours.backend in (None, "cpu") and not native_cpu.MISSING:
            most = 4 * G * I * J * m / 2
            assert peak_bytes(run) < most, "the hidden layer of every context was formed"
        generated = hk.generate_weight(hidden(), head, (N, K), head_bias=head_bias)
        for g, (theirs,) in enumerate([] if left_out else net.forward(cond_input=z)):
            tiles = theirs.view(I, J, rows, cols).transpose(1, 2).reshape(N, K)
            torch.testing.assert_close(generated[g], tiles)

    return Case(
        f"forward, {G} contexts of one sample, {N}x{K}, chunks {rows}x{cols}, m={m}, {activation}",
        contestants,
        exact,
        missing=left_out,
        values={"N": N, "K": K, "chunk": [rows, cols], "m": m, "B": G, "contexts": G, "weights": G * N * K}
        | {"whose": ", a context per sample"},
        check=check,
    )


def whole_weights(G: int, N: int, K: int, m: int, ours: Ours = AS_PLANNED) -> Case:
    """A context for each sample, and the whole weight in one chunk: against hyperlight, with its own parameters; its
    trunk is run by all."""
    context = 8
    x, z = torch.randn(G, K), torch.rand(G, context)
    left_out: dict[str, str] = {}
    contestants: Contestants = {}
    why = baselines.missing("hyperlight")
    if why:
        left_out["hyperlight"] = why
        trunk = nn.Sequential(nn.Linear(context, m), nn.ReLU())
        head, bias = 0.1 * torch.randn(m, N, K), torch.zeros(N, K)
    else:
        net = baselines.hyperlight(N, K, m, context)
        encode = import_module("hyperlight.hypernet.encoding").encode_input
        own = nn.Sequential(*list(net.backbone)[:2])
        trunk = lambda z: own(encode(z, mode=net.encoding))  # noqa: E731
        head, bias = net.backbone.output.weight.T.reshape(m, N, K).contiguous(), net.backbone.output.bias.view(N, K)

        @torch.no_grad()
        def theirs() -> dict[str, Tensor]:
            return {"y": torch.bmm(x[:, None], net(z=z)["w"].transpose(1, 2))[:, 0]}

        contestants["hyperlight"] = theirs

    def hidden() -> Tensor:
        return trunk(z).view(G, 1, 1, m)

    @torch.no_grad()
    def formed(dtype: torch.dtype) -> dict[str, Tensor]:
        weights = hk.generate_weight(hidden().to(dtype), head.to(dtype), (N, K), head_bias=bias.to(dtype))
        return {"y": torch.bmm(x[:, None].to(dtype), weights.transpose(1, 2))[:, 0]}

    @torch.no_grad()
    def run() -> dict[str, Tensor]:
        return {"y": hk.hyper_linear(x, hidden(), head, head_bias=bias, **ours.settings)}

    contestants |= {"materialise": lambda: formed(torch.float32), OURS: run}
    return Case(
        f"forward, {G} contexts of one sample, {N}x{K} in one chunk, m={m}",
        contestants,
        lambda: formed(torch.float64),
        missing=left_out,
        values={"N": N, "K": K, "chunk": [N, K], "m": m, "B": G, "contexts": G, "weights": G * N * K}
        | {"whose": ", a context per sample"},
    )


def many_contexts(
    shape: tuple[int, int],
    chunk: tuple[int, int],
    m: int,
    G: int,
    T: int,
    *,
    entries: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    ours: Ours = AS_PLANNED,
) -> Case:
    """T tokens for each of G contexts, or for each of `entries` that draw theirs, through an additive hidden layer:
    against weights formed, then `torch.bmm`, or a product for each task."""
    (N, K), (rows, cols) = shape, chunk
    I, J, L = ceil_div(N, rows), ceil_div(K, cols), G if entries is None else entries
    sizes = ((L, T, K), (G, m), (I, J, m), (m, rows, cols))
    x, context, chunks, head = (torch.randn(size, device=device, dtype=dtype) for size in sizes)
    ids = None if entries is None else torch.arange(L, device=device) % G

    @torch.no_grad()
    def run(**settings: Any) -> dict[str, Tensor]:
        hidden = hk.AdditiveHidden(context, chunks, "relu")
        return {"y": hk.hyper_linear(x, hidden, head, out_features=N, context_ids=ids, **settings)}

    @torch.no_grad()
    def materialised(*tensors: Tensor) -> dict[str, Tensor]:
        x, context, chunks, head = tensors
        weights = hk.generate_weight(hk.AdditiveHidden(context, chunks, "relu"), head, shape)
        if ids is None:
            return {"y": torch.bmm(x, weights.transpose(1, 2))}
        y, uses = x.new_empty(len(x), T, N), ids[: len(x)]
        for g in uses.unique():  # task by task: a weight copied for each request would take several times as long
            y[uses == g] = x[uses == g] @ weights[g].T
        return {"y": y}

    def exact() -> dict[str, Tensor]:
        few = context if ids is not None else context[:2]
        return materialised(*(v.double() for v in (x[:2], few, chunks, head)))

    call = canonical_form(x, hk.AdditiveHidden(context, chunks, "relu"), head, out_features=N, context_ids=ids).call
    who = f"{G} context{'s' * (G > 1)} of {T}" if ids is None else f"{L} requests of {G} tasks, {T} tokens each"
    name = f"forward, {who}, {N}x{K}, chunks {rows}x{cols}, m={m}, relu" + unusual(dtype)
    ours.check(name, call)
    left_out: dict[str, str] = {}
    contestants: Contestants = {
        "materialise": lambda: materialised(x, context, chunks, head),
        OURS: partial(run, **ours.settings),
    }
    with_triton(contestants, left_out, partial(partial, run), call, ours)
    return Case(
        name,
        contestants,
        exact,
        missing=left_out,
        call=call,
        values={"N": N, "K": K, "chunk": list(chunk), "m": m, "B": L * T, "contexts": G, "weights": G * N * K}
        | {"whose": ", a context per sequence" if ids is None else ", requests of mixed tasks"},
    )
