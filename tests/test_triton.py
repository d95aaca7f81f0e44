"""The Triton engine's kernels, one operation at a time in Triton's interpreter, against the fp64 reference.

On a CUDA device the other tests run them for real, as one of the engines.
"""

from __future__ import annotations

import json
from dataclasses import astuple
from functools import lru_cache, partial
from math import inf

import pytest
import torch
from conftest import CONTEXTS, CUDA, gradients, make_problem

import hyperkernels as hk
from hyperkernels import at_once, functional
from hyperkernels.backends import BACKENDS, _plan, plan_call, torch_matmul, triton_fused
from hyperkernels.call import ORDERS, SLOTS, Call
from hyperkernels.chunking import Grid
from hyperkernels.form import canonical_form
from hyperkernels.hidden import ACTIVATIONS
from hyperkernels.kernels import tuning
from hyperkernels.kernels.tiles import CHIPS, Tile, work_of
from hyperkernels.planner import Cost, plan_contraction
from hyperkernels.testing import assert_no_worse_than_eager

pytestmark = pytest.mark.skipif(CUDA, reason="the other tests run these kernels on the device, as an engine")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONTRACT, PRODUCTS = torch_matmul.contract, triton_fused.products
GRIDS = {"cropped": Grid(17, 14, 5, 4), "one_row": Grid(6, 20, 1, 20), "wide": Grid(18, 70, 9, 35)}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """The kernels, and never the plain products that may be expected to be faster."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(at_once, "_found", {})
    too_slow(monkeypatch, "products")
    yield
    _plan.cache_clear()


def too_slow(monkeypatch, way):
    monkeypatch.setattr(triton_fused, way, lambda call, step: Cost(inf, 0, way))
    _plan.cache_clear()


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles as small as they can be, so that little problems have many of them, splits and edges."""
    from hyperkernels.kernels import launch

    def least(sizes, chip):
        order = sizes.kernel.split("_")[0]
        block = (4, 4, 4, 4, 16, 16) if order == "contract" else (16, 1, 16, 2, 16, 16)
        return Tile(*block, splits=min(3, work_of(sizes, Tile(*block)).splits)), 0.0

    monkeypatch.setattr(launch, "tile_for", least)
    monkeypatch.setattr(launch, "recipe", launch.recipe.__wrapped__)  # none of a planned tile


def check(problem, dtype, order):
    low = problem.to(dtype)
    high = tuple(v.detach().double().requires_grad_() for v in low)
    dy = torch.randn_like(problem.call(*high)).to(dtype).double()
    ours = gradients(problem, low, dy, backend="triton", order=order)
    eager = gradients(problem, low, dy, backend="reference")
    exact = gradients(problem, high, dy, backend="reference")
    for name, *values in zip(("y", *problem.names), ours, eager, exact):
        assert_no_worse_than_eager(name, *values)


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_error_at_most_twice_eagers(dtype, order, contexts):
    check(make_problem(contexts, GRIDS["cropped"], 5, tokens=4), dtype, order)


@pytest.mark.parametrize("grid", [GRIDS["one_row"], GRIDS["wide"]], ids=["one_row", "wide"])
@pytest.mark.parametrize("order", ORDERS)
def test_grids(order, grid):
    check(make_problem("per_entry", grid, 19, tokens=1), torch.float32, order)


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("order", ORDERS)
def test_many_tiles_and_splits(order, contexts, small_tiles):
    dtype = torch.float16 if contexts.startswith("additive") else torch.float32
    check(make_problem(contexts, Grid(19, 23, 5, 11), 9, tokens=5), dtype, order)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_a_context_per_sample(order, dtype):
    check(make_problem("additive_per_entry", Grid(17, 14, 5, 4), 6, tokens=1, activation="relu"), dtype, order)


def test_fp32_is_rounded_for_tensor_cores_only_where_torch_allows_it(monkeypatch):
    from hyperkernels.kernels import launch

    factors = {"x": torch.randn(1, 3, 8), "hidden": torch.randn(1, 2, 2, 4), "head": torch.randn(4, 3, 4)}
    call = Call(Grid(6, 8, 3, 4), 4, 1, 1, 3)
    for allowed in (False, True):
        monkeypatch.setattr(launch, "tf32_allowed", lambda allowed=allowed: allowed)
        found = launch.prepare(call, "head_first", "y", factors, None, CHIPS[9, 0])
        assert found.keywords["PRECISION"] == ("tf32" if allowed else "ieee")
        dense = torch.einsum("ijk,krq->irjq", factors["hidden"][0], factors["head"]).reshape(6, 8)
        torch.testing.assert_close(found.run()["y"], factors["x"] @ dense.T, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("contexts", ["shared", "per_entry", "additive_per_entry"])
@pytest.mark.parametrize("order", ORDERS)
def test_tensors_that_lie_as_others_did_are_put_in_their_place(order, contexts, small_tiles, monkeypatch):
    from hyperkernels.kernels import launch

    filled, counts = launch.Pattern.filled, []
    monkeypatch.setattr(launch, "recipe", lru_cache(launch.recipe))
    monkeypatch.setattr(launch.Pattern, "filled", lambda *given: counts.append(1) or filled(*given))
    for seed in range(2):
        assert not counts
        torch.manual_seed(seed)
        check(make_problem(contexts, Grid(19, 23, 5, 11), 9, tokens=5), torch.float32, order)
    assert len(counts) == len(SLOTS)


@pytest.mark.parametrize("shape", [(31,), (4, 31), (2, 3, 31), (2, 3, 2, 31)], ids=str)
@pytest.mark.parametrize("bias", ["no_bias", "bias"])
def test_a_call_asked_for_again_goes_straight_to_the_kernel(shape, bias, monkeypatch):
    hidden, head = torch.randn(4, 3, 5), torch.randn(5, 6, 11)
    own = {"bias": torch.randn(23) if bias == "bias" else None, "out_features": 23}
    canonical, counts = canonical_form, []
    monkeypatch.setattr(functional, "canonical_form", lambda *given: counts.append(1) or canonical(*given))
    for _ in range(3):
        x = torch.randn(shape)
        wanted = hk.hyper_linear(x, hidden, head, **own, backend="reference")
        counts.clear()
        found = hk.hyper_linear(x, hidden, head, **own, backend="triton")
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not counts
    apart = torch.randn(*shape, 2)[..., 0]
    torch.testing.assert_close(
        hk.hyper_linear(apart, hidden, head, **own, backend="triton"),
        hk.hyper_linear(apart, hidden, head, **own, backend="reference"),
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_call_of_a_context_per_entry_asked_for_again(monkeypatch):
    run, counts = triton_fused.again, []
    monkeypatch.setitem(
        BACKENDS, "triton", BACKENDS["triton"]._replace(again=lambda *given: counts.append(1) or run(*given))
    )
    x, hidden, head, bias = torch.randn(3, 2, 31), torch.randn(3, 4, 3, 5), torch.randn(5, 6, 11), torch.randn(3, 24)
    for _ in range(3):
        found = hk.hyper_linear(x, hidden, head, bias=bias, backend="triton")
        torch.testing.assert_close(
            found, hk.hyper_linear(x, hidden, head, bias=bias, backend="reference"), atol=1e-4, rtol=1e-4
        )
    assert len(counts) == 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("order", ["head_first", "generate"])
def test_activations(order, activation):
    check(make_problem("additive_per_entry", Grid(7, 9, 4, 5), 3, activation=activation), torch.float32, order)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_near_zero(activation):
    problem = make_problem("additive_per_entry", Grid(7, 9, 4, 5), 3, activation=activation)
    x, context, chunks, head = problem.tensors
    small = [(1e-3 * v).detach() for v in (context, chunks)]
    exact = problem.call(x, *small, head, backend="reference")
    low = [v.detach().float() for v in (x, *small, head)]
    eager = problem.call(*low, backend="reference")
    assert_no_worse_than_eager("y", problem.call(*low, backend="triton"), eager, exact)


@pytest.mark.parametrize("contexts", ["shared", "per_entry", "ids"])
@pytest.mark.parametrize("order", ORDERS)
def test_small_integers_are_exact(order, contexts):
    problem = make_problem(contexts, Grid(30, 33, 8, 8), 4, integers=True, dtype=torch.float32)
    dy = torch.randint(-2, 3, problem.call(*problem.tensors).shape).float()
    for got, wanted in zip(
        gradients(problem, problem.tensors, dy, order=order, backend="triton"),
        gradients(problem, problem.tensors, dy, backend="reference"),
    ):
        assert torch.equal(got, wanted)


def test_strides():
    x = torch.randn(3, 40, 4).transpose(1, 2)[:, 1:, ::2]
    hidden = torch.randn(5, 4, 2, 3).permute(2, 0, 1, 3).contiguous()[:1].expand(3, 5, 4, 3)
    head = torch.randn(3, 5, 6).permute(0, 2, 1)
    y = hk.hyper_linear(x, hidden, head, backend="triton")
    torch.testing.assert_close(y, hk.hyper_linear(x, hidden, head, backend="reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7)])
def test_empty_batches(shape):
    x, hidden, head = torch.randn(shape), torch.randn(3, 3, 2), torch.randn(2, 4, 3)
    assert hk.hyper_linear(x, hidden, head, out_features=10, backend="triton").shape == (*shape[:-1], 10)


def test_offsets_past_2_to_the_31():
    """Views of memory that is never touched between."""
    memory, far = torch.empty((1 << 31) + 4096, dtype=torch.float16), 1 << 30
    rows = memory.as_strided((3, 24), (far, 1))
    features = memory.as_strided((3, 24), (1, (1 << 31) // 24 + 1), 512)
    head = memory.as_strided((3, 5, 6), (far, 6, 1), 1024)
    hidden = memory.as_strided((3, 4, 3), (far, 3, 1), 2048)
    dy = memory.as_strided((3, 15), (far, 1), 3072)
    for view in (rows, features, head, hidden, dy):
        view.normal_()
    for context in (memory.as_strided((3, 3), (1, 1 << 30), 4000), head[:, 0, :3].clone()):
        context.copy_(head[:, 0, :3])
        layer = hk.AdditiveHidden(context, torch.ones(2, 2, 3).half(), "tanh")
        found = hk.hyper_linear(rows[:, :12].contiguous(), layer, head.clone(), backend="triton")
        wanted = hk.hyper_linear(rows[:, :12].contiguous(), layer, head.clone(), backend="reference")
        torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-2)
    for x in (rows, features):
        for order in ORDERS:
            found = []
            for tensors in ((x, hidden, head, dy), tuple(v.clone() for v in (x, hidden, head, dy))):
                *leaves, cotangent = (v.detach().requires_grad_() for v in tensors)
                y = hk.hyper_linear(*leaves, order=order, backend="triton")
                assert torch.equal(hk.hyper_linear(*leaves, order=order, backend="triton"), y)
                found.append((y, *torch.autograd.grad(y, leaves, cotangent.detach())))
            for got, wanted in zip(*found):
                assert torch.equal(got, wanted)


@pytest.mark.parametrize("contexts", ["shared", "additive_ids"])
def test_compiled_without_a_graph_break(contexts):
    problem = make_problem(contexts, dtype=torch.float32)
    compiled = torch.compile(partial(problem.call, backend="triton"), backend="aot_eager", fullgraph=True)
    dy = torch.randn_like(problem.call(*problem.tensors))
    y = compiled(*problem.tensors)
    wanted = gradients(problem, problem.tensors, dy, backend="triton")
    for got, want in zip((y, *torch.autograd.grad(y, problem.tensors, dy)), wanted):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("width", "rows"), [(0, 3), (2, 0)])
def test_nothing_to_sum(width, rows):
    leaves = [torch.randn(size, requires_grad=True) for size in ((rows, 7), (3, 3, width), (width, 4, 3))]
    y = hk.hyper_linear(*leaves, backend="triton")
    assert not y.any()
    assert not any(grad.any() for grad in torch.autograd.grad(y.sum(), leaves))


@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("order", ORDERS)
def test_two_products_where_they_are_expected_to_be_faster(order, contexts, monkeypatch):
    runs = []

    def contract(*arguments):
        runs.append(arguments)
        return CONTRACT(*arguments)

    monkeypatch.setattr(triton_fused, "products", PRODUCTS)
    monkeypatch.setattr(torch_matmul, "contract", contract)
    too_slow(monkeypatch, "fused")
    check(make_problem(contexts, GRIDS["cropped"], 5, tokens=4), torch.float32, order)
    assert bool(runs) == (contexts in ("shared", "per_entry")), "of factors that lie in memory, row by row"


def test_a_large_intermediate_is_worth_two_products_only_for_its_sums(monkeypatch):
    """By the model of an H200: what sums over rows forms the intermediate anew for each of their blocks."""
    monkeypatch.setattr(triton_fused, "products", PRODUCTS)
    monkeypatch.setattr(triton_fused, "_chip", lambda device: CHIPS[9, 0])
    call = Call(Grid(4096, 4096, 16, 256), 32, 1, 1, 8192, dtype=torch.bfloat16, device="cuda")
    plans = {slot: plan_contraction(call, (slot,), None, triton_fused.estimate) for slot in SLOTS}
    by = {slot: plan.steps[0].cost.by for slot, plan in plans.items()}
    one, two = triton_fused.FUSED, triton_fused.TWO_PRODUCTS
    assert by == {"y": one, "hidden": two, "head": two, "x": one}


def test_what_it_cannot_do(monkeypatch):
    problem = make_problem()
    with pytest.raises(ValueError, match=r"'triton' cannot do this call: it has no torch\.float64"):
        problem.call(*problem.tensors, backend="triton")
    low = problem.to(torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="it runs on CUDA devices, and the tensors are on cpu"):
        problem.call(*low, backend="triton")
    assert problem.call(*low).shape == (3, 10)
    monkeypatch.setattr(triton_fused, "installed", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        problem.call(*low, backend="triton")


@pytest.fixture
def timings(monkeypatch):
    """The tiles that were timed; the last is always the fastest."""
    timed = []

    def time_s(run, tile):
        timed.append(tile)
        run(tile)()
        return 1.0 / len(timed)

    monkeypatch.setattr(tuning, "_time_s", time_s)
    yield timed
    hk.set_tuning(None)


def test_tuning_keeps_the_fastest_tile(tmp_path, timings, monkeypatch):
    hidden, head = torch.randn(5, 4, 3), torch.randn(3, 8, 16)

    def check_rows(rows):
        x = torch.randn(rows, 64)
        y = hk.hyper_linear(x, hidden, head, order="head_first", backend="triton")
        torch.testing.assert_close(y, hk.hyper_linear(x, hidden, head, backend="reference"), rtol=1e-4, atol=1e-4)

    check_rows(5)
    assert not timings
    hk.set_tuning(tmp_path / "tiles")
    check_rows(5)
    assert 1 < len(timings) <= 8
    assert list(json.loads((tmp_path / "tiles" / "tiles.json").read_text()).values()) == [list(astuple(timings[-1]))]
    count = len(timings)
    check_rows(8)  # of the same bucket
    hk.set_tuning(tmp_path / "tiles")  # as a new process would
    check_rows(6)
    assert len(timings) == count
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    check_rows(5)
    check_rows(9)  # new, and there is no time to be had
    assert len(timings) == count
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    check_rows(9)
    assert len(timings) > count


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"a": [1, 2]}', '{"a": [0, 1, 1, 1, 1, 1]}', '{"a": ["8", 1, 1, 1, 1, 1]}']
)
def test_a_damaged_table_of_tiles_is_left_alone(tmp_path, text):
    (tmp_path / "tiles.json").write_text(text)
    with pytest.raises(ValueError, match="not a table of tiles"):
        hk.set_tuning(tmp_path)
    assert (tmp_path / "tiles.json").read_text() == text


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"folder: got .*file, which is a file, wanted a folder"):
        hk.set_tuning(tmp_path / "file")
    with pytest.raises(TypeError, match="folder: got 5, wanted a path or None"):
        hk.set_tuning(5)


def test_the_plan_forms_an_intermediate_for_each_output():
    x, hidden, head = torch.randn(3, 32), torch.randn(4, 4, 5), torch.randn(5, 8, 8)
    plan = plan_call(canonical_form(x, hidden, head).call, ("hidden", "head", "x"), None, "triton")[1]
    assert [len(step.outputs) for step in plan.steps] == [1, 1, 1]
