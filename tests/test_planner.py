"""The cost model's figures by hand, its choices, and the account that `explain` gives."""

from __future__ import annotations

import itertools

import pytest
import torch

import hyperkernels as hk
from hyperkernels.backends import plan_call
from hyperkernels.backends.torch_blocks import block_sizes, formed_bytes, passing_bytes
from hyperkernels.call import ORDERS, Call
from hyperkernels.chunking import Grid
from hyperkernels.planner import default_chunk

LARGE = Call(Grid(4096, 4096, 16, 256), width=32, contexts=1, entries=1, tokens=256)


def plan_contraction(call, wanted, order=None, backend="torch"):
    return plan_call(call, wanted, order, backend)[1]


def flops(call, slot):
    return {cost.order: cost.flops for cost in plan_contraction(call, (slot,)).candidates[slot]}


@pytest.mark.parametrize("slot", ["y", "hidden", "head", "x"])
@pytest.mark.parametrize("contexts", [1, 4])
def test_flops_are_designs_formulas(contexts, slot):
    N, K, rows, cols, m, T = 96, 64, 8, 16, 4, 10
    I, J, B, n = N // rows, K // cols, contexts * T, N * K
    call = Call(Grid(N, K, rows, cols), m, contexts, contexts, T)
    assert flops(call, slot) == {
        "generate": 2 * contexts * n * m + 2 * B * n,
        "head_first": 2 * B * K * m * rows + 2 * B * N * J * m,
        "hidden_first": 2 * B * K * I * m + 2 * B * N * m * cols,
    }


@pytest.mark.parametrize("order", ORDERS)
def test_flops_with_ids_count_the_tokens_there_are(order):
    N, K, rows, cols, m, G, entries, T = 96, 64, 8, 16, 4, 64, 65, 3
    call = Call(Grid(N, K, rows, cols), m, G, entries, T, mapped=True)
    one_per_entry = Call(Grid(N, K, rows, cols), m, 1, 1, entries * T)
    extra = 2 * (G - 1) * N * K * m if order == "generate" else 0
    assert flops(call, "y")[order] == flops(one_per_entry, "y")[order] + extra


def test_backward_forms_one_twin_for_two_gradients():
    alone = sum(plan_contraction(LARGE, (slot,)).flops for slot in ("hidden", "head", "x"))
    together = plan_contraction(LARGE, ("hidden", "head", "x"))
    shared = next(step for step in together.steps if len(step.outputs) == 2)
    assert set(shared.outputs) == {"head", "x"}
    assert shared.forms == ("hidden", "y")
    assert together.flops == alone - 2 * 256 * 4096 * 16 * 32  # one intermediate less, from (hidden, dy)


def test_the_twin_is_formed_once_when_it_runs(monkeypatch):
    equations = []
    einsum = torch.einsum
    monkeypatch.setattr(torch, "einsum", lambda equation, *v: equations.append(equation) or einsum(equation, *v))
    x, hidden, head = (torch.randn(*s, requires_grad=True) for s in ((4, 64), (8, 4, 2), (2, 8, 16)))
    y = hk.hyper_linear(x, hidden, head, order="head_first", backend="torch")
    equations.clear()
    y.sum().backward()
    assert sorted(equations) == sorted(
        ["krq,gtjq->gtjkr", "gtjkr,gtir->gijk", "gijk,gtir->gtjkr", "gtjkr,krq->gtjq", "gtjkr,gtjq->krq"]
    )


def test_the_order_picked_has_the_least_estimated_time():
    for tokens, width, chunk in itertools.product(
        (1, 64, 4096), (4, 64), ((16, 256), (1, 4096), (4096, 1), (512, 512))
    ):
        call = LARGE._replace(tokens=tokens, width=width, grid=Grid(4096, 4096, *chunk))
        plan = plan_contraction(call, ("y",))
        times = {cost.order: cost.time_us for cost in plan.candidates["y"]}
        assert plan.order_of("y") == min(times, key=times.__getitem__)


def test_known_choices():
    assert plan_contraction(LARGE, ("y",)).order_of("y") == "head_first"
    wide_chunks = LARGE._replace(grid=Grid(4096, 4096, 1024, 8), tokens=1)
    assert plan_contraction(wide_chunks, ("y",)).order_of("y") == "hidden_first"
    many_tokens_wide = LARGE._replace(width=512, tokens=4096)
    assert plan_contraction(many_tokens_wide, ("y",)).order_of("y") == "generate"


@pytest.mark.parametrize("order", ORDERS)
def test_a_forced_order_is_kept_for_every_output(order):
    plan = plan_contraction(LARGE, ("hidden", "head", "x"), order)
    assert {step.order for step in plan.steps} == {order}


@pytest.mark.parametrize("per_chunk_heads", [False, True])
@pytest.mark.parametrize("activation", ["", "relu"])
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_fit_their_cache_level(order, activation, per_chunk_heads):
    call = LARGE._replace(contexts=64, entries=64, tokens=512, activation=activation, per_chunk_heads=per_chunk_heads)
    blocks = call.sizes | block_sizes(call, order)
    assert formed_bytes(call, order, blocks) <= 4 << 20
    assert passing_bytes(call, blocks) <= 32 << 20
    assert all(1 <= blocks[label] <= size for label, size in call.sizes.items())


@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (1024, 4096), (768, 768), (1000, 3000), (10, 784), (64, 64)])
@pytest.mark.parametrize("width", [8, 32])
def test_default_chunk_is_cheap_and_not_rank_limited(N, K, width):
    rows, cols = default_chunk(N, K, width)
    assert Grid(N, K, rows, cols).rank_bound(width) == min(N, K)
    dense_or_less = max(1.0, width / min(N, K) * 4)
    assert min(width * rows / N + width / cols, 1.0) <= dense_or_less
    if min(N, K) >= 512:
        assert width * rows / N + width / cols < 0.75


def test_a_weight_of_default_chunks_has_full_rank():
    layer = hk.HyperLinear(96, 64, width=8, bias=False)
    assert torch.linalg.matrix_rank(layer.to_dense().weight.double()) == 64
    assert layer.grid.rank_bound(8) == 64


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_explain_prints_and_returns_the_plan(backend, capsys):
    hidden, head, x = torch.randn(64, 4, 8), torch.randn(8, 16, 64), torch.randn(32, 256)
    explanation = hk.explain(hk.hyper_linear, x, hidden, head, backend=backend)
    printed = capsys.readouterr().out
    assert printed.strip() == str(explanation)
    for words in (f"backend {backend}", "not reference: ", "dhidden", "picked: forms", "times slower"):
        assert words in printed
    assert explanation.forward.order_of("y") == "head_first"
    assert "shared with" in printed


def test_explain_a_forced_order_and_backend(capsys):
    layer = hk.HyperLinear(64, 64, width=4, context_features=3)
    layer.order = "generate"
    explanation = hk.explain(layer, torch.randn(5, 64), torch.randn(5, 3))
    assert explanation.forward.order_of("y") == "generate"
    assert "order='generate' was asked for" in capsys.readouterr().out
    layer.order, layer.backend = None, "reference"
    assert hk.explain(layer, torch.randn(5, 64), torch.randn(5, 3)).backend == "reference"
    assert "not torch: backend='reference' was asked for" in capsys.readouterr().out


def test_explain_what_runs():
    """The orders that `explain` names are those whose FLOPs the counter sees."""
    from torch.utils.flop_counter import FlopCounterMode

    layer = hk.HyperLinear(128, 96, width=8)
    x = torch.randn(16, 128, requires_grad=True)
    explanation = hk.explain(layer, x)
    arguments = layer.arguments(x)
    leaves = replace_leaves(arguments)
    with FlopCounterMode(display=False) as counter:
        y = hk.hyper_linear(**leaves)
    assert counter.get_total_flops() == explanation.forward.flops
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == explanation.backward.flops


def replace_leaves(arguments):
    return {k: v.detach().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
