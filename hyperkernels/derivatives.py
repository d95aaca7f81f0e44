"""The engine's one operation, closed under differentiation.

`phi = sum y[g,t,i,r] hidden[g,i,j,k] head[k,r,q] x[g,t,j,q]` is linear in each of its four slots, so the partial of
phi by a slot is a multilinear function of the other three, and its own derivative is made of such partials again:
`Partials` is the only autograd Function, and backward of any order comes back to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyperkernels.hidden import ACTIVATIONS, additive_pre
from hyperkernels.operators import FACTORS, contract, result_names, result_shapes
from hyperkernels.planner import SLOTS


@dataclass(frozen=True)
class Settings:
    """What a call is, beside its tensors; one leaf to `torch.func`, which a tuple would not be."""

    sizes: tuple[int, ...]
    activation: str
    order: str
    backend: str


def partials(
    wanted: tuple[str, ...], settings: Settings, context_ids: Tensor | None, *factors: Tensor | None
) -> tuple[Tensor, ...]:
    """The partials of phi by the slots in `wanted`, differentiable in every factor, to any order.

    `factors` follow `FACTORS`, and one that no wanted partial is a function of may be None. With an activation,
    the hidden partial is two results, dcontext and dchunks.
    """
    function = Partials if torch.compiler.is_compiling() else PartialsForwardMode
    return function.apply(",".join(wanted), settings, context_ids, *factors)


class Partials(torch.autograd.Function):
    """`partials`, as Dynamo can trace it (it refuses a Function that has a `jvp`)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(wanted, settings, context_ids, y, hidden, chunks, head, x):  # by name: Dynamo counts them
        s, factors = settings, (y, hidden, chunks, head, x)
        return tuple(
            contract(wanted.split(","), list(s.sizes), s.activation, s.order, s.backend, context_ids, *factors)
        )

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        wanted, ctx.settings, context_ids, *factors = inputs
        ctx.wanted = tuple(wanted.split(","))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(context_ids, *_read_in_backward(ctx.wanted, ctx.needs_input_grad[3:], factors))
        ctx.save_for_forward(context_ids, *factors)

    @staticmethod
    def backward(ctx, *cotangents):
        context_ids, *factors = ctx.saved_tensors
        settings = ctx.settings
        needs = dict(zip(FACTORS, ctx.needs_input_grad[3:]))
        names = result_names(ctx.wanted, settings.activation)
        given = {name: v for name, v in zip(names, cotangents) if v is not None}
        if settings.activation and given.keys() & {"hidden", "chunks"}:
            grads = _additive_second_order(ctx.wanted, settings, context_ids, factors, needs, given)
        else:
            grads = {}
            for slot, cotangent in given.items():
                targets = tuple(s for s in SLOTS if s != slot and (needs[s] or (s == "hidden" and needs["chunks"])))
                if targets:
                    values = dict(zip(FACTORS, factors)) | {slot: cotangent}
                    found = partials(targets, settings, context_ids, *values.values())
                    _accumulate(grads, result_names(targets, settings.activation), found)
        return None, None, None, *(grads.get(name) if needs[name] else None for name in FACTORS)


def _accumulate(totals: dict[str, Tensor], names: Sequence[str], parts: Sequence[Tensor]) -> None:
    for name, part in zip(names, parts):
        totals[name] = totals[name] + part if name in totals else part


class PartialsForwardMode(Partials):
    """`Partials` with forward-mode derivatives."""

    @staticmethod
    def jvp(ctx, _wanted, _settings, _ids, *tangents):
        context_ids, *factors = ctx.saved_tensors
        settings, wanted = ctx.settings, ctx.wanted
        values = dict(zip(FACTORS, factors))
        moved = {name: v for name, v in zip(FACTORS, tangents) if v is not None}
        results: dict[str, Tensor] = {}
        if settings.activation and moved.keys() & {"hidden", "chunks"}:
            if "hidden" in wanted:
                raise NotImplementedError(
                    "forward-mode derivatives of the gradients of AdditiveHidden: pass hidden.materialize() instead"
                )
            pre = additive_pre(values["hidden"], values["chunks"])
            tangent = torch.zeros_like(pre)
            if "hidden" in moved:
                tangent = tangent + moved.pop("hidden")[:, None, None]
            if "chunks" in moved:
                tangent = tangent + moved.pop("chunks")
            dense = values | {"hidden": ACTIVATIONS[settings.activation].grad(tangent, pre), "chunks": None}
            found = partials(wanted, replace(settings, activation=""), context_ids, *dense.values())
            _accumulate(results, wanted, found)
        for slot, tangent in moved.items():
            targets = tuple(s for s in wanted if s != slot)
            if targets:
                found = partials(targets, settings, context_ids, *(values | {slot: tangent}).values())
                _accumulate(results, result_names(targets, settings.activation), found)
        names = result_names(wanted, settings.activation)
        shapes = result_shapes(wanted, settings.sizes, settings.activation)
        like = next(v for v in tangents if v is not None)
        return tuple(results[name] if name in results else like.new_zeros(shape) for name, shape in zip(names, shapes))


def _read_in_backward(wanted, needs_grad, factors) -> tuple[Tensor | None, ...]:
    """Each factor that some derivative of some wanted partial is a function of; None for the others."""
    needs = {name for name, needed in zip(FACTORS, needs_grad) if needed}
    slots = {"hidden" if name == "chunks" else name for name in needs}
    additive = factors[FACTORS.index("chunks")] is not None
    if additive and "hidden" in wanted:
        return tuple(factors)

    def read(name: str) -> bool:
        if name in ("hidden", "chunks") and additive and "hidden" in slots:
            return True  # the activation's derivative is taken at them
        slot = "hidden" if name == "chunks" else name
        return any(slot not in (s, by) for s in wanted for by in slots if s != by)

    return tuple(factor if read(name) else None for name, factor in zip(FACTORS, factors))


def _additive_second_order(wanted, settings, context_ids, factors, needs, cotangents) -> dict[str, Tensor]:
    """The pullback of dcontext and dchunks: phi is not linear in those, so hidden is formed and torch's own
    derivatives of the activation are used."""
    activation = ACTIVATIONS[settings.activation]
    active: list[str] = [name for name in FACTORS if needs[name]]

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        full: dict[str, Any] = dict(zip(FACTORS, factors)) | dict(zip(active, values))
        pre = additive_pre(full["hidden"], full["chunks"])
        full |= {"hidden": activation.apply_(pre.clone()), "chunks": None}
        dense = replace(settings, activation="")
        found = dict(zip(wanted, partials(wanted, dense, context_ids, *full.values())))
        if "hidden" in found:
            dpre = activation.grad(found["hidden"], pre)
            found |= {"hidden": dpre.sum((1, 2)), "chunks": dpre.sum(0)}
        return tuple(found[name] for name in cotangents)

    values: dict[str, Any] = dict(zip(FACTORS, factors))
    pullback = torch.func.vjp(gradients, *(values[name] for name in active))[1]
    return dict(zip(active, pullback(tuple(cotangents.values()))))
