"""`hyper_linear` against the fp64 reference: every order, context form, dtype, shape and derivative."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import CONTEXTS, can, gradients, make_problem
from torch.autograd import gradcheck, gradgradcheck

import hyperkernels as hk
from hyperkernels.call import ORDERS
from hyperkernels.chunking import Grid
from hyperkernels.hidden import ACTIVATIONS
from hyperkernels.testing import assert_no_worse_than_eager

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GRIDS = {
    "one_weight": Grid(1, 1, 1, 1),
    "one_chunk": Grid(13, 11, 13, 11),
    "one_row": Grid(6, 10, 1, 10),
    "primes": Grid(31, 29, 7, 5),
    "cropped_rows": Grid(30, 32, 8, 8),
    "cropped_cols": Grid(32, 33, 8, 8),
    "whole": Grid(64, 48, 8, 16),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("order", [None, *ORDERS])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_error_at_most_twice_eagers(dtype, order, contexts, grid, engine):
    """Over several draws at once: where one weight nearly cancels, a single draw says little."""
    backend, device = engine
    if not can(backend, dtype):
        problem = make_problem(contexts, grid, 5, device=device)
        with pytest.raises(ValueError, match=f"'{backend}' cannot do this call: it has no {dtype}"):
            problem.call(*problem.to(dtype), backend=backend, order=order)
        return
    draws = []
    for seed in range(4):
        problem = make_problem(contexts, grid, 5, device=device, tokens=4, seed=seed)
        low = problem.to(dtype)
        high = tuple(v.detach().double().requires_grad_() for v in low)
        dy = torch.randn_like(problem.call(*high)).to(dtype).double()
        ours = gradients(problem, low, dy, backend=backend, order=order)
        eager = gradients(problem, low, dy, backend="reference")
        draws.append((ours, eager, gradients(problem, high, dy, backend="reference")))
    ours, eager, exact = ([torch.stack(v) for v in zip(*results)] for results in zip(*draws))
    for name, *values in zip(("y", *problem.names), ours, eager, exact):
        assert_no_worse_than_eager(name, *values)


@pytest.mark.parametrize("per_chunk_heads", [False, True], ids=["shared_head", "per_chunk_heads"])
@pytest.mark.parametrize("contexts", ["shared", "per_entry", "ids"])
@pytest.mark.parametrize("order", ORDERS)
def test_small_integers_are_exact_in_every_order(order, contexts, per_chunk_heads, engine):
    backend, device = engine
    problem = make_problem(
        contexts,
        Grid(30, 33, 8, 8),
        4,
        integers=True,
        dtype=torch.float32,
        device=device,
        per_chunk_heads=per_chunk_heads,
    )
    if not can(backend, torch.float32, per_chunk_heads):
        with pytest.raises(ValueError, match="share one head"):
            problem.call(*problem.tensors, order=order, backend=backend)
        return
    dy = torch.randint(-2, 3, problem.call(*problem.tensors).shape).to(device, torch.float32)
    for got, wanted in zip(
        gradients(problem, problem.tensors, dy, order=order, backend=backend),
        gradients(problem, problem.tensors, dy, backend="reference"),
    ):
        assert torch.equal(got, wanted)


def test_hand_computed():
    hidden = torch.tensor([[[1.0], [2.0]]])  # one row of two chunks
    head = torch.tensor([[[1.0, 10.0]]])  # of one row and two columns; W = [1, 10, 2, 20]
    y = hk.hyper_linear(torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]), hidden, head)
    assert y.tolist() == [[13.0], [30.0]]


@pytest.mark.parametrize("per_chunk_heads", [False, True], ids=["shared_head", "per_chunk_heads"])
@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck_and_gradgradcheck(order, contexts, per_chunk_heads, backend):
    problem = make_problem(contexts, Grid(5, 4, 3, 3), 2, tokens=2, per_chunk_heads=per_chunk_heads, head_bias=True)

    def call(*tensors):
        return problem.call(*tensors, order=order, backend=backend)

    assert gradcheck(call, problem.tensors)
    assert gradgradcheck(call, problem.tensors)


@pytest.mark.parametrize("contexts", ["additive", "additive_per_entry", "additive_ids"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, contexts, backend):
    problem = make_problem(contexts, activation=activation)
    dy = torch.randn_like(problem.call(*problem.tensors))
    for got, wanted in zip(
        gradients(problem, problem.tensors, dy, backend=backend),
        gradients(problem, problem.tensors, dy, backend="reference"),
    ):
        torch.testing.assert_close(got, wanted)


def third_derivative(problem, **keywords):
    """Every gradient enters the next at once, where gradgradcheck takes them one by one."""
    value = problem.call(*problem.tensors, **keywords).sin().sum()
    for _ in range(3):
        grads = torch.autograd.grad(value, problem.tensors, create_graph=True, allow_unused=True)
        value = sum(g.square().sum() for g in grads if g is not None)
    return value


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_to_the_third_derivative(activation):
    problem = make_problem("additive_per_entry", Grid(3, 2, 2, 1), activation=activation, tokens=1)
    torch.testing.assert_close(third_derivative(problem), third_derivative(problem, backend="reference"))


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("order", ORDERS)
def test_third_derivatives(order, contexts):
    problem = make_problem(contexts, Grid(3, 2, 2, 1), tokens=1)
    torch.testing.assert_close(third_derivative(problem, order=order), third_derivative(problem, backend="reference"))


@pytest.mark.parametrize("per_chunk_heads", [False, True], ids=["shared_head", "per_chunk_heads"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("contexts", ["shared", "per_entry", "additive_ids"])
def test_head_bias(contexts, grid, per_chunk_heads):
    problem = make_problem(contexts, grid, 3, head_bias=True, per_chunk_heads=per_chunk_heads)
    dy = torch.randn_like(problem.call(*problem.tensors))
    for got, wanted in zip(
        gradients(problem, problem.tensors, dy), gradients(problem, problem.tensors, dy, backend="reference")
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("J", [1, 3])
@pytest.mark.parametrize("per_chunk_heads", [False, True], ids=["shared_head", "per_chunk_heads"])
def test_a_head_bias_of_the_other_kind(per_chunk_heads, J):
    """One for all chunks where each has a head, and one for each where they share theirs; W by hand."""
    hidden, x = torch.randn(4, J, 3), torch.randn(6, 5 * J)
    head, bias = torch.randn(3, 2, 5), torch.randn(4 * J, 2, 5)
    heads, biases = head.expand(4 * J, 3, 2, 5), bias
    if per_chunk_heads:
        head = heads = torch.randn(4 * J, 3, 2, 5)
        bias = torch.randn(2, 5)
        biases = bias.expand(4 * J, 2, 5)
    chunks = torch.einsum("ijk,ijkrq->ijrq", hidden, heads.reshape(4, J, 3, 2, 5)) + biases.reshape(4, J, 2, 5)
    weight = chunks.transpose(1, 2).reshape(8, 5 * J)
    torch.testing.assert_close(hk.generate_weight(hidden, head, (8, 5 * J), head_bias=bias), weight)
    for backend in (None, "reference"):
        y = hk.hyper_linear(x, hidden, head, head_bias=bias, backend=backend)
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-4)


def test_bias_for_all_and_per_context():
    hidden, head = torch.randn(3, 2, 2, 4), torch.randn(4, 5, 5)
    x, ids = torch.randn(6, 2, 10), torch.tensor([0, 2, 2, 1, 0, 0])
    for bias in (torch.randn(10), torch.randn(3, 10)):
        added = bias[ids][:, None] if bias.dim() == 2 else bias
        y = hk.hyper_linear(x, hidden, head, context_ids=ids, bias=bias)
        assert torch.equal(y, hk.hyper_linear(x, hidden, head, context_ids=ids) + added)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3)], ids=str)
def test_any_leading_dimensions(lead):
    hidden, head = torch.randn(2, 3, 4), torch.randn(4, 5, 3)
    x = torch.randn(*lead, 9)
    y = hk.hyper_linear(x, hidden, head)
    assert y.shape == (*lead, 10)
    torch.testing.assert_close(y, x @ hk.generate_weight(hidden, head, (10, 9)).T)


def test_strided_and_expanded_inputs(backend):
    hidden, head = torch.randn(4, 3, 2).transpose(0, 2), torch.randn(3, 5, 4).permute(2, 1, 0)
    for x in (torch.randn(9, 7).T, torch.randn(7, 18)[:, ::2], torch.randn(9).expand(7, 9)):
        wanted = x @ hk.generate_weight(hidden, head, (10, 9)).T
        for order in ORDERS:
            torch.testing.assert_close(hk.hyper_linear(x, hidden, head, order=order, backend=backend), wanted)


@pytest.mark.parametrize("contexts", CONTEXTS)
def test_empty_batch(contexts, engine):
    backend, device = engine
    problem = make_problem(contexts, tokens=0, device=device)
    tensors = problem.to(torch.float32)
    dy = torch.empty_like(problem.call(*tensors))
    results = gradients(problem, tensors, dy, backend=backend)
    assert results[0].numel() == 0
    for tensor, grad in zip(tensors, results[1:]):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("N", [12, 10])
@pytest.mark.parametrize("own", [False, True])
def test_an_empty_batch_through_biases_of_heads(N, own):
    bias = torch.randn(9, 4, 5) if own else torch.randn(4, 5)
    factors = torch.randn(0, 14), torch.randn(3, 3, 6), torch.randn(6, 4, 5)
    assert hk.hyper_linear(*factors, head_bias=bias, bias=torch.randn(N), out_features=N).shape == (0, N)


def test_no_entries_at_all():
    hidden = torch.randn(3, 2, 2, 4, requires_grad=True)
    y = hk.hyper_linear(torch.randn(0, 10), hidden, torch.randn(4, 5, 5), context_ids=torch.zeros(0, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (0, 10)
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_unused_contexts_get_zero_gradients(backend):
    hidden = torch.randn(4, 2, 2, 3, requires_grad=True)
    ids = torch.tensor([2, 2, 0])
    x, head = torch.randn(3, 10), torch.randn(3, 5, 5)
    hk.hyper_linear(x, hidden, head, context_ids=ids, backend=backend).sum().backward()
    assert [bool(grad.any()) for grad in hidden.grad] == [True, False, True, False]


def test_ids_over_two_leading_dimensions():
    hidden, head = torch.randn(3, 2, 2, 4), torch.randn(4, 5, 5)
    x, ids = torch.randn(2, 4, 6, 10), torch.tensor([[0, 2, 2, 1], [1, 1, 0, 2]], dtype=torch.int32)
    weight = hk.generate_weight(hidden, head, (10, 10))
    wanted = torch.einsum("abtk,abnk->abtn", x, weight[ids])
    torch.testing.assert_close(hk.hyper_linear(x, hidden, head, context_ids=ids), wanted)


def test_many_tokens_and_contexts_take_many_blocks(backend):
    """At 1 MiB of workspace every label that may be split is split, and the results do not change."""
    grid = Grid(70, 130, 8, 32)
    for contexts, per_chunk_heads in itertools.product(CONTEXTS, (False, True)):
        problem = make_problem(contexts, grid, 16, tokens=400, per_chunk_heads=per_chunk_heads)
        dy = torch.randn_like(problem.call(*problem.tensors))
        wanted = gradients(problem, problem.tensors, dy, backend="reference")
        hk.set_workspace_mib(1)
        try:
            for order in ORDERS:
                found = gradients(problem, problem.tensors, dy, order=order, backend=backend)
                for got, want in zip(found, wanted):
                    torch.testing.assert_close(got, want)
        finally:
            hk.set_workspace_mib(64)


@pytest.mark.parametrize("order", ORDERS)
def test_bit_equal_from_run_to_run(order, engine):
    backend, device = engine
    problem = make_problem("ids", Grid(60, 90, 8, 16), 8, tokens=50, dtype=torch.float32, device=device)
    dy = torch.randn_like(problem.call(*problem.tensors))
    first = gradients(problem, problem.tensors, dy, order=order, backend=backend)
    for _ in range(3):
        again = gradients(problem, problem.tensors, dy, order=order, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_takes_every_argument_to_its_dtype(dtype, device):
    problem = make_problem("additive_per_entry", dtype=torch.float32, head_bias=True, device=device)
    with torch.autocast(device, dtype):
        y = problem.call(*problem.tensors)
    assert y.dtype == dtype
    assert torch.equal(y, problem.call(*problem.to(dtype)))
    y.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in problem.tensors)


def test_generate_weight_per_context_and_whole():
    hidden, head, bias = torch.randn(3, 2, 2, 4), torch.randn(4, 5, 6), torch.randn(5, 6)
    weight = hk.generate_weight(hidden, head, (9, 11), head_bias=bias)
    assert weight.shape == (3, 9, 11)
    i, j, r, q = 1, 1, 3, 4
    wanted = (hidden[2, i, j] * head[:, r, q]).sum() + bias[r, q]
    torch.testing.assert_close(weight[2, i * 5 + r, j * 6 + q], wanted)
    assert hk.generate_weight(hidden[0], head, (9, 11)).shape == (9, 11)
