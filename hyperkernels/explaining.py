"""`explain`: what a call will run, what else was weighed, and why it was left."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from hyperkernels.backends import BACKENDS, choose_backend, plan_call
from hyperkernels.call import OUTPUT, Call
from hyperkernels.form import canonical_form
from hyperkernels.functional import hyper_linear
from hyperkernels.operators import check_context_ids
from hyperkernels.planner import Plan, Step


@dataclass(frozen=True)
class Explanation:
    """The plans of a call: `forward` for y, `backward` for the three gradients; `str()` is the printed account."""

    call: Call
    backend: str
    ruled_out: dict[str, str]
    forward: Plan
    backward: Plan
    forced_order: str | None

    def __str__(self) -> str:
        call, grid = self.call, self.call.grid
        tokens = call.entries * call.tokens
        dense = 2 * tokens * grid.out_features * grid.in_features
        lines = [
            f"hyper_linear: {tokens} x {grid.in_features} -> {tokens} x {grid.out_features}, {call.contexts} "
            f"context{'s' * (call.contexts != 1)}, {grid.I}x{grid.J} chunks of {grid.rows}x{grid.cols}, "
            f"m = {call.width}, {str(call.dtype).removeprefix('torch.')} on {call.device}",
            f"weights never formed: {_si(call.contexts * grid.out_features * grid.in_features)}; "
            f"rank at most {grid.rank_bound(call.width)}",
            f"backend {self.backend}: {BACKENDS[self.backend].supports(call, self.forced_order)[1]}",
            *(f"  not {name}: {reason}" for name, reason in self.ruled_out.items()),
        ]
        if self.backend == "reference":
            return "\n".join(lines)
        lines.append(f"{'output':8} {'order':13} {'FLOPs':>8} {'bytes':>8} {'workspace':>10} {'estimate':>11}  why")
        for plan in (self.forward, self.backward):
            for slot in plan.wanted:
                lines += self._rows(plan, slot)
        sharing = ", sharing intermediates" if BACKENDS[self.backend].shares else ""
        lines.append(
            f"y: {self.forward.flops / max(dense, 1):.2f} of a dense layer's FLOPs; gradients{sharing}: "
            f"{self.backward.flops / max(2 * dense, 1):.2f}"
        )
        return "\n".join(lines)

    def _rows(self, plan: Plan, slot: str) -> list[str]:
        order = plan.order_of(slot)
        step = next(step for step in plan.steps if slot in step.outputs)
        picked = next(option for option in plan.candidates[slot] if option.order == order)
        rows = []
        for option in sorted(plan.candidates[slot], key=lambda option: option is not picked):
            if option is picked:
                sharers = [OUTPUT[other] for other in step.outputs if other != slot]
                pair = " and ".join("dy" if name == "y" else name for name in step.forms)
                why = f"picked: forms [{','.join(plan.call.intermediate(order))}] from {pair}"
                if sharers:
                    why += f", shared with {', '.join(sharers)}"
                if step.cost.by:
                    why += f", by {step.cost.by}"
            elif self.forced_order:
                why = f"order={self.forced_order!r} was asked for"
            else:
                why = _comparison(option, picked)
            rows.append(
                f"{OUTPUT[slot] if option is picked else '':8} {option.order:13} {_si(option.flops):>8} "
                f"{_si(option.bytes_moved):>8} {option.cost.workspace_bytes / 2**20:>6.1f} MiB "
                f"{option.time_us:>8.0f} us  {why}"
            )
        return rows


def _comparison(option: Step, picked: Step) -> str:
    ratio = option.time_us / max(picked.time_us, 1e-9)
    if ratio < 1:
        return f"alone {1 / ratio:.1f} times faster, but it would share nothing"
    return "left: no faster" if ratio < 1.05 else f"left: {ratio:.1f} times slower"


def _si(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"


def explain(target: nn.Module | Callable[..., Tensor], *args, **kwargs) -> Explanation:
    """Print, and return, the plan of a call: the order of y and of each gradient, its cost, and what was ruled out.

    Args:
        target: a `HyperLinear`, or `hyper_linear` itself.
        *args, **kwargs: what you would call it with. Nothing is computed but the trunk of a layer. Times are of the
            contraction: the trunk, and some tens of us that every call costs, come on top.

    Raises:
        TypeError: target is neither; and whatever the call itself would raise.

    Example:
        >>> import torch, hyperkernels as hk
        >>> plan = hk.explain(hk.HyperLinear(512, 512, width=4), torch.randn(8, 512))  # doctest: +ELLIPSIS
        hyper_linear: 8 x 512 -> 8 x 512, 1 context, ...
        >>> plan.forward.order_of("y")
        'head_first'
    """
    if isinstance(target, nn.Module) and hasattr(target, "arguments"):
        given = inspect.signature(target.forward).bind(*args, **kwargs)
        kwargs = target.arguments(*given.args, **given.kwargs)  # type: ignore[operator]
    elif target is hyper_linear:
        kwargs = inspect.signature(hyper_linear).bind(*args, **kwargs).arguments
    else:
        raise TypeError(f"target: got {type(target).__name__}, wanted a hyper layer or hyper_linear")
    order = kwargs.get("order")
    tensors = (kwargs[name] for name in ("x", "hidden", "head"))
    options = (kwargs.get(name) for name in ("out_features", "bias", "head_bias", "context_ids"))
    form = canonical_form(*tensors, *options)
    if form.ids is not None:
        check_context_ids(form.ids, form.call.contexts)
    backend, ruled_out = choose_backend(form.call, order, kwargs.get("backend"))
    forward = plan_call(form.call, ("y",), order, backend)[1]
    backward = plan_call(form.call, ("hidden", "head", "x"), order, backend)[1]
    explanation = Explanation(form.call, backend, ruled_out, forward, backward, order)
    print(explanation)
    return explanation
