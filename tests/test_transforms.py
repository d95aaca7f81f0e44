"""`torch.func`, `torch.compile` and `torch.export`: right values or an error, never silent zeros."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import CONTEXTS, CUDA, make_problem
from torch.autograd import forward_ad, gradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import hyperkernels as hk
from hyperkernels.call import ORDERS
from hyperkernels.chunking import Grid
from hyperkernels.operators import FACTORS


def assert_same(got, wanted):
    for a, b in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        torch.testing.assert_close(a, b)


def scalar(problem, **keywords):
    return lambda *tensors: problem.call(*tensors, **keywords).sin().sum()


def cases(contexts=CONTEXTS):
    return pytest.mark.parametrize("contexts", contexts)


@cases()
@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, lambda f, n: jacrev(grad(f, n), n)])
def test_first_and_second_derivatives(transform, contexts):
    problem = make_problem(contexts, Grid(5, 4, 3, 3), tokens=2)
    tensors = tuple(v.detach() for v in problem.tensors)
    numbers = tuple(range(len(tensors)))
    got = transform(scalar(problem), numbers)(*tensors)
    assert_same(got, transform(scalar(problem, backend="reference"), numbers)(*tensors))


@cases(("shared", "per_entry", "ids"))
def test_forward_over_reverse(contexts):
    problem = make_problem(contexts, Grid(5, 4, 3, 3), tokens=2)
    tensors = tuple(v.detach() for v in problem.tensors)
    got = hessian(scalar(problem), (0, 1, 2))(*tensors)
    assert_same(got, hessian(scalar(problem, backend="reference"), (0, 1, 2))(*tensors))


def test_forward_over_reverse_of_additive_hidden_raises():
    problem = make_problem("additive", Grid(5, 4, 3, 3), tokens=2)
    with pytest.raises(NotImplementedError, match="materialize"):
        hessian(scalar(problem), (0, 1, 2, 3))(*(v.detach() for v in problem.tensors))


@cases()
def test_forward_mode_outside_torch_func(contexts):
    problem = make_problem(contexts, Grid(4, 3, 3, 2), tokens=1)
    assert gradcheck(problem.call, problem.tensors, check_forward_ad=True)


@cases()
def test_jvp(contexts):
    problem = make_problem(contexts)
    tensors = tuple(v.detach() for v in problem.tensors)
    tangents = tuple(torch.randn_like(v) for v in tensors)
    got = jvp(problem.call, tensors, tangents)
    reference = jvp(lambda *v: problem.call(*v, backend="reference"), tensors, tangents)
    assert_same(got, reference)
    assert got[1].any()


@cases()
def test_vmap_over_each_argument_and_its_gradients(contexts):
    problem = make_problem(contexts, Grid(5, 4, 3, 3), tokens=2)
    tensors = tuple(v.detach() for v in problem.tensors)
    numbers = tuple(range(len(tensors)))
    for mapped in (*((n,) for n in numbers), numbers, (0, 1)):
        dims = tuple(0 if n in mapped else None for n in numbers)
        stacked = tuple(torch.stack([v, -2 * v, v + 1]) if n in mapped else v for n, v in enumerate(tensors))
        reference = scalar(problem, backend="reference")
        assert_same(
            vmap(problem.call, dims)(*stacked), vmap(lambda *v: problem.call(*v, backend="reference"), dims)(*stacked)
        )
        assert_same(
            vmap(grad(scalar(problem), numbers), dims)(*stacked), vmap(grad(reference, numbers), dims)(*stacked)
        )


@cases()
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_break(contexts, dynamic):
    torch._dynamo.reset()
    problem = make_problem(contexts)
    compiled = torch.compile(problem.call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    y = compiled(*problem.tensors)
    wanted = problem.call(*problem.tensors)
    assert_same(y, wanted)
    assert_same(
        torch.autograd.grad(y.sin().sum(), problem.tensors), torch.autograd.grad(wanted.sin().sum(), problem.tensors)
    )


@cases()
@pytest.mark.parametrize("transform", [grad, jacrev, vmap])
def test_transforms_inside_a_compiled_function(transform, contexts):
    torch._dynamo.reset()
    problem = make_problem(contexts, Grid(6, 8, 3, 4), tokens=2)
    tensors = [v.detach() for v in problem.tensors]
    numbers = tuple(range(len(tensors)))
    if transform is vmap:
        tensors = [torch.stack([v, -v]) for v in tensors]
        run = vmap(problem.call)
    else:
        run = transform(scalar(problem), numbers)
    assert_same(torch.compile(run, fullgraph=True, backend="eager")(*tensors), run(*tensors))


def right_or_raises(run, wanted):
    """Forward mode through a graph: its tangent, or NotImplementedError, never zeros."""
    torch._dynamo.reset()
    with contextlib.suppress(NotImplementedError, torch._dynamo.exc.TorchDynamoException):
        torch.testing.assert_close(run(), wanted)


@cases(("shared", "additive_ids"))
def test_forward_mode_through_a_graph_is_right_or_raises(contexts):
    problem = make_problem(contexts)
    tensors = tuple(v.detach() for v in problem.tensors)
    tangents = tuple(torch.randn_like(v) for v in tensors)
    wanted = jvp(problem.call, tensors, tangents)[1]

    def compiled(fullgraph):
        return lambda *v: torch.compile(problem.call, backend="eager", fullgraph=fullgraph)(*v)

    def dual():
        with forward_ad.dual_level():
            y = compiled(True)(*(forward_ad.make_dual(v, t) for v, t in zip(tensors, tangents)))
            tangent = forward_ad.unpack_dual(y).tangent
            return torch.zeros_like(y) if tangent is None else tangent

    for fullgraph in (False, True):
        whole = torch.compile(lambda *v: jvp(problem.call, v, tangents), backend="eager", fullgraph=fullgraph)
        right_or_raises(lambda whole=whole: whole(*tensors)[1], wanted)
        right_or_raises(lambda fullgraph=fullgraph: jvp(compiled(fullgraph), tensors, tangents)[1], wanted)
    right_or_raises(dual, wanted)


def test_forward_mode_through_an_exported_layer_raises():
    layer, x = hk.HyperLinear(20, 10, width=4), torch.randn(4, 20)
    program = torch.export.export(layer, (x,)).module()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(program, (x,), (x,))


def test_vmap_over_context_ids():
    hidden, head, x = torch.randn(3, 2, 2, 4), torch.randn(4, 5, 5), torch.randn(6, 10)
    ids = torch.randint(3, (7, 6))
    got = vmap(lambda ids: hk.hyper_linear(x, hidden, head, context_ids=ids))(ids)
    wanted = torch.stack([hk.hyper_linear(x, hidden, head, context_ids=row) for row in ids])
    torch.testing.assert_close(got, wanted)


def test_compile_with_inductor():
    torch._dynamo.reset()
    layer = hk.HyperLinear(20, 10, context_features=3, width=4, bias="generated")
    x, z = torch.randn(5, 2, 20), torch.randn(5, 3)
    compiled = torch.compile(layer, fullgraph=True)
    with hk.context(z):
        y, wanted = compiled(x), layer(x)
    torch.testing.assert_close(y, wanted)
    assert_same(
        torch.autograd.grad(y.sum(), list(layer.parameters())),
        torch.autograd.grad(wanted.sum(), list(layer.parameters())),
    )


def test_the_ambient_context_can_be_entered_inside_a_graph():
    torch._dynamo.reset()
    layer = hk.HyperLinear(20, 10, context_features=3, width=4)

    def run(x, z):
        with hk.context(z):
            return layer(x)

    x, z = torch.randn(5, 20), torch.randn(5, 3)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x, z), run(x, z))


def test_export_with_a_dynamic_batch():
    layer = hk.HyperLinear(20, 10, width=4)
    program = torch.export.export(layer, (torch.randn(4, 20),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    x = torch.randn(9, 20)
    torch.testing.assert_close(program.module()(x), layer(x))
    assert "hyperkernels.contract" in str(program.graph)


def test_export_a_conditional_layer_with_ids():
    layer = hk.HyperLinear(20, 10, context_features=3, width=4, bias="generated")
    batch = torch.export.Dim("batch")
    arguments = (torch.randn(4, 20), torch.randn(2, 3), torch.tensor([0, 1, 1, 0]))
    shapes = {"x": {0: batch}, "context": None, "context_ids": {0: batch}}
    program = torch.export.export(layer, arguments, dynamic_shapes=shapes)
    others = (torch.randn(7, 20), torch.randn(2, 3), torch.tensor([1, 0, 0, 1, 1, 1, 0]))
    torch.testing.assert_close(program.module()(*others), layer(*others))


@pytest.mark.parametrize("wanted", [["y"], ["hidden", "head", "x"], ["x"], ["head"]], ids="-".join)
@pytest.mark.parametrize("activation", ["", "gelu"], ids=["dense", "additive"])
def test_opcheck(wanted, activation):
    N, K, rows, cols, m, G, T = 10, 7, 4, 3, 2, 3, 2
    given = {
        "y": torch.randn(G, T, N),
        "hidden": torch.randn(G, m) if activation else torch.randn(G, 3, 3, m),
        "chunks": torch.randn(3, 3, m) if activation else None,
        "head": torch.randn(m, rows, cols),
        "x": torch.randn(G, T, K),
    }
    factors = [given[name] for name in FACTORS]
    arguments = (wanted, [N, K, rows, cols, m, G, G, T, 0], activation, "", "", None, *factors)
    torch.library.opcheck(torch.ops.hyperkernels.contract.default, arguments)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators.append(operator)
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("needs_grad", [False, True])
def test_whoever_watches_sees_the_operator(needs_grad):
    x, hidden, head = (torch.randn(size, requires_grad=needs_grad) for size in ((5, 6), (2, 3, 4), (4, 3, 2)))
    with Seen() as seen:
        hk.hyper_linear(x, hidden, head)
    assert torch.ops.hyperkernels.contract.default in seen.operators
    with profile(activities=[ProfilerActivity.CPU]) as found:
        hk.hyper_linear(x, hidden, head)
    assert "hyperkernels::contract" in {event.key for event in found.key_averages()}


def test_views_that_negate():
    negated = torch.randn(5, 6, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    hidden, head = torch.randn(2, 3, 4), torch.randn(4, 3, 2)
    assert_same(hk.hyper_linear(negated, hidden, head), hk.hyper_linear(negated.resolve_neg(), hidden, head))


@pytest.mark.parametrize("order", ORDERS)
def test_flops_are_counted_for_the_order_that_runs(order):
    x, hidden, head = torch.randn(64, 96), torch.randn(8, 6, 4), torch.randn(4, 8, 16)
    with FlopCounterMode(display=False) as counter:
        hk.hyper_linear(x, hidden, head, order=order)
    B, N, K, I, J, m, rows, cols = 64, 64, 96, 8, 6, 4, 8, 16
    by_hand = {
        "generate": 2 * N * K * m + 2 * B * N * K,
        "head_first": 2 * B * K * m * rows + 2 * B * N * J * m,
        "hidden_first": 2 * B * K * I * m + 2 * B * N * m * cols,
    }
    assert counter.get_total_flops() == by_hand[order]


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("contexts", CONTEXTS)
def test_a_cuda_graph_replays_the_triton_engine(contexts):
    problem = make_problem(contexts, Grid(60, 90, 8, 16), 8, tokens=30, dtype=torch.float32, device="cuda")
    tensors = [v.detach() for v in problem.tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        problem.call(*tensors, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = problem.call(*tensors, backend="triton")
    tensors[0].normal_()
    graph.replay()
    torch.testing.assert_close(y, problem.call(*tensors, backend="triton"))
