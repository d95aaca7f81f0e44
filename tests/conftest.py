"""Problems for the tests: every context form, grid and head, with inputs that need gradients."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import inf
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import hyperkernels as hk
from hyperkernels.backends import triton_fused
from hyperkernels.bench.measure import ceilings, machine
from hyperkernels.chunking import Grid
from hyperkernels.planner import Cost

os.environ["HYPERKERNELS_CALIBRATION"] = "off"  # for the processes that tests start: plans are the shipped model's
CUDA = torch.cuda.is_available()
with patch.dict(os.environ, {} if CUDA else {"TRITON_INTERPRET": "1"}):  # it is read when kernels are defined
    import_module("hyperkernels.kernels.launch")

CEILINGS = {"gflop_per_s": 100.0, "gb_per_s": 20.0}
TINY = ("--quick", "--shape", "64x64", "--rounds", "2")
DEVICES = ["cpu", "cuda"] if CUDA else ["cpu"]
ENGINES = [("cpu", "cpu"), *(("torch", device) for device in DEVICES), *([("triton", "cuda")] if CUDA else [])]
SMALL = Grid(10, 7, 4, 3)
CONTEXTS = ("shared", "per_entry", "ids", "additive", "additive_per_entry", "additive_ids")


@dataclass
class Problem:
    """Arguments of `hyper_linear`: `tensors` are those it is differentiable in, in the order `call` takes them."""

    tensors: tuple[Tensor, ...]
    call: Callable[..., Tensor]
    grid: Grid

    @property
    def names(self) -> tuple[str, ...]:
        hidden = ("hidden",) if len(self.tensors) == 3 else ("context", "chunks")
        return tuple(f"d{name}" for name in ("x", *hidden, "head"))

    def to(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(v.detach().to(dtype).requires_grad_() for v in self.tensors)


def make_problem(
    contexts: str = "shared",
    grid: Grid = SMALL,
    width: int = 2,
    *,
    tokens: int = 3,
    per_chunk_heads: bool = False,
    head_bias: bool = False,
    activation: str = "tanh",
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    integers: bool = False,
    seed: int = 0,
) -> Problem:
    """A random call. Inputs depend on the seed alone, not on dtype or device."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if integers:
            values = torch.randint(-2, 3, shape, generator=generator)
        else:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    G = 1 if contexts in ("shared", "additive") else 3
    ids = torch.tensor([2, 0, 2, 2, 0], device=device) if contexts.endswith("ids") else None
    lead = (tokens,) if G == 1 else ((5 if ids is not None else G), tokens)
    x = draw(*lead, grid.in_features)
    heads = (grid.I * grid.J,) if per_chunk_heads else ()
    head = draw(*heads, width, grid.rows, grid.cols)
    extra = (draw(*heads, grid.rows, grid.cols),) if head_bias else ()
    chunks = draw(grid.I, grid.J, width)
    common: dict[str, Any] = {"out_features": grid.out_features, "context_ids": ids}

    if contexts.startswith("additive"):
        context = draw(G, width)

        def call(x, context, chunks, head, head_bias=None, **keywords):
            hidden = hk.AdditiveHidden(context, chunks, activation)
            return hk.hyper_linear(x, hidden, head, head_bias=head_bias, **common, **keywords)

        return Problem((x, context, chunks, head, *extra), call, grid)

    hidden = chunks if G == 1 else draw(G, grid.I, grid.J, width)

    def call(x, hidden, head, head_bias=None, **keywords):
        return hk.hyper_linear(x, hidden, head, head_bias=head_bias, **common, **keywords)

    return Problem((x, hidden, head, *extra), call, grid)


def gradients(problem: Problem, tensors: tuple[Tensor, ...], dy: Tensor, **keywords: Any) -> tuple[Tensor, ...]:
    """y, and its pullback of `dy` to each tensor."""
    y = problem.call(*tensors, **keywords)
    return (y, *torch.autograd.grad(y, tensors, dy.to(y.dtype)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ENGINES, ids="_on_".join)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A backend and a device that it runs on; none is skipped. Of triton the kernels, never the products."""
    if request.param[0] == "triton":
        monkeypatch.setattr(triton_fused, "products", lambda call, step: Cost(inf, 0))
    return request.param


def can(backend: str, dtype: torch.dtype, per_chunk_heads: bool = False) -> bool:
    """Whether the backend has what a test is about; what it does not have it must refuse."""
    if backend == "cpu":
        return dtype != torch.float16
    return backend != "triton" or not (dtype == torch.float64 or per_chunk_heads)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.again = self.body
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids):
        return self.out(self.again(self.body(self.embedding(ids)).relu()))


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 32, bias=False)), nn.Linear(32, 4))


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """Results of a few tiny suites of `hyperkernels bench`, as it saves them; the ceilings are no machine's."""
    from hyperkernels import cli
    from hyperkernels.bench import command

    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    chosen = ("linear", "contexts", "conv", "train-step", "decode", "memory")
    given = ["bench", *chosen, *TINY, "--json", str(path), "--csv", str(path.with_suffix(".csv"))]
    # torch.compile takes longer than all of them
    with patch.object(torch, "compile", lambda f, **_: f), patch.object(command, "ceilings", lambda *_: CEILINGS):
        assert cli.main(given) == 0
    return path


@contextmanager
def running_with(threads: int, mib: int):
    """With other settings of how work is divided than the machine's and the package's."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    hk.set_workspace_mib(mib)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        hk.set_workspace_mib(64)


@pytest.fixture(scope="module")
def known_ceilings():
    """Measured for real in one test alone: it takes seconds."""
    with patch.object(import_module("hyperkernels.bench.command"), "ceilings", lambda *_: CEILINGS):
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """What is saved about the machine beside the figures, and nothing that names it."""
    torch.set_num_threads(2)
    machine_info.clear()
    machine_info.update(machine() | {"ceilings": ceilings()})


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config, commit_info) -> None:
    for key in ("project", "branch", "author_time"):
        commit_info.pop(key, None)
