"""The native CPU engine (`csrc/cpu`): a step's intermediate is formed and consumed block by block, in cache.

How a step is cut is decided in `native_cut`; the engine packs, multiplies and stores. Threads are OpenMP's, of the
library that torch has loaded, as many as `torch.get_num_threads()`; sums that threads hold apart are added in the
threads' order, so the same bits come back.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from math import prod
from pathlib import Path
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperkernels.backends.mapped import Mapped
from hyperkernels.backends.native_cut import LABELS, Split, blocks_of, split_of
from hyperkernels.call import SLOTS, Call, result_names
from hyperkernels.chunking import ceil_div
from hyperkernels.hidden import ACTIVATIONS
from hyperkernels.planner import Cost, Plan, Step, workspace_bytes

try:
    _cpu: Any = import_module("hyperkernels._cpu")
except ImportError as error:  # built without a compiler, or for another Python
    _note = Path(__file__).parents[1] / "cpu_missing.txt"
    MISSING = _note.read_text().strip() if _note.exists() else f"it is not there: {error}"
    INSTRUCTIONS = ""
    _cpu, FewRows = None, ()
else:
    MISSING = ""
    FewRows: Any = _cpu.FewRows
    INSTRUCTIONS = _cpu.instruction_sets()[0]

View = tuple[int, tuple[int, ...]]  # where a tensor lies, and its strides
ABSENT: View = (0, ())
STORAGE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
VECTORS_PER_US = 3500  # multiplications of a vector by one thread
CALL_US, FEW_CALL_US = 15, 2  # of a step, and of FewRows
KEPT_BYTES = 1 << 20  # for each thread: memory that a small call touches anew costs it as much as the rest


def supports(call: Call, order: str | None) -> tuple[bool, str]:
    if MISSING:
        return False, MISSING
    if call.device != "cpu":
        return False, f"it runs on the CPU, and the tensors are on {call.device}"
    if call.dtype not in STORAGE:
        return False, f"it has no {call.dtype}"
    if call.window:
        return False, "it has no convolutions"
    return True, f"fused native loops, {INSTRUCTIONS}"


class Run(NamedTuple):
    """One run of the engine, but for the tensors: which results it fills, and what workspace it needs."""

    native: Any
    fills: tuple[int, ...]
    workspace_bytes: int


class _Kept(local):
    workspace = torch.empty(0, dtype=torch.uint8)


_kept = _Kept()


def contract(call: Call, plan: Plan, factors: dict[str, Tensor], context_ids: Tensor | None) -> list[Tensor]:
    """The partials of phi by `plan.wanted`, in that order; with an activation the hidden one is (dcontext, dchunks)."""
    entries = starts = None
    balanced = True
    if context_ids is not None:
        counts, starts, entries = Mapped.of(context_ids, call.contexts)
        starts = starts * call.tokens
        balanced = bool(counts.max() * 2 * torch.get_num_threads() <= counts.sum())
    if call.activation:
        factors = {n: v.contiguous() if n in ("hidden", "chunks") else v for n, v in factors.items()}
    contiguous = all(value.is_contiguous() for value in factors.values())
    key = (balanced, contiguous, *_settings())
    found = plan.prepared.get(key)
    if found is None:
        found = plan.prepared[key] = runs(call, plan.wanted, plan.steps, *key)
    shapes, todo = found
    like = next(iter(factors.values()))
    results = [like.new_empty(shape) for shape in shapes]
    views: dict[str, View] = {}
    for native, fills, needed in todo:
        memory = workspace(needed)
        if isinstance(native, FewRows):
            read = [factors[name].data_ptr() for name in ("x", "hidden", "head")]
            native.run(*read, 0, results[fills[0]].data_ptr(), call.entries * call.tokens, memory.data_ptr())
            continue
        views = views or {name: (value.data_ptr(), value.stride()) for name, value in factors.items()}
        _fused(native, views, [results[n] for n in fills], _rows(call), memory, entries=entries, starts=starts)
    return results


def _fused(
    native: Any,
    views: dict[str, View],
    results: list[Tensor],
    rows: tuple[int, int, int],
    memory: Tensor,
    *,
    entries: Tensor | None = None,
    starts: Tensor | None = None,
    head_bias: Tensor | None = None,
) -> None:
    native.run(
        [views.get(slot, ABSENT) for slot in SLOTS],
        views.get("chunks", ABSENT),
        [result.data_ptr() for result in results],
        *rows,
        0 if entries is None else entries.data_ptr(),
        0 if starts is None else starts.data_ptr(),
        memory.data_ptr(),
        0 if head_bias is None else head_bias.data_ptr(),
    )


class Again:
    """y of contiguous tensors, in one run; sums begin at what the head's bias makes of a row."""

    def __init__(self, run: Run, call: Call) -> None:
        self.native, self.workspace_bytes = run.native, run.workspace_bytes
        self.few, self.rows, self.features = isinstance(run.native, FewRows), _rows(call), call.grid.out_features
        self.strides = {name: _contiguous(call.shape(name)) for name in ("x", "hidden", "chunks", "head")}

    @classmethod
    def of(cls, call: Call, plan: Plan, head_bias: bool) -> Again | None:
        """None where the head has a bias that the engine does not add: in bf16, of few rows, without room for it."""
        run = runs(call, plan.wanted, plan.steps, True, True, *_settings())[1][0]
        if head_bias:
            if call.dtype == torch.bfloat16 or isinstance(run.native, FewRows):
                return None
            (step,) = plan.steps
            native = _native(call, step.order, step.forms, step.outputs, True, *_settings(), head_bias=True)
            run = Run(native, (), native.workspace_bytes(*_rows(call)))
            if run.workspace_bytes > workspace_bytes():
                return None
        return cls(run, call)

    def __call__(self, factors: dict[str, Tensor], bias: Tensor | None, head_bias: Tensor | None) -> Tensor | None:
        for value in (*factors.values(), bias, head_bias):
            if value is not None and not value.is_contiguous():
                return None
        x = factors["x"]
        y = x.new_empty(*x.shape[:-1], self.features)
        memory = workspace(self.workspace_bytes)
        if self.few:
            read = [factors[name].data_ptr() for name in ("x", "hidden", "head")]
            added = 0 if bias is None else bias.data_ptr()
            self.native.run(*read, added, y.data_ptr(), self.rows[0], memory.data_ptr())
            return y
        views = {name: (value.data_ptr(), self.strides[name]) for name, value in factors.items()}
        _fused(self.native, views, [y], self.rows, memory, head_bias=head_bias)
        if bias is None:
            return y
        y.view(self.rows[1], -1, self.features).add_(bias if bias.dim() == 1 else bias[:, None])
        return y


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[n + 1 :]) for n in range(len(shape)))


def in_large_pages(fresh: Tensor) -> Tensor:
    """The same tensor, whose memory is yet to be written: by large pages, where the system has them for who asks."""
    if fresh.device.type == "cpu" and not MISSING:
        _cpu.ask_for_large_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def workspace(needed: int) -> Tensor:
    """Memory of `needed` bytes or more, this thread's."""
    memory = _kept.workspace
    if needed > memory.nbytes:
        memory = torch.empty(needed, dtype=torch.uint8)
        if needed <= KEPT_BYTES * torch.get_num_threads():
            _kept.workspace = memory
    return memory


def estimate(call: Call, step: Step) -> Cost:
    _, found = runs(call, step.outputs, (step._replace(cost=Cost(0.0, 0)),), True, True, *_settings())
    rows = call.entries * call.tokens
    time_us = sum(_time_us(run.native, rows) for run in found)
    return Cost(time_us, max(run.workspace_bytes for run in found))


def _time_us(native: Any, rows: int) -> float:
    call_us = FEW_CALL_US if isinstance(native, FewRows) else CALL_US
    return call_us + native.work(rows) / native.threads / VECTORS_PER_US


def _rows(call: Call) -> tuple[int, int, int]:
    return call.entries * call.tokens, call.contexts, max(call.tokens, 1)


def _settings() -> tuple[int, int, str]:
    return torch.get_num_threads(), workspace_bytes(), INSTRUCTIONS


@lru_cache(maxsize=4096)
def runs(
    call: Call,
    wanted: tuple[str, ...],
    steps: tuple[Step, ...],
    balanced: bool,
    contiguous: bool,
    threads: int,
    limit: int,
    isa: str,
) -> tuple[list[tuple[int, ...]], list[Run]]:
    """The shapes of the results, and the runs that fill them. A run sums the rows of one output."""
    names = result_names(wanted, call.activation)
    found = []
    for step in steps:
        apart = {"x", "y"} <= set(step.outputs)
        for outputs in [(slot,) for slot in step.outputs] if apart else [step.outputs]:
            native = _native(call, step.order, step.forms, outputs, balanced, threads, limit, isa)
            fills = tuple(names.index(name) for name in result_names(outputs, call.activation))
            found.append(Run(native, fills, native.workspace_bytes(*_rows(call))))
            if contiguous and (few := _few_rows(call, step, outputs, native, limit, isa)):
                found[-1] = few._replace(fills=fills)
    return [call.shape(name) for name in names], found


def _few_rows(call: Call, step: Step, outputs: tuple[str, ...], native: Any, limit: int, isa: str) -> Run | None:
    """The run that reads head and hidden where they lie, where there is one and it is quicker than `native`."""
    rows = call.entries * call.tokens
    plain = call.contexts == 1 and not (call.activation or call.per_chunk_heads or call.mapped) and rows and call.width
    if not plain or (step.order, outputs) != ("head_first", ("y",)) or call.dtype == torch.bfloat16:
        return None
    few = FewRows(
        extent=[rows, *(call.sizes[label] for label in LABELS[1:])],
        out_features=call.grid.out_features,
        in_features=call.grid.in_features,
        storage=STORAGE[call.dtype],
        threads=native.threads,
        isa=isa,
    )
    needed = few.workspace_bytes(rows)
    return Run(few, (), needed) if needed <= limit and _time_us(few, rows) < _time_us(native, rows) else None


@lru_cache(maxsize=4096)
def _native(
    call: Call,
    order: str,
    forms: tuple[str, str],
    outputs: tuple[str, ...],
    balanced: bool,
    threads: int,
    limit: int,
    isa: str,
    head_bias: bool = False,
) -> Any:
    """The engine's step, cut."""
    rows = call.entries * call.tokens
    sizes = {label: max(size, 1) for label, size in call.sizes.items()} | {"t": max(rows, 1)}
    formed = set(call.intermediate(order)) - {"g"}
    work = rows * prod(sizes[label] for label in formed - {"t"})
    read = prod(sizes[n] for n in "ijk") + prod(sizes[n] for n in "krq")  # of few rows, what takes the time
    threads = min(threads, max(1, (4 * work + read) >> 14))
    split = split_of(call, forms, outputs, sizes, formed, balanced, threads, limit)
    if split is None:
        threads, split = 1, Split("t", False)
    block = blocks_of(call, sizes, formed)
    block[split.label] = min(block[split.label], ceil_div(sizes[split.label], threads))
    again = ceil_div(rows, block["t"] * (threads if split.label == "t" else 1))  # times that a thread reads them
    while True:
        native = _cpu.Step(
            extent=[sizes[label] for label in LABELS],
            block=[block[label] for label in LABELS],
            out_features=call.grid.out_features,
            in_features=call.grid.in_features,
            contexts=max(call.contexts, 1),
            rows_per_context=ceil_div(max(rows, 1), max(call.contexts, 1)),
            per_chunk_heads=call.per_chunk_heads,
            head_bias=head_bias,
            activation=list(ACTIVATIONS).index(call.activation) if call.activation else -1,
            storage=STORAGE[call.dtype],
            forms=[SLOTS.index(slot) for slot in forms],
            outputs=[SLOTS.index(slot) for slot in outputs],
            split=LABELS.index(split.label),
            aligned=split.aligned,
            threads=threads,
            prepare_bytes=limit // 4 if again > 2 else 0,  # else what another core packed comes later than one's own
            isa=isa,
        )
        longest = max((n for n in LABELS if n == "t" or n in formed), key=lambda label: block[label])
        if native.block_bytes() <= limit or block[longest] == 1:
            return native
        block[longest] = ceil_div(block[longest], 2)
