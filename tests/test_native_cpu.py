"""The native CPU engine by itself: instruction sets, drawn problems, threads, addresses past 2^31, and its build."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from math import inf, nan
from pathlib import Path

import pytest
import torch
from conftest import CONTEXTS, gradients, make_problem, running_with

import hyperkernels as hk
from hyperkernels.backends import native_cpu
from hyperkernels.call import ORDERS
from hyperkernels.chunking import Grid
from hyperkernels.hidden import ACTIVATIONS
from hyperkernels.testing import FLOOR, assert_no_worse_than_eager, error

pytest.importorskip("hypothesis", reason="the fuzz tests need hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
INSTRUCTION_SETS = native_cpu._cpu.instruction_sets() if native_cpu._cpu else []


def test_it_is_built_and_preferred():
    assert native_cpu.MISSING == ""
    assert "portable" in INSTRUCTION_SETS
    hidden, head, x = torch.randn(4, 4, 2), torch.randn(2, 8, 8), torch.randn(3, 32)
    assert hk.explain(hk.hyper_linear, x, hidden, head).backend == "cpu"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set(name, order, contexts, dtype, monkeypatch):
    """Over sizes that leave part of a vector, of a tile and of a block in every label."""
    problem = make_problem(contexts, Grid(70, 330, 19, 37), 11, tokens=45, dtype=dtype)
    high = tuple(v.detach().double().requires_grad_() for v in problem.tensors)
    dy = torch.randn_like(problem.call(*problem.tensors)).double()
    eager = gradients(problem, problem.tensors, dy, backend="reference")
    exact = gradients(problem, high, dy, backend="reference")
    monkeypatch.setattr(native_cpu, "INSTRUCTIONS", name)
    ours = gradients(problem, problem.tensors, dy, backend="cpu", order=order)
    for output, *values in zip(("y", *problem.names), ours, eager, exact):
        assert_no_worse_than_eager(output, *values)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_small_integers_are_bit_equal_to_the_torch_backend(name, monkeypatch):
    monkeypatch.setattr(native_cpu, "INSTRUCTIONS", name)
    for contexts in ("shared", "per_entry", "ids"):
        for dtype in (torch.float64, torch.float32):
            problem = make_problem(contexts, Grid(70, 130, 16, 32), 8, tokens=20, integers=True, dtype=dtype)
            dy = torch.randint(-2, 3, problem.call(*problem.tensors).shape)
            for order in ORDERS:
                found = gradients(problem, problem.tensors, dy, order=order, backend="cpu")
                wanted = gradients(problem, problem.tensors, dy, order=order, backend="torch")
                assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_activations_over_their_range(dtype, activation, name, monkeypatch):
    """One weight is one value of the activation, dcontext one of its slope, and dchunks the sum over 4,008 contexts."""
    monkeypatch.setattr(native_cpu, "INSTRUCTIONS", name)
    points = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([0.0, -0.0, 1e-6, -1e-6, 100.0, -100.0, 1e4])])
    for scale in (1.0, 1e-3):
        leaves = [
            (scale * points[:, None]).to(dtype),
            torch.zeros(1, 1, 1, dtype=dtype),
            torch.ones(1, 1, 1, dtype=dtype),
        ]
        low = [v.clone().requires_grad_() for v in leaves]
        high = [v.double().requires_grad_() for v in leaves]

        def run(leaves, backend):
            hidden = hk.AdditiveHidden(leaves[0], leaves[1], activation)
            y = hk.hyper_linear(torch.ones_like(leaves[0]), hidden, leaves[2], backend=backend)
            return y, *torch.autograd.grad(y.sum(), leaves[:2])

        exact = run(high, "reference")
        for output, *values in zip(("y", "dcontext", "dchunks"), run(low, "cpu"), run(low, "reference"), exact):
            assert_no_worse_than_eager(output, *values)


LAYOUTS = ("contiguous", "every other", "transposed", "first expanded", "last expanded")


@st.composite
def problems(draw):
    """A problem of any shape, how its factors lie in memory, and the settings that it runs with."""
    size = st.one_of(st.integers(1, 12), st.integers(13, 150))
    rows, cols = draw(size), draw(size)
    grid = Grid(rows * draw(st.integers(1, 5)) - draw(st.integers(0, rows - 1)), draw(size) + cols, rows, cols)
    problem = make_problem(
        draw(st.sampled_from(CONTEXTS)),
        grid,
        draw(st.integers(0, 70)),
        tokens=draw(st.integers(0, 40)),
        per_chunk_heads=draw(st.booleans()),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 9)),
    )
    strided = [draw(st.sampled_from(LAYOUTS)) for _ in problem.tensors]
    order = draw(st.sampled_from([None, *ORDERS]))
    return problem, strided, order, draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 64]))


def laid_out(value: torch.Tensor, how: str) -> torch.Tensor:
    """The same shape with other strides (and, where it is expanded, other values)."""
    value = value.detach()
    if how == "every other":
        return value.repeat_interleave(2, -1)[..., ::2]
    if how == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "first expanded":
        return value[:1].expand_as(value)
    if how == "last expanded":
        return value[..., :1].expand_as(value)
    return value


@settings(max_examples=400, deadline=None, derandomize=True)
@given(problems())
def test_drawn_problems(drawn):
    problem, strided, order, threads, mib = drawn
    tensors = tuple(laid_out(v, how).requires_grad_() for v, how in zip(problem.tensors, strided))
    dy = torch.randn_like(problem.call(*tensors, backend="reference")).double()
    with running_with(threads, mib):
        ours = gradients(problem, tensors, dy, backend="cpu", order=order)
    eager = gradients(problem, tensors, dy, backend="reference")
    exact = gradients(problem, tuple(v.detach().double().requires_grad_() for v in tensors), dy, backend="reference")
    for name, value, theirs, want in zip(("y", *problem.names), ours, eager, exact):
        # One draw of a few numbers may by luck be exact in eager, or nearly cancel: twice the tolerance of many draws.
        got, allowed = error(value, want), error(theirs, want)
        assert got.rms <= 4 * allowed.rms + 8 * FLOOR[value.dtype], (name, got, allowed)


def test_the_sine_of_what_is_not_finite():
    hidden = hk.AdditiveHidden(torch.tensor([[inf], [-inf], [nan]]), torch.zeros(1, 1, 1), "sin")
    assert hk.hyper_linear(torch.ones(3, 1), hidden, torch.ones(1, 1, 1), backend="cpu").isnan().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("chunk", [(8, 8), (64, 1), (128, 2)], ids=str)
def test_gradients_that_share_an_intermediate_over_many_blocks(chunk, tokens, threads):
    problem = make_problem(grid=Grid(1024, 1024, *chunk), width=64, tokens=tokens, dtype=torch.float32)
    dy = torch.randn_like(problem.call(*problem.tensors))
    wanted = gradients(problem, problem.tensors, dy, backend="torch")
    for order in (None, "head_first", "hidden_first"):
        with running_with(threads, 64):
            found = gradients(problem, problem.tensors, dy, backend="cpu", order=order)
        for got, want in zip(found, wanted):
            assert error(got, want.double()).rms < 1e-5


@pytest.mark.parametrize("additive", [False, True], ids=["hidden", "additive"])
@pytest.mark.parametrize("ids", [False, True], ids=["in_turn", "ids"])
@pytest.mark.parametrize(("contexts", "width"), [(0, 2), (3, 0)], ids=["no_contexts", "no_width"])
def test_nothing_to_sum(contexts, width, ids, additive):
    chunks, head = torch.randn(4, 4, width), torch.randn(width, 8, 8)
    parts = [torch.randn(contexts, width), chunks] if additive else [torch.randn(contexts, 4, 4, width)]
    leaves = [v.requires_grad_() for v in (torch.randn(contexts, 5, 32), head, *parts)]
    hidden = hk.AdditiveHidden(*parts, "relu") if additive else parts[0]
    context_ids = torch.arange(contexts) if ids else None
    y = hk.hyper_linear(leaves[0], hidden, head, context_ids=context_ids, backend="cpu")
    assert torch.equal(y, torch.zeros(contexts, 5, 32))
    for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves)):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("rows", [1, 2, 5, 15, 130])
@pytest.mark.parametrize("inputs", [1, 17, 33, 300])
def test_the_dense_baseline_and_instruction_sets_agree(inputs, rows):
    x, weight, y = torch.randn(rows, inputs), torch.randn(530, inputs), torch.full((rows, 530), float("nan"))
    native_cpu._cpu.Dense(weight.data_ptr(), 530, inputs).run(x.data_ptr(), rows, y.data_ptr(), 2)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("contexts", CONTEXTS)
def test_any_number_of_threads_and_the_same_bits_again(contexts, threads):
    # rows enough for threads to take them as they come free
    problem = make_problem(contexts, Grid(60, 90, 8, 16), 8, tokens=300, dtype=torch.float32)
    dy = torch.randn_like(problem.call(*problem.tensors))
    wanted = gradients(problem, problem.tensors, dy, backend="reference")
    with running_with(threads, 64):
        for order in ORDERS:
            first = gradients(problem, problem.tensors, dy, backend="cpu", order=order)
            again = gradients(problem, problem.tensors, dy, backend="cpu", order=order)
            assert all(torch.equal(a, b) for a, b in zip(first, again))
            for got, want in zip(first, wanted):
                found = error(got, want.double())
                assert found.rms < 1e-5
                assert found.max < 1e-4


@pytest.mark.parametrize("grid", [Grid(64, 16, 4, 16), Grid(16, 64, 16, 4)], ids=["one_column", "one_row"])
@pytest.mark.parametrize("order", ORDERS)
def test_contexts_of_a_narrow_intermediate(order, grid):
    """All that is left of the intermediate's depth is a context's rows."""
    problem = make_problem("per_entry", grid, 1, tokens=3, dtype=torch.float32)
    dy = torch.randn_like(problem.call(*problem.tensors))
    wanted = gradients(problem, problem.tensors, dy, backend="reference")
    for got, want in zip(gradients(problem, problem.tensors, dy, backend="cpu", order=order), wanted):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [2, 4])
def test_contexts_are_not_divided_between_threads(threads):
    hidden, head, x = torch.randn(9, 4, 8, 16), torch.randn(16, 16, 16), torch.randn(9, 7, 128)
    leaves = [v.requires_grad_() for v in (x, hidden, head)]
    found, wanted = [], []
    with running_with(threads, 64):
        for backend, results in (("cpu", found), ("torch", wanted)):
            y = hk.hyper_linear(*leaves, backend=backend)
            results += [y, *torch.autograd.grad(y.square().sum(), leaves)]
    for got, want in zip(found, wanted):
        assert error(got, want.double()).rms < 1e-5


def test_many_python_threads_at_once():
    problems = [
        make_problem(contexts, Grid(60, 90, 8, 16), 8, tokens=50, seed=n) for n in range(4) for contexts in CONTEXTS
    ]
    wanted = [problem.call(*problem.tensors, backend="reference") for problem in problems]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda problem: problem.call(*problem.tensors, backend="cpu"), problems))
            for got, want in zip(found, wanted):
                torch.testing.assert_close(got, want)


def python(code: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_a_team_smaller_than_asked_for_gives_the_same_bits():
    code = """
import torch, hyperkernels as hk
torch.manual_seed(0)
torch.set_num_threads(3)
leaves = [torch.randn(*s, requires_grad=True) for s in ((64, 256), (16, 4, 8), (8, 16, 64))]
y = hk.hyper_linear(*leaves, backend="cpu")
print([hash(v.detach().numpy().tobytes()) for v in (y, *torch.autograd.grad(y.square().sum(), leaves))])
"""
    assert python(code, PYTHONHASHSEED="0") == python(code, PYTHONHASHSEED="0", OMP_THREAD_LIMIT="2")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps, which only Linux has")
def test_there_is_one_pool_of_threads():
    code = """
import torch, hyperkernels as hk
hk.hyper_linear(torch.randn(64, 256), torch.randn(16, 4, 8), torch.randn(8, 16, 64), backend="cpu")
torch.randn(500, 500) @ torch.randn(500, 500)
print(*{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]})
"""
    libraries = python(code).split()
    assert len(libraries) == 1, libraries
    assert Path(libraries[0]).name.startswith("libgomp"), libraries


def zeros(*shape: int) -> torch.Tensor:
    """fp32 zeros whose pages take no memory until they are written."""
    count = int(torch.tensor(shape).prod())
    return torch.frombuffer(mmap.mmap(-1, 4 * count), dtype=torch.float32).view(*shape)


@pytest.mark.slow
def test_rows_past_2_to_the_31_elements():
    x = zeros(2**19 + 5, 2**12)
    hidden, head = torch.randn(2, 4, 2), torch.randn(2, 3, 1024)
    x[-3:] = torch.randn(3, 2**12)
    y = hk.hyper_linear(x, hidden, head, backend="cpu")
    torch.testing.assert_close(y[-3:], x[-3:] @ hk.generate_weight(hidden, head, (6, 2**12)).T, rtol=1e-4, atol=1e-3)
    assert not y[:-3].any()


@pytest.mark.slow
def test_contexts_past_2_to_the_31_elements():
    hidden = zeros(2**16 + 1, 2**5, 2**5, 2**5)
    hidden[-1] = torch.randn(2**5, 2**5, 2**5)
    head, x = torch.randn(2**5, 2, 2), torch.randn(3, 64)
    y = hk.hyper_linear(x, hidden, head, context_ids=torch.full((3,), 2**16), backend="cpu")
    torch.testing.assert_close(y, x @ hk.generate_weight(hidden[-1], head, (64, 64)).T, rtol=1e-4, atol=1e-3)


def test_without_a_compiler_the_package_builds_and_says_so(tmp_path):
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "temp"]
    environment = os.environ | {"CXX": "no-such-compiler"}
    subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, check=True)
    ignored = shutil.ignore_patterns("*.so", "cpu_missing.txt", "__pycache__")
    shutil.copytree(ROOT / "hyperkernels", tmp_path / "hyperkernels", ignore=ignored, dirs_exist_ok=True)
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # of this checkout
sys.path.insert(0, {str(tmp_path)!r})
import torch, hyperkernels as hk
arguments = torch.randn(3, 32), torch.randn(4, 4, 2), torch.randn(2, 8, 8)
hk.explain(hk.hyper_linear, *arguments)
try:
    hk.hyper_linear(*arguments, backend="cpu")
except ValueError as error:
    print(error)
"""
    printed = python(code)
    assert "not cpu: it was not built" in printed
    assert "backend torch" in printed
    assert "backend: 'cpu' cannot do this call: it was not built: " in printed
    assert "no-such-compiler" in printed
