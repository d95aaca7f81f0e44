"""What is measured: each case with its baselines by name, what makes it right, and the factors it is meant to reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from measure import Contestants
from torch import Tensor, nn

import hyperkernels as hk
from hyperkernels.backends import triton_fused
from hyperkernels.call import Call
from hyperkernels.form import canonical_form
from hyperkernels.planner import default_chunk
from hyperkernels.testing import assert_no_worse_than_eager, peak_bytes

OURS = "hyperkernels"


@dataclass
class Case:
    """`contestants[OURS]` against the others. `check` raises if ours is wrong; `faster` and `smaller` say by what
    factor ours should beat a baseline in time and in peak memory, `of_peak` what share of the FMA peak it should reach.
    """

    name: str
    contestants: Contestants
    check: Callable[[], None]
    faster: dict[str, float] = field(default_factory=dict)
    smaller: dict[str, float] = field(default_factory=dict)
    of_peak: float | None = None
    call: Call | None = None
    outputs: tuple[str, ...] = ("y",)


def linear(
    shape: tuple[int, int],
    chunk: tuple[int, int],
    m: int,
    B: int,
    *,
    train: bool = False,
    faster: dict[str, float] | None = None,
    of_peak: float | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Case:
    """One context: against a dense layer of the same shape, and the same function with the weight formed.

    `einsum` is torch.einsum over all three factors, on opt_einsum's path; `tuned dense` is the dense layer by the
    native engine's own tiles, its weight packed beforehand.
    """
    (N, K), (rows, cols) = shape, chunk
    I, J = N // rows, K // cols

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, dtype=dtype).requires_grad_()

    x, hidden, head, dy = draw(B, K), draw(I, J, m), draw(m, rows, cols), draw(B, N).detach()
    dense = nn.Linear(K, N, bias=False, device=device, dtype=dtype)
    leaves = [x, hidden, head]

    def materialised(x: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
        return F.linear(x, hk.generate_weight(hidden, head, shape))

    def run(call: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor = dy) -> tuple[Tensor, ...]:
        """y, and with `train` the gradients."""
        with torch.set_grad_enabled(train):
            y = call(*leaves)
        return (y, *torch.autograd.grad(y, leaves, dy)) if train else (y,)

    contestants: Contestants = {
        "nn.Linear": lambda: run(F.linear, [x, dense.weight]),
        "materialise": lambda: run(materialised, leaves),
        "einsum": lambda: run(
            lambda x, hidden, head: torch.einsum("krq,bjq,ijk->bir", head, x.view(B, J, cols), hidden).reshape(B, N),
            leaves,
        ),
        OURS: lambda: run(hk.hyper_linear, leaves),
    }
    fused = partial(hk.hyper_linear, backend="triton")
    if find_spec("triton") and (device == "cuda" or triton_fused.interpreted()):
        contestants["triton"] = lambda: run(fused, leaves)
    if device == "cpu" and dtype == torch.float32 and not train:
        contestants["tuned dense"] = tuned_dense(x.detach(), dense.weight.detach())

    def check() -> None:
        exact = run(materialised, [v.detach().double().requires_grad_() for v in leaves], dy.double())
        names = ("y", "dx", "dhidden", "dhead")
        eager = run(materialised, leaves)
        for engine in (OURS, "triton"):
            if engine in contestants:
                for name, *values in zip(names, contestants[engine](), eager, exact):
                    assert_no_worse_than_eager(f"{engine}: {name}", *values)

    what = "forward and backward" if train else "forward"
    name = f"{what}, {N}x{K}, chunks {rows}x{cols}, m={m}, B={B}"
    outputs = ("y", "hidden", "head", "x") if train else ("y",)
    call = canonical_form(x, hidden, head).call
    return Case(name, contestants, check, faster or {}, of_peak=of_peak, call=call, outputs=outputs)


def tuned_dense(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    N, K = weight.shape
    layer = import_module("hyperkernels._cpu").Dense(weight.data_ptr(), N, K)

    def run() -> Tensor:
        y = torch.empty(len(x), N)
        layer.run(x.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads())
        return y

    torch.testing.assert_close(run(), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    return run


def contexts(
    G: int,
    faster: dict[str, float],
    activation: str = "relu",
    N: int = 1024,
    K: int = 1024,
    rows: int = 16,
    cols: int = 64,
    m: int = 32,
) -> Case:
    """A context for each sample, through a trunk of one hidden layer: against hypnettorch's chunked hypernetwork.

    Both sides hold hypnettorch's own parameters. Its flat chunks are laid out as ours are, `rows x cols` tiles of W,
    and the generated weights are checked to be the same numbers.
    """
    from hypnettorch.hnets import ChunkedHMLP

    I, J, embedding, context = N // rows, K // cols, 8, 16
    net = ChunkedHMLP(
        [[N, K]],
        chunk_size=rows * cols,
        chunk_emb_size=embedding,
        layers=(m,),
        cond_in_size=context,
        no_cond_weights=True,
        num_cond_embs=0,
        activation_fn={"relu": nn.ReLU, "tanh": nn.Tanh}[activation](),
        verbose=False,
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    z, x = torch.randn(G, context), torch.randn(G, K)
    trunk, trunk_bias, out, out_bias, embeddings = (v.detach() for v in net.parameters())
    head, head_bias = out.T.reshape(m, rows, cols).contiguous(), out_bias.view(rows, cols)

    def hidden() -> hk.AdditiveHidden:
        chunks = F.linear(embeddings, trunk[:, :embedding], trunk_bias).view(I, J, m)
        return hk.AdditiveHidden(F.linear(z, trunk[:, embedding:]), chunks, activation)

    @torch.no_grad()
    def hypnettorch() -> Tensor:
        return torch.cat([F.linear(x[g : g + 1], weights[0]) for g, weights in enumerate(net.forward(cond_input=z))])

    @torch.no_grad()
    def ours(backend: str | None = None) -> Tensor:
        return hk.hyper_linear(x, hidden(), head, head_bias=head_bias, backend=backend)

    @torch.no_grad()
    def check() -> None:
        generated = hk.generate_weight(hidden(), head, (N, K), head_bias=head_bias)
        for g, (theirs,) in enumerate(net.forward(cond_input=z)):
            tiles = theirs.view(I, J, rows, cols).transpose(1, 2).reshape(N, K)
            torch.testing.assert_close(generated[g], tiles)
        exact = torch.einsum("gnk,gk->gn", generated.double(), x.double())
        assert_no_worse_than_eager("y", ours(), ours("reference"), exact)
        assert peak_bytes(ours) < 4 * G * I * J * m / 2, "the hidden layer of every context was formed"

    return Case(
        f"forward, {G} contexts of one sample, {N}x{K}, chunks {rows}x{cols}, m={m}, {activation}",
        {
            "hypnettorch": hypnettorch,
            "materialise": lambda: ours("reference"),
            "torch backend": lambda: ours("torch"),
            OURS: ours,
        },
        check,
        faster,
        {"hypnettorch": 100},
    )


def many_contexts(
    shape: tuple[int, int],
    chunk: tuple[int, int],
    m: int,
    G: int,
    T: int,
    *,
    faster: dict[str, float] | None = None,
    smaller: dict[str, float] | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Case:
    """T tokens for each of G contexts, through an additive hidden layer: against weights formed, then `torch.bmm`."""
    (N, K), (rows, cols) = shape, chunk
    I, J = N // rows, K // cols
    sizes = ((G, T, K), (G, m), (I, J, m), (m, rows, cols))
    x, context, chunks, head = (torch.randn(size, device=device, dtype=dtype) for size in sizes)

    @torch.no_grad()
    def run(x: Tensor, context: Tensor, backend: str | None = None) -> Tensor:
        return hk.hyper_linear(x, hk.AdditiveHidden(context, chunks, "relu"), head, backend=backend)

    @torch.no_grad()
    def materialised(x: Tensor, context: Tensor, chunks: Tensor, head: Tensor) -> Tensor:
        weights = hk.generate_weight(hk.AdditiveHidden(context, chunks, "relu"), head, shape)
        return torch.bmm(x, weights.transpose(1, 2))

    contestants: Contestants = {
        "materialise": lambda: materialised(x, context, chunks, head),
        OURS: lambda: run(x, context),
    }
    if find_spec("triton") and (device == "cuda" or triton_fused.interpreted()):
        contestants["triton"] = lambda: run(x, context, "triton")

    def check() -> None:
        few, some = x[:2], context[:2]
        exact = materialised(few.double(), some.double(), chunks.double(), head.double())
        eager = materialised(few, some, chunks, head)
        for backend in (None, *(("triton",) if "triton" in contestants else ())):
            assert_no_worse_than_eager(f"{backend}: y", run(x, context, backend)[:2], eager, exact)

    call = canonical_form(x, hk.AdditiveHidden(context, chunks, "relu"), head).call
    name = f"forward, {G} contexts of {T}, {N}x{K}, chunks {rows}x{cols}, m={m}, relu"
    return Case(name, contestants, check, faster or {}, smaller or {}, call=call)


LARGE, SMALL = ((4096, 4096), (16, 256), 32), ((1024, 1024), (16, 64), 32)
CPU_CASES: dict[str, Callable[[], Case]] = {
    "decode": lambda: linear(*LARGE, B=1, faster={"nn.Linear": 8}),
    "forward_16": lambda: linear(*LARGE, B=16, faster={"nn.Linear": 12}),
    "forward_256": lambda: linear(*LARGE, B=256, faster={"nn.Linear": 10, "tuned dense": 3}, of_peak=0.8),
    "forward_2048": lambda: linear(*LARGE, B=2048, faster={"nn.Linear": 9, "tuned dense": 3}, of_peak=0.8),
    "train_256": lambda: linear(*LARGE, B=256, train=True, faster={"nn.Linear": 7}),
    "small_256": lambda: linear(*SMALL, B=256, faster={"nn.Linear": 2}),
    "small_2048": lambda: linear(*SMALL, B=2048, faster={"nn.Linear": 2}),
    "small_default_chunk_256": lambda: linear((1024, 1024), default_chunk(1024, 1024, 32), 32, B=256),
    "contexts_64": lambda: contexts(64, {"hypnettorch": 150}),
    "contexts_256": lambda: contexts(256, {"torch backend": 3}),
    "contexts_256_tanh": lambda: contexts(256, {}, "tanh"),
}
