"""The operator `hyperkernels::contract`: any partials of the form, planned and run on real tensors.

It is opaque, so that `torch.compile` and `torch.export` see one node with known shapes, and it has no derivative of
its own: `derivatives.py` writes that in terms of the operator again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperkernels.backends import BACKENDS, choose_backend
from hyperkernels.chunking import Grid, ceil_div
from hyperkernels.planner import Call, plan_contraction

library = torch.library.Library("hyperkernels", "DEF")
library.define(
    "contract(str[] wanted, SymInt[] sizes, str activation, str order, str backend, Tensor? context_ids, "
    "Tensor? y, Tensor? hidden, Tensor? chunks, Tensor? head, Tensor? x) -> Tensor[]"
)
contract = torch.ops.hyperkernels.contract.default
FACTORS = ("y", "hidden", "chunks", "head", "x")


def sizes_of(call: Call) -> tuple[int, ...]:
    """The integers of a call, as the operator takes them."""
    return (*call.grid, call.width, call.contexts, call.entries, call.tokens, int(call.per_chunk_heads))


def call_of(sizes: Sequence[int], activation: str, mapped: bool, like: Tensor) -> Call:
    N, K, rows, cols, width, contexts, entries, tokens, per_chunk_heads = sizes
    grid = Grid(N, K, rows, cols)
    return Call(
        grid, width, contexts, entries, tokens, bool(per_chunk_heads), mapped, activation, like.dtype, like.device.type
    )


def result_names(wanted: Sequence[str], activation: str) -> list[str]:
    """The factors that the operator returns the partials of, in its order."""
    names = []
    for slot in wanted:
        names += [slot, "chunks"] if slot == "hidden" and activation else [slot]
    return names


def result_shapes(wanted: Sequence[str], sizes: Sequence[int], activation: str) -> list[tuple[int, ...]]:
    N, K, rows, cols, m, contexts, entries, tokens, per_chunk_heads = sizes
    I, J = ceil_div(N, rows), ceil_div(K, cols)
    shapes = {
        "y": (entries, tokens, N),
        "x": (entries, tokens, K),
        "hidden": (contexts, m) if activation else (contexts, I, J, m),
        "chunks": (I, J, m),
        "head": (I * J, m, rows, cols) if per_chunk_heads else (m, rows, cols),
    }
    return [shapes[name] for name in result_names(wanted, activation)]


def check_context_ids(context_ids: Tensor, contexts: int) -> None:
    if context_ids.numel():
        low, high = int(context_ids.min()), int(context_ids.max())
        if low < 0 or high >= contexts:
            raise ValueError(f"context_ids: got values from {low} to {high}, wanted 0 to {contexts - 1}")


def _contract(wanted, sizes, activation, order, backend, context_ids, *factors) -> list[Tensor]:
    like = next(factor for factor in factors if factor is not None)
    if context_ids is not None:
        check_context_ids(context_ids, sizes[5])
    call = call_of(sizes, activation, context_ids is not None, like)
    plan = plan_contraction(call, tuple(wanted), order or None)
    run = BACKENDS[choose_backend(call, order or None, backend or None)[0]].contract
    assert run is not None
    given = {name: factor for name, factor in zip(FACTORS, factors) if factor is not None}
    chunks = given.pop("chunks", None)
    return list(run(call, plan, given, chunks, context_ids))


def _contract_fake(wanted, sizes, activation, order, backend, context_ids, *factors) -> list[Tensor]:
    like = next(factor for factor in factors if factor is not None)
    return [like.new_empty(shape) for shape in result_shapes(wanted, sizes, activation)]


def _contract_vmap(info, in_dims, wanted, sizes, activation, order, backend, context_ids, *factors):
    """Fold the mapped dimension into entries and contexts where head and chunks are the same for all; else loop."""
    size = info.batch_size
    dims = dict(zip(("ids", *FACTORS), in_dims[5:]))
    given = dict(zip(("ids", *FACTORS), (context_ids, *factors)))
    mapped = {name: v.movedim(dims[name], 0) for name, v in given.items() if v is not None and dims[name] is not None}
    if not {"head", "chunks"} & (mapped.keys() | set(result_names(wanted, activation))):
        return _contract_folded(size, given, mapped, wanted, sizes, activation, order, backend)
    runs = []
    for n in range(size):
        one = {name: mapped[name][n] if name in mapped else v for name, v in given.items()}
        runs.append(contract(wanted, sizes, activation, order, backend, *one.values()))
    return [torch.stack(parts) for parts in zip(*runs)], [0] * len(runs[0])


def _contract_folded(size, given, mapped, wanted, sizes, activation, order, backend):
    contexts, entries = sizes[5:7]
    per_map = "hidden" in mapped or "hidden" in wanted
    ids = mapped.get("ids", given["ids"])
    if ids is None and not per_map:
        ids = torch.arange(contexts, device=next(iter(mapped.values())).device)
    if ids is not None:
        ids = ids.expand(size, entries)
        if per_map:
            ids = ids + contexts * torch.arange(size, device=ids.device)[:, None]
        ids = ids.flatten()
    folded = {"ids": ids}
    for name in FACTORS:
        value = mapped.get(name, given[name])
        if value is not None and (name in "xy" or (name == "hidden" and per_map)):
            if name not in mapped:
                value = value.expand(size, *value.shape)
            value = value.flatten(0, 1)
        folded[name] = value
    sizes = [*sizes[:5], contexts * size if per_map else contexts, entries * size, *sizes[7:]]
    results = contract(wanted, sizes, activation, order, backend, *folded.values())
    return [result.unflatten(0, (size, -1)) for result in results], [0] * len(results)


library.impl("contract", _contract, "CompositeExplicitAutograd")
torch.library.register_fake("hyperkernels::contract", _contract_fake, lib=library)
torch.library.register_vmap("hyperkernels::contract", _contract_vmap, lib=library)
