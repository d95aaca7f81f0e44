"""The operator `hyperkernels::contract`: any partials of the form, planned and run on real tensors.

It is opaque, so that `torch.compile` and `torch.export` see one node with known shapes, and it has no derivative of
its own: `derivatives.py` writes that in terms of the operator again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hyperkernels.backends import BACKENDS, plan_call
from hyperkernels.call import Call, Window, result_names
from hyperkernels.chunking import Grid
from hyperkernels.watched import watched

library = torch.library.Library("hyperkernels", "DEF")
library.define(
    "contract(str[] wanted, SymInt[] sizes, str activation, str order, str backend, Tensor? context_ids, "
    "Tensor? y, Tensor? hidden, Tensor? chunks, Tensor? head, Tensor? x) -> Tensor[]"
)
dispatch = torch.ops.hyperkernels.contract.default
FACTORS = ("y", "hidden", "chunks", "head", "x")


def sizes_of(call: Call) -> tuple[int, ...]:
    """The integers of a call, as the operator takes them; a window's last, kind by kind."""
    window = [n for numbers in call.window or () for n in numbers]
    return (*call.grid, call.width, call.contexts, call.entries, call.tokens, int(call.per_chunk_heads), *window)


def call_of(
    sizes: Sequence[int], activation: str, context_ids: Tensor | None, factors: Sequence[Tensor | None]
) -> Call:
    N, K, rows, cols, width, contexts, entries, tokens, per_chunk_heads, *rest = sizes
    n = len(rest) // len(Window._fields)
    window = Window(*(tuple(rest[n * kind : n * (kind + 1)]) for kind in range(len(Window._fields)))) if n else None
    like = next(factor for factor in factors if factor is not None)
    mapped = context_ids is not None
    numbers = (width, contexts, entries, tokens, bool(per_chunk_heads), mapped)
    return Call(Grid(N, K, rows, cols), *numbers, activation, like.dtype, like.device.type, window)


def check_context_ids(context_ids: Tensor, contexts: int) -> None:
    if context_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # to read them would end the capture
    if context_ids.numel() and not context_ids.is_meta:
        low, high = torch.stack(context_ids.aminmax()).tolist()  # a device is waited for once
        if low < 0 or high >= contexts:
            raise ValueError(f"context_ids: got values from {low} to {high}, wanted 0 to {contexts - 1}")


def contract(
    call: Call,
    wanted: tuple[str, ...],
    order: str | None,
    backend: str | None,
    context_ids: Tensor | None,
    *factors: Tensor | None,
) -> list[Tensor]:
    """The partials of phi by the slots in `wanted`: the operator, or at once what it would come to where nobody sees
    the difference, since to call it costs as much as the rest of a small call does on a CPU."""
    if torch.compiler.is_compiling() or watched(context_ids, *factors):
        settings = list(wanted), list(sizes_of(call)), call.activation, order or "", backend or ""
        return dispatch(*settings, context_ids, *factors)
    return _run(call, wanted, order, backend, context_ids, factors)


def _run(
    call: Call,
    wanted: tuple[str, ...],
    order: str | None,
    backend: str | None,
    context_ids: Tensor | None,
    factors: Sequence[Tensor | None],
) -> list[Tensor]:
    if context_ids is not None:
        check_context_ids(context_ids, call.contexts)
    name, plan = plan_call(call, wanted, order, backend)
    run = BACKENDS[name].contract
    assert run is not None
    given = {name: factor for name, factor in zip(FACTORS, factors) if factor is not None}
    if not (call.width and call.contexts and call.entries and call.tokens):  # nothing to sum
        like = next(iter(given.values()))
        return [like.new_zeros(call.shape(name)) for name in result_names(wanted, call.activation)]
    return list(run(call, plan, given, context_ids))


def _contract(wanted, sizes, activation, order, backend, context_ids, *factors) -> list[Tensor]:
    call = call_of(sizes, activation, context_ids, factors)
    return _run(call, tuple(wanted), order or None, backend or None, context_ids, factors)


def _contract_fake(wanted, sizes, activation, order, backend, context_ids, *factors) -> list[Tensor]:
    call = call_of(sizes, activation, context_ids, factors)
    like = next(factor for factor in factors if factor is not None)
    return [like.new_empty(call.shape(name)) for name in result_names(wanted, activation)]


def _contract_autograd(*arguments):
    """Autograd is `derivatives.py`'s; a tangent that comes here by another way (a compiled or exported graph under
    forward mode) would be lost without a word."""
    for value in arguments:
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and forward_ad.unpack_dual(value).tangent is not None
        ):
            raise NotImplementedError(
                "forward-mode derivatives of a compiled or exported graph: take them outside torch.compile"
            )
    with torch._C._AutoDispatchBelowAutograd():
        return dispatch(*arguments)


def _contract_vmap(info, in_dims, wanted, sizes, activation, order, backend, context_ids, *factors):
    """Fold the mapped dimension into entries and contexts where head and chunks are the same for all; else loop."""
    names = ("ids", *FACTORS)
    dims, given = dict(zip(names, in_dims[5:])), dict(zip(names, (context_ids, *factors)))
    mapped = {name: v.movedim(dims[name], 0) for name, v in given.items() if v is not None and dims[name] is not None}
    call = call_of(sizes, activation, context_ids, factors)
    if not {"head", "chunks"} & (mapped.keys() | set(result_names(wanted, activation))):
        call, folded = _fold(call, info.batch_size, given, mapped, wanted)
        results = dispatch(wanted, sizes_of(call), activation, order, backend, *folded.values())
        return [result.unflatten(0, (info.batch_size, -1)) for result in results], [0] * len(results)
    runs = []
    for n in range(info.batch_size):
        one = {name: mapped[name][n] if name in mapped else v for name, v in given.items()}
        runs.append(dispatch(wanted, sizes, activation, order, backend, *one.values()))
    return [torch.stack(parts) for parts in zip(*runs)], [0] * len(runs[0])


def _fold(call: Call, size: int, given: dict, mapped: dict, wanted: Sequence[str]) -> tuple[Call, dict]:
    """`size` times the entries, and `size` times the contexts where each has a hidden (or wants dhidden) of its own."""
    own_contexts = "hidden" in mapped or "hidden" in wanted
    ids = mapped.get("ids", given["ids"])
    if ids is None and not own_contexts:
        ids = torch.arange(call.contexts, device=next(iter(mapped.values())).device)
    if ids is not None:
        ids = ids.expand(size, call.entries)
        if own_contexts:
            ids = ids + call.contexts * torch.arange(size, device=ids.device)[:, None]
        ids = ids.flatten()
    folded = {"ids": ids}
    for name in FACTORS:
        value = mapped.get(name, given[name])
        if value is not None and (name in ("x", "y") or (name == "hidden" and own_contexts)):
            if name not in mapped:
                value = value.expand(size, *value.shape)
            value = value.flatten(0, 1)
        folded[name] = value
    contexts = call.contexts * size if own_contexts else call.contexts
    return call._replace(contexts=contexts, entries=call.entries * size, mapped=ids is not None), folded


library.impl("contract", _contract, "CompositeExplicitAutograd")
library.impl("contract", _contract_autograd, "Autograd")
torch.library.register_fake("hyperkernels::contract", _contract_fake, lib=library)
torch.library.register_vmap("hyperkernels::contract", _contract_vmap, lib=library)
