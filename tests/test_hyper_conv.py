"""`hyper_conv1d`, `2d` and `3d`: against torch's own convolutions with the generated kernel, which forms it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import hyperkernels as hk
from hyperkernels.call import ORDERS
from hyperkernels.testing import assert_no_worse_than_eager, peak_bytes

CONV = {1: (hk.hyper_conv1d, F.conv1d), 2: (hk.hyper_conv2d, F.conv2d), 3: (hk.hyper_conv3d, F.conv3d)}
CONTEXTS = ("shared", "per_image", "ids", "additive", "additive_per_image")
MOVES = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "same": {"padding": "same", "dilation": 2},
    "uneven": {"stride": (3, 2, 1), "padding": (0, 2, 1), "dilation": (1, 2, 1)},
}


@dataclass
class Problem:
    """`ours` takes the leaves and `hyper_conv`'s keywords; `theirs` forms every kernel."""

    leaves: list[Tensor]
    ours: Any
    theirs: Any

    def in_dtype(self, dtype: torch.dtype) -> list[Tensor]:
        return [v.detach().to(dtype).requires_grad_() for v in self.leaves]


def make_problem(
    n, contexts="shared", groups=1, per_chunk_heads=False, crop=0, moves=None, size=(9, 8, 7), B=3, kernel=(3, 2, 4)
):
    conv, dense = CONV[n]
    rows, cols, m, I, J = 4, 3, 2, 2 * groups, 2
    kernel = kernel[:n]
    N, C = I * rows - crop, J * cols - crop
    moves = {name: v[:n] if isinstance(v, tuple) else v for name, v in (moves or {}).items()}
    ids = torch.tensor([1, 0, 1])[:B] if contexts == "ids" else None
    G = {"per_image": B, "ids": 2, "additive_per_image": B}.get(contexts, 1)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    head = draw(*((I * J,) if per_chunk_heads else ()), m, rows, cols, *kernel)
    additive = contexts.startswith("additive")
    parts = [draw(G, m), draw(I, J, m)] if additive else [draw(*((G,) if G > 1 else ()), I, J, m)]
    leaves = [draw(B, C * groups, *size[:n]), *parts, head, draw(rows, cols, *kernel), draw(N)]

    def arguments(leaves):
        x, *hidden, head, head_bias, bias = leaves
        return x, hk.AdditiveHidden(*hidden, "tanh") if additive else hidden[0], head, head_bias, bias

    def ours(*leaves, **keywords):
        x, hidden, head, head_bias, bias = arguments(leaves)
        given = {"out_channels": N, "groups": groups, "context_ids": ids, **moves, **keywords}
        return conv(x, hidden, head, head_bias=head_bias, bias=bias, **given)

    def theirs(*leaves):
        x, hidden, head, head_bias, bias = arguments(leaves)
        weight = hk.generate_weight(hidden, head, (N, C, *kernel), head_bias=head_bias)
        weight = weight if weight.dim() == n + 3 else weight[None]
        which = ids.tolist() if ids is not None else range(B) if G > 1 else [0] * B
        images = [dense(x[b : b + 1], weight[g], bias, groups=groups, **moves) for b, g in enumerate(which)]
        return torch.cat(images)

    return Problem(leaves, ours, theirs)


def gradients(call, leaves, dy):
    y = call(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def assert_same(problem, **keywords):
    dy = torch.randn_like(problem.theirs(*problem.leaves))
    ours = gradients(lambda *leaves: problem.ours(*leaves, **keywords), problem.leaves, dy)
    for got, wanted in zip(ours, gradients(problem.theirs, problem.leaves, dy), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("per_chunk_heads", [False, True], ids=["shared_head", "per_chunk_heads"])
@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("n", CONV)
def test_is_torchs_convolution(n, contexts, per_chunk_heads, groups):
    """Values and gradients, in every order, cropped where there is one group."""
    for moves in MOVES.values() if n == 2 else [MOVES["uneven"]]:
        problem = make_problem(n, contexts, groups, per_chunk_heads, crop=int(groups == 1), moves=moves)
        for order in ORDERS:
            assert_same(problem, order=order)
    assert_same(problem, backend="reference")


@pytest.mark.parametrize("contexts", ["additive", "additive_per_image"])
def test_groups_whose_hidden_is_too_large_to_form(contexts, monkeypatch):
    monkeypatch.setattr("hyperkernels.conv_form.workspace_bytes", lambda: 1)
    assert_same(make_problem(2, contexts, groups=2))


@pytest.mark.parametrize("per_chunk_heads", [False, True], ids=["shared_head", "per_chunk_heads"])
@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize(("n", "format"), [(2, torch.channels_last), (3, torch.channels_last_3d)], ids=["2d", "3d"])
def test_a_pointwise_convolution_is_a_linear_layer_at_each_position(n, format, contexts, per_chunk_heads):
    for moves in ({}, {"stride": (3, 2, 1)}):
        problem = make_problem(n, contexts, 1, per_chunk_heads, crop=1, moves=moves, kernel=(1, 1, 1))
        with torch.no_grad():
            problem.leaves[0] = problem.leaves[0].contiguous(memory_format=format).requires_grad_()
        for settings in ({"order": order, "backend": backend} for order in ORDERS for backend in ("torch", None)):
            assert_same(problem, **settings)
        assert_same(problem, backend="reference")
        assert problem.ours(*problem.leaves).is_contiguous(memory_format=format)
        (dx,) = torch.autograd.grad(problem.ours(*problem.leaves).sum(), problem.leaves[:1])
        assert moves or dx.is_contiguous(memory_format=format)
    plan = hk.explain(hk.hyper_conv2d, *(torch.randn(s) for s in ((2, 6, 9, 5), (4, 2, 2), (2, 4, 3, 1, 1))))
    assert plan.backend == "torch", "channels lie apart there"


@pytest.mark.parametrize("contexts", ["shared", "ids", "additive"])
@pytest.mark.parametrize("order", [*ORDERS, "reference"])
def test_transposed(order, contexts):
    problem = make_problem(2, contexts, crop=1)
    x, *hidden, head, head_bias, _ = problem.leaves
    C, N = x.shape[1], 7
    ids = torch.tensor([1, 0, 1]) if contexts == "ids" else None
    z = torch.randn(3, N, 5, 6, dtype=torch.float64, requires_grad=True)
    keywords = {"order": order} if order != "reference" else {"backend": "reference"}

    def ours(z, *hidden_and_heads):
        *hidden, head, head_bias = hidden_and_heads
        hidden = hk.AdditiveHidden(*hidden, "tanh") if len(hidden) == 2 else hidden[0]
        given = {"out_channels": C, "head_bias": head_bias, "context_ids": ids, "stride": 2, "padding": 1}
        return hk.hyper_conv_transpose2d(z, hidden, head, output_padding=1, **given, **keywords)

    def theirs(z, *hidden_and_heads):
        *hidden, head, head_bias = hidden_and_heads
        hidden = hk.AdditiveHidden(*hidden, "tanh") if len(hidden) == 2 else hidden[0]
        weight = hk.generate_weight(hidden, head, (N, C, *head.shape[-2:]), head_bias=head_bias)
        weight = weight if weight.dim() == 5 else weight[None]
        which = [0] * 3 if ids is None else ids.tolist()
        moves = {"stride": 2, "padding": 1, "output_padding": 1}
        return torch.cat([F.conv_transpose2d(z[b : b + 1], weight[g], **moves) for b, g in enumerate(which)])

    leaves = [z, *hidden, head, head_bias]
    dy = torch.randn_like(theirs(*leaves))
    for got, wanted in zip(gradients(ours, leaves, dy), gradients(theirs, leaves, dy), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("order", [None, *ORDERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_error_at_most_twice_eagers(dtype, order):
    problem = make_problem(2, "per_image", crop=1, moves=MOVES["strided"])
    low = problem.in_dtype(dtype)
    high = [v.detach().double().requires_grad_() for v in low]
    dy = torch.randn_like(problem.theirs(*high)).to(dtype)
    ours = gradients(lambda *leaves: problem.ours(*leaves, order=order), low, dy)
    for values in zip(ours, gradients(problem.theirs, low, dy), gradients(problem.theirs, high, dy.double())):
        assert_no_worse_than_eager("conv", *values)


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck_and_gradgradcheck(order, contexts):
    problem = make_problem(2, contexts, moves={"stride": 2, "padding": 1}, size=(3, 3), B=2)

    def call(*leaves):
        return problem.ours(*leaves, order=order)

    assert gradcheck(call, problem.leaves, fast_mode=True)
    assert gradgradcheck(call, problem.leaves, fast_mode=True)


def test_depthwise():
    x, hidden, head = torch.randn(2, 6, 8, 8), torch.randn(6, 1, 5), torch.randn(5, 1, 1, 3, 3)
    weight = hk.generate_weight(hidden, head, (6, 1, 3, 3))
    for order in ORDERS:
        y = hk.hyper_conv2d(x, hidden, head, groups=6, padding="same", order=order)
        torch.testing.assert_close(y, F.conv2d(x, weight, groups=6, padding="same"), rtol=1e-4, atol=1e-4)


def test_one_image_without_a_batch():
    x, hidden, head = torch.randn(6, 8, 8), torch.randn(2, 2, 5), torch.randn(5, 4, 3, 3, 3)
    y = hk.hyper_conv2d(x, hidden, head)
    assert torch.equal(y, hk.hyper_conv2d(x[None], hidden, head)[0])


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_kept(format):
    x = torch.randn(2, 6, 8, 8).to(memory_format=format)
    y = hk.hyper_conv2d(x, torch.randn(2, 2, 5), torch.randn(5, 4, 3, 3, 3))
    assert y.is_contiguous(memory_format=format)


def test_no_images():
    x, hidden = torch.randn(0, 6, 8, 8), torch.randn(2, 2, 5, requires_grad=True)
    y = hk.hyper_conv2d(x, hidden, torch.randn(5, 4, 3, 3, 3))
    y.sum().backward()
    assert y.shape == (0, 8, 6, 6)
    assert not hidden.grad.any()


def test_compiles_without_a_break():
    problem = make_problem(2, "per_image", moves=MOVES["strided"])
    leaves = problem.in_dtype(torch.float32)
    compiled = torch.compile(problem.ours, fullgraph=True, backend="aot_eager")
    dy = torch.randn_like(problem.ours(*leaves))
    for got, wanted in zip(gradients(compiled, leaves, dy), gradients(problem.ours, leaves, dy)):
        torch.testing.assert_close(got, wanted)


def test_vmap_and_jvp():
    x, hidden, head = torch.randn(4, 2, 6, 5, 5), torch.randn(2, 2, 5), torch.randn(5, 4, 3, 3, 3)

    def call(x):
        return hk.hyper_conv2d(x, hidden, head)

    torch.testing.assert_close(torch.vmap(call)(x), torch.stack([call(one) for one in x]))
    _, tangent = torch.func.jvp(call, (x[0],), (x[1],))
    torch.testing.assert_close(tangent, call(x[1]))


@pytest.mark.parametrize("order", ORDERS)
def test_many_positions_take_many_blocks(order):
    problem = make_problem(2, "per_image", size=(90, 80))
    hk.set_workspace_mib(1)
    try:
        assert_same(problem, order=order)
    finally:
        hk.set_workspace_mib(64)


def test_a_context_per_image_forms_no_kernel():
    """64 images, each with a kernel of 2.4 MiB, forward and backward, beside inputs, outputs and the workspace."""
    x = torch.randn(64, 256, 4, 4, requires_grad=True)
    hidden = torch.randn(64, 64, 1, 8, requires_grad=True)
    head = torch.randn(8, 4, 256, 3, 3, requires_grad=True)
    peak = peak_bytes(lambda: hk.hyper_conv2d(x, hidden, head, padding=1).sum().backward())
    leaves = sum(4 * v.numel() for v in (x, hidden, head))
    assert peak <= 5 * leaves + 64 * 2**20
    assert peak < 64 * 256 * 256 * 9 * 4 / 3


X, HIDDEN, HEAD = torch.randn(2, 6, 8, 8), torch.randn(2, 2, 5), torch.randn(5, 4, 3, 3, 3)
BAD = {
    "x_of_five_dimensions": (ValueError, r"x: got shape \[2, 6, 8, 8, 1\], wanted \[B, C, H, W\]", {"x": X[..., None]}),
    "channels": (ValueError, r"x: got 7 channels .* wanted 4 to 6", {"x": torch.randn(2, 7, 8, 8)}),
    "groups": (ValueError, r"groups: got 4, wanted a positive divisor of x's 6 channels", {"groups": 4}),
    "groups_and_chunks": (
        ValueError,
        r"head: got chunks of 4 rows, wanted a divisor of 4 out_channels / 2 groups",
        {"x": torch.randn(2, 12, 8, 8), "hidden": HIDDEN[:1], "groups": 2},
    ),
    "stride": (ValueError, r"stride: got 0, wanted an integer of at least 1", {"stride": 0}),
    "padding_word": (ValueError, r'padding: got \'full\', wanted numbers, "same" or "valid"', {"padding": "full"}),
    "same_and_strided": (ValueError, r'padding: got "same" with stride', {"padding": "same", "stride": 2}),
    "kernel_larger_than_x": (ValueError, r"x: got an image of \[2, 2\].* kernel's \[3, 3\]", {"x": X[..., :2, :2]}),
    "contexts": (ValueError, r"x: got 2 images, wanted 3", {"hidden": torch.randn(3, 2, 2, 5)}),
    "bias": (ValueError, r"bias: got shape \[7\], wanted \[8\]", {"bias": torch.randn(7)}),
    "head_of_a_matrix": (ValueError, r"head: got shape \[5, 4, 3\], wanted", {"head": HEAD[..., 0, 0]}),
    "ids": (ValueError, r"context_ids: got values from 0 to 5", {"context_ids": torch.tensor([0, 5])}),
    "backend": (ValueError, r"'cpu' cannot do this call: it has no convolutions", {"backend": "cpu"}),
}


@pytest.mark.parametrize(("error", "message", "given"), BAD.values(), ids=BAD)
def test_bad_arguments(error, message, given):
    with pytest.raises(error, match=message):
        hk.hyper_conv2d(**{"x": X, "hidden": HIDDEN, "head": HEAD} | given)
