"""The engine's one operation, closed under differentiation.

`phi = sum y[g,t,i,r] hidden[g,i,j,k] head[k,r,q] x[g,t,j,q]` is linear in each of its four slots, so the partial of
phi by a slot is a multilinear function of the other three, and its own derivative is made of such partials again:
`Partials` is the only autograd Function, and backward of any order comes back to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyperkernels.call import SLOTS, Call, result_names, slot_of
from hyperkernels.hidden import ACTIVATIONS, additive_pre
from hyperkernels.operators import FACTORS, contract
from hyperkernels.watched import unrecorded


@dataclass(frozen=True)
class Settings:
    """What a call is, beside its tensors: the slots whose partials are wanted, a forced order and backend (or None).

    To `torch.func` one leaf, which a tuple would not be.
    """

    wanted: tuple[str, ...]
    call: Call
    order: str | None
    backend: str | None

    @property
    def results(self) -> list[str]:
        return result_names(self.wanted, self.call.activation)

    def dense(self) -> Settings:
        """The same, of a hidden layer that is formed."""
        return replace(self, call=self.call._replace(activation=""))


def partials(settings: Settings, context_ids: Tensor | None, *factors: Tensor | None) -> tuple[Tensor, ...]:
    """The partials of phi by the wanted slots, differentiable in every factor, to any order.

    `factors` follow `FACTORS`, and one that no wanted partial is a function of may be None. With an activation,
    the hidden partial is two results, dcontext and dchunks.
    """
    if unrecorded(*factors):
        return tuple(contract(settings.call, settings.wanted, settings.order, settings.backend, context_ids, *factors))
    if torch.compiler.is_compiling():  # a view: Dynamo loses the gradient of a graph's input that is passed as it is
        return Partials.apply(settings, context_ids, *(None if v is None else v.view_as(v) for v in factors))
    return PartialsForwardMode.apply(settings, context_ids, *factors)


class Partials(torch.autograd.Function):
    """`partials`, as Dynamo can trace it (it refuses a Function that has a `jvp`)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(settings, context_ids, y, hidden, chunks, head, x):  # by name: Dynamo counts them
        s = settings
        return tuple(contract(s.call, s.wanted, s.order, s.backend, context_ids, y, hidden, chunks, head, x))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.settings, context_ids, *factors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(context_ids, *_read_in_backward(ctx.settings.wanted, ctx.needs_input_grad[2:], factors))
        ctx.save_for_forward(context_ids, *factors)

    @staticmethod
    def backward(ctx, *cotangents):
        context_ids, *factors = ctx.saved_tensors
        settings = ctx.settings
        needs = [name for name, needed in zip(FACTORS, ctx.needs_input_grad[2:]) if needed]
        given = {name: v for name, v in zip(settings.results, cotangents) if v is not None}
        if settings.call.activation and given.keys() & {"hidden", "chunks"}:
            grads = _additive_second_order(settings, context_ids, factors, needs, given)
        else:
            grads = {}
            slots = {slot_of(name) for name in needs}
            for slot, cotangent in given.items():
                values = dict(zip(FACTORS, factors)) | {slot: cotangent}
                targets = tuple(s for s in SLOTS if s != slot and s in slots)
                _accumulate(grads, replace(settings, wanted=targets), context_ids, values)
        return None, None, *(grads[name] if name in needs and name in grads else None for name in FACTORS)


# Each `apply` binds its arguments to the signature of forward, and to work that out anew costs 30 us.
Partials.forward.__signature__ = inspect.signature(Partials.forward)


def _accumulate(totals: dict[str, Tensor], settings: Settings, context_ids: Tensor | None, values: dict) -> None:
    """Add the partials of phi at `values` to `totals`, by name."""
    if settings.wanted:
        for name, part in zip(settings.results, partials(settings, context_ids, *values.values())):
            totals[name] = totals[name] + part if name in totals else part


class PartialsForwardMode(Partials):
    """`Partials` with forward-mode derivatives."""

    @staticmethod
    def jvp(ctx, _settings, _ids, *tangents):
        context_ids, *factors = ctx.saved_tensors
        settings = ctx.settings
        values = dict(zip(FACTORS, factors))
        moved = {name: v for name, v in zip(FACTORS, tangents) if v is not None}
        totals: dict[str, Tensor] = {}
        if settings.call.activation and moved.keys() & {"hidden", "chunks"}:
            if "hidden" in settings.wanted:
                raise NotImplementedError(
                    "forward-mode derivatives of the gradients of AdditiveHidden: pass hidden.materialize() instead"
                )
            pre = additive_pre(values["hidden"], values["chunks"])
            tangent = torch.zeros_like(pre)
            if "hidden" in moved:
                tangent = tangent + moved.pop("hidden")[:, None, None]
            if "chunks" in moved:
                tangent = tangent + moved.pop("chunks")
            dense = values | {"hidden": ACTIVATIONS[settings.call.activation].grad(tangent, pre), "chunks": None}
            _accumulate(totals, settings.dense(), context_ids, dense)
        for slot, tangent in moved.items():
            targets = tuple(s for s in settings.wanted if s != slot)
            _accumulate(totals, replace(settings, wanted=targets), context_ids, values | {slot: tangent})
        like = next(v for v in tangents if v is not None)
        return tuple(totals[n] if n in totals else like.new_zeros(settings.call.shape(n)) for n in settings.results)


def _read_in_backward(wanted: tuple[str, ...], needs: Sequence[bool], factors: Sequence[Tensor | None]):
    """Each factor that some derivative of some wanted partial is a function of; None for the others."""
    slots = {slot_of(name) for name, needed in zip(FACTORS, needs) if needed}
    additive = factors[FACTORS.index("chunks")] is not None
    if additive and "hidden" in wanted:
        return tuple(factors)

    def read(name: str) -> bool:
        slot = slot_of(name)
        if slot == "hidden" and additive and "hidden" in slots:
            return True  # the activation's derivative is taken at them
        return any(slot not in (s, by) for s in wanted for by in slots if s != by)

    return tuple(factor if read(name) else None for name, factor in zip(FACTORS, factors))


def _additive_second_order(
    settings: Settings,
    context_ids: Tensor | None,
    factors: Sequence[Tensor | None],
    needs: list[str],
    cotangents: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The pullback of dcontext and dchunks: phi is not linear in those, so hidden is formed and torch's own
    derivatives of the activation are used."""
    activation = ACTIVATIONS[settings.call.activation]
    values: dict[str, Any] = dict(zip(FACTORS, factors))

    def gradients(*active: Tensor) -> tuple[Tensor, ...]:
        full = values | dict(zip(needs, active))
        pre = additive_pre(full["hidden"], full["chunks"])
        full |= {"hidden": activation.apply_(pre.clone()), "chunks": None}
        dense = settings.dense()
        found = dict(zip(dense.results, partials(dense, context_ids, *full.values())))
        if "hidden" in found:
            dpre = activation.grad(found["hidden"], pre)
            found |= {"hidden": dpre.sum((1, 2)), "chunks": dpre.sum(0)}
        return tuple(found[name] for name in cotangents)

    pullback = torch.func.vjp(gradients, *(values[name] for name in needs))[1]
    return dict(zip(needs, pullback(tuple(cotangents.values()))))
