"""Convolutions by the Triton kernels, one operation at a time in Triton's interpreter: as linear layers that gather."""

from __future__ import annotations

from math import inf

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA

import hyperkernels as hk
from hyperkernels.backends import _plan, triton_fused
from hyperkernels.call import ORDERS, Call, Window
from hyperkernels.chunking import Grid
from hyperkernels.kernels.tiles import CHIPS
from hyperkernels.kernels.windows import Gathered, linear_call, linear_factors
from hyperkernels.planner import Cost, plan_contraction
from hyperkernels.testing import assert_no_worse_than_eager

pytestmark = pytest.mark.skipif(CUDA, reason="the other tests run these kernels on the device, as an engine")
CONV = {1: hk.hyper_conv1d, 2: hk.hyper_conv2d, 3: hk.hyper_conv3d}
CONTEXTS = ("shared", "per_image", "ids", "additive")
MOVES = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "padded beyond the kernel": {"padding": 3},
    "strided beyond the kernel": {"stride": 5},
    "uneven": {"stride": (3, 2, 1), "padding": (0, 2, 1), "dilation": (1, 2, 1)},
}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """The kernels, and never the plain products that may be expected to be faster."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_fused, "products", lambda call, step: Cost(inf, 0, "products"))
    _plan.cache_clear()
    yield
    _plan.cache_clear()


def problem(n, contexts="shared", groups=1, moves=None, size=(7, 4, 3), kernel=(3, 2, 2)):
    """Leaves in fp64, cropped in both directions where there is one group, and a call of them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, cols, m, B, crop = 3, 2, 2, 3 if contexts == "ids" else 2, int(groups == 1)
    I, J, N, C = 2 * groups, 2, 6 * groups - crop, 4 - crop
    G = 1 if contexts in ("shared", "additive") else B
    additive = contexts == "additive"
    hidden = [draw(1, m), draw(I, J, m)] if additive else [draw(*((G,) if G > 1 else ()), I, J, m)]
    leaves = [draw(B, C * groups, *size[:n]), *hidden, draw(m, rows, cols, *kernel[:n])]
    given = {"out_channels": N, "groups": groups} | {
        name: v[:n] if isinstance(v, tuple) else v for name, v in (moves or {}).items()
    }
    if contexts == "ids":
        given["context_ids"] = torch.tensor([2, 0, 2])

    def call(x, *factors, **keywords):
        *parts, head = factors
        hidden = hk.AdditiveHidden(*parts, "tanh") if additive else parts[0]
        return CONV[n](x, hidden, head, **given, **keywords)

    return leaves, call


def gradients(call, leaves, dtype, **keywords):
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    y = call(*leaves, **keywords)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def check(leaves, call, dtype, order):
    leaves = [leaf.to(dtype).double() for leaf in leaves]
    ours = gradients(call, leaves, dtype, backend="triton", order=order)
    eager = gradients(call, leaves, dtype, backend="reference")
    exact = gradients(call, leaves, torch.float64, backend="reference")
    for n, values in enumerate(zip(ours, eager, exact)):
        assert_no_worse_than_eager(f"output {n}", *values)


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_error_at_most_twice_eagers(dtype, order, contexts):
    check(*problem(1, contexts, moves=MOVES["uneven"]), dtype, order)


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("order", ORDERS)
def test_windows(order, moves):
    check(*problem(2, moves=moves), torch.float32, order)


def test_three_dimensions():
    check(*problem(3, moves=MOVES["uneven"], size=(4, 3, 2)), torch.float32, "head_first")


@pytest.mark.parametrize("contexts", ["shared", "ids"])
def test_groups(contexts):
    check(*problem(1, contexts, groups=2, moves=MOVES["strided"]), torch.float32, "head_first")


def test_where_features_lie_past_32_bits():
    call = Call(Grid(2, 1 << 16, 2, 1 << 16), 1, 1, 1, 1, device="meta")
    call = call._replace(window=Window((3,), (1,), (30000,), (30000,), (1,)))
    x = torch.empty(call.shape("x"), device="meta")
    found = linear_factors(call, "y", {"x": x})["x"]
    assert isinstance(found, Gathered)
    assert found.columns.dtype == torch.int64


def test_an_empty_batch_and_another_default_device():
    hidden, head = torch.randn(2, 2, 2), torch.randn(2, 3, 2, 3)
    with torch.device("meta"):
        y = hk.hyper_conv1d(torch.ones(2, 4, 5, device="cpu"), hidden, head, backend="triton")
    assert y.device.type == "cpu"
    assert hk.hyper_conv1d(torch.empty(0, 4, 5), hidden, head, backend="triton").shape == (0, 6, 3)


@pytest.mark.parametrize("order", ORDERS)
def test_transposed(order):
    x, hidden, head = torch.randn(2, 5, 3, 2), torch.randn(2, 2, 2), torch.randn(2, 3, 2, 2, 3)
    given = {"stride": (2, 1), "padding": 1, "output_padding": (1, 0), "out_channels": 3}
    weight = hk.generate_weight(hidden, head, (5, 3, 2, 3))
    wanted = F.conv_transpose2d(x, weight, stride=(2, 1), padding=1, output_padding=(1, 0))
    found = hk.hyper_conv_transpose2d(x, hidden, head, **given, order=order, backend="triton")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_channels_last_is_kept():
    x = torch.randn(2, 4, 5, 3).to(memory_format=torch.channels_last)
    hidden, head = torch.randn(2, 2, 2), torch.randn(2, 3, 2, 3, 3)
    found = hk.hyper_conv2d(x, hidden, head, padding=1, backend="triton")
    assert found.is_contiguous(memory_format=torch.channels_last)
    wanted = F.conv2d(x, hk.generate_weight(hidden, head, (6, 4, 3, 3)), padding=1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_the_kernels_are_asked_for():
    """For y a linear layer with the convolution's multiplications; for x with as many at each position of x, most of
    them of zeros where the window strides."""
    call = Call(Grid(256, 250, 4, 64), 16, 1, 1, 32, window=Window((3, 3), (2, 2), (1, 1), (1, 1), (14, 14)))
    for out, rows, grid in (("y", 49, Grid(256, 2304, 4, 576)), ("x", 196, Grid(2304, 250, 36, 64))):
        own = linear_call(call, out)
        assert own.window is None
        assert (own.tokens, own.grid) == (32 * rows, grid)


def test_the_planner_decides_between_one_kernel_and_two_products(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(triton_fused, "_chip", lambda device: CHIPS[9, 0])
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), (14, 14))
    by = {}
    for name, m, chunk, contexts, activation in (
        ("a shared convolution", 16, (4, 256), 1, ""),
        ("images' own, additive", 16, (4, 256), 32, "relu"),
    ):
        numbers = (m, contexts, contexts, 32 // contexts, False, False, activation, torch.bfloat16, "cuda", window)
        plan = plan_contraction(Call(Grid(256, 256, *chunk), *numbers), ("y",), None, triton_fused.estimate)
        by[name] = plan.steps[0].cost.by
    one, two = triton_fused.FUSED, triton_fused.TWO_PRODUCTS
    assert by == {"a shared convolution": two, "images' own, additive": one}
