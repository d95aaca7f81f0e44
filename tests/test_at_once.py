"""A product asked for again goes straight to the native engine, and is the same."""

from __future__ import annotations

import pytest
import torch
from conftest import make_problem
from torch.fx.experimental.proxy_tensor import make_fx

import hyperkernels as hk
from hyperkernels import at_once, form
from hyperkernels.backends import native_cpu
from hyperkernels.call import ORDERS
from hyperkernels.chunking import Grid
from hyperkernels.derivatives import Settings, partials
from hyperkernels.form import canonical_form
from hyperkernels.testing import assert_no_worse_than_eager

SHAPES = [  # rows of x, N, K, chunk, m: tiles and vectors that are full and not, edges that are cropped and not
    (1, 256, 256, (4, 128), 32),
    (1, 70, 250, (9, 83), 11),
    (3, 61, 50, (4, 64), 5),
    (2, 7, 97, (2, 16), 1),
    (4, 33, 3, (33, 3), 3),
    (2, 1200, 640, (600, 64), 60),  # more workspace than is kept
]


def problem(rows, N, K, chunk, m, dtype=torch.float32):
    I, J = -(-N // chunk[0]), -(-K // chunk[1])
    torch.manual_seed(0)
    shapes = (1, rows, K), (I, J, m), (m, *chunk), (N,)
    return [torch.randn(shape, dtype=dtype) for shape in shapes], N


def call(tensors, N, **settings):
    x, hidden, head, bias = tensors
    return hk.hyper_linear(x, hidden, head, out_features=N, bias=bias, **settings)


@pytest.fixture
def straight(monkeypatch):
    """How many calls went straight to the engine."""
    count = []
    monkeypatch.setattr(at_once, "_found", {})
    run = native_cpu.Again.__call__

    def counted(*arguments):
        y = run(*arguments)
        count.extend([y] * (y is not None))
        return y

    monkeypatch.setattr(native_cpu.Again, "__call__", counted)
    return count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("isa", native_cpu._cpu.instruction_sets() if native_cpu._cpu else [])
def test_the_second_call_is_the_first(isa, shape, dtype, straight, monkeypatch):
    monkeypatch.setattr(native_cpu, "INSTRUCTIONS", isa)
    tensors, N = problem(*shape, dtype)
    exact = call([v.double() for v in tensors], N, backend="reference")
    eager = call(tensors, N, backend="reference")
    monkeypatch.setattr(form, "_checked", {})
    found = [call(tensors, N, order="head_first") for _ in range(2)]
    assert len(straight) == 2
    assert torch.equal(*found)
    assert_no_worse_than_eager("y", found[0], eager, exact)
    without = call([*tensors[:3], None], N, order="head_first")
    assert torch.equal(without + tensors[3], call(tensors, N, order="head_first"))


@pytest.mark.parametrize("contexts", ["shared", "per_entry", "additive", "additive_per_entry"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("isa", native_cpu._cpu.instruction_sets() if native_cpu._cpu else [])
def test_the_second_call_begins_at_what_the_heads_bias_makes(isa, dtype, order, contexts, straight, monkeypatch):
    """Whatever label the threads divide, over the edges of chunks and blocks."""
    monkeypatch.setattr(native_cpu, "INSTRUCTIONS", isa)
    before = torch.get_num_threads()
    shapes = (Grid(38, 53, 5, 11), 7, 900), (Grid(48, 600, 16, 300), 12, 300), (Grid(600, 40, 300, 8), 9, 60)
    for grid, width, tokens in shapes:
        problem = make_problem(contexts, grid, width, tokens=tokens, head_bias=True)
        given = problem.to(dtype)
        with torch.no_grad():
            exact = problem.call(*problem.to(torch.float64), backend="reference")
            eager = problem.call(*given, backend="reference")
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                straight.clear()
                try:
                    found = [problem.call(*given, order=order, backend="cpu") for _ in range(2)]
                finally:
                    torch.set_num_threads(before)
                assert len(straight) == 2
                assert torch.equal(*found)
                assert_no_worse_than_eager("y", found[0], eager, exact)


@pytest.mark.parametrize("shape", [(48,), (1, 48), (3, 48)], ids=str)
def test_both_biases_are_added(shape, straight):
    x, hidden = torch.randn(3, 5, 30), torch.randn(3, 4, 5, 6)[: 3 if shape[0] == 3 else 1]
    given = {"bias": torch.randn(shape), "head_bias": torch.randn(12, 6), "order": "generate"}
    found, wanted = (
        hk.hyper_linear(x, hidden, torch.ones(6, 12, 6), **given, backend=backend) for backend in ("cpu", "reference")
    )
    assert len(straight) == 1
    assert torch.allclose(found, wanted, atol=1e-4)
    low = [v.bfloat16() for v in (x, hidden)]
    given = {name: v.bfloat16() for name, v in given.items() if name != "order"}
    assert torch.allclose(hk.hyper_linear(*low, torch.ones(6, 12, 6).bfloat16(), **given).float(), wanted, atol=0.5)
    assert len(straight) == 1


@pytest.mark.parametrize("rows", [2, 100])
def test_sizes_that_are_symbols_go_the_usual_way(rows):
    tensors, N = problem(rows, 64, 48, (4, 16), 8)
    traced = make_fx(lambda *given: call(given, N), tracing_mode="symbolic")(*tensors)
    assert torch.allclose(traced(*tensors), call(tensors, N), atol=1e-5)


def test_threads_do_not_change_a_bit(straight):
    tensors, N = problem(2, 300, 200, (7, 40), 19)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found += [call(tensors, N, order="head_first") for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert len(straight) >= 5
    assert all(torch.equal(found[0], y) for y in found)


def test_whoever_looks_on_is_served_in_the_usual_way(straight):
    tensors, N = problem(1, 64, 48, (4, 16), 8)
    x, hidden, head, bias = tensors
    call(tensors, N)
    y = call(tensors, N)
    straight.clear()
    leaf = x.clone().requires_grad_()
    call([leaf, hidden, head, bias], N).sum().backward()
    assert torch.allclose(leaf.grad, hk.generate_weight(hidden, head, (N, 48)).sum(0), atol=1e-4)
    batched = torch.func.vmap(lambda v: call([v, hidden, head, bias], N))(torch.stack([x, 2 * x]))
    assert torch.allclose(batched[0], y, atol=1e-5)
    _, tangent = torch.func.jvp(lambda v: call([v, hidden, head, bias], N), (x,), (x,))
    assert torch.allclose(tangent, y - bias, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(tensors, N).dtype == torch.bfloat16
    spread = x.repeat_interleave(2, -1)[..., ::2]
    assert torch.allclose(call([spread, hidden, head, bias], N), y, atol=1e-5)
    negative = torch._neg_view(x)
    assert torch.allclose(call([negative, hidden, head, None], N), bias - y, atol=1e-5)
    assert torch.compile(lambda v: call([v, hidden, head, bias], N), backend="eager", fullgraph=True)(x).equal(y)
    assert not straight
    with torch.inference_mode():
        assert call(tensors, N).equal(y)
    assert len(straight) == 1


def test_what_is_wrong_is_refused_again(straight):
    tensors, N = problem(1, 64, 48, (4, 16), 8)
    for _ in range(2):
        call(tensors, N)
    x, hidden, head, bias = tensors
    for changed in ([x[..., :20], hidden, head, bias], [x, hidden, head, bias[:3]], [x.double(), hidden, head, bias]):
        with pytest.raises((ValueError, TypeError)):
            call(changed, N)
    with pytest.raises(ValueError, match="order"):
        call(tensors, N, order="sideways")
    with pytest.raises(TypeError, match="x"):
        call([[1.0], hidden, head, bias], N)
    for name in ("bias", "head_bias"):
        with pytest.raises(TypeError, match=f"{name}: got"):
            hk.hyper_linear(x, hidden, head, out_features=N, **{name: [1.0]})


@pytest.mark.parametrize("wanted", [("hidden", "y"), ("head", "x", "y"), ("y", "hidden")], ids=str)
def test_y_among_other_partials_comes_in_its_place(wanted):
    (x, hidden, head, _), N = problem(1, 256, 256, (4, 128), 32)
    form = canonical_form(x, hidden, head, N)
    factors = (torch.randn(1, 1, N), form.hidden, None, form.head, form.x)
    ours, theirs = (
        partials(Settings(wanted, form.call, "head_first", backend), None, *factors) for backend in ("cpu", "torch")
    )
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
