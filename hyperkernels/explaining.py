"""`explain`: what a call will run, what else was weighed, and why it was left."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

from hyperkernels.backends import BACKENDS, choose_backend, plan_call
from hyperkernels.call import OUTPUT, Call
from hyperkernels.conv import hyper_conv1d, hyper_conv2d, hyper_conv3d
from hyperkernels.conv_form import Part, conv_form, parts
from hyperkernels.form import Form, canonical_form
from hyperkernels.functional import hyper_linear
from hyperkernels.nn.layer import HyperLayer
from hyperkernels.operators import check_context_ids
from hyperkernels.planner import Plan, Step

CONVOLUTIONS: dict[Any, int] = {hyper_conv1d: 1, hyper_conv2d: 2, hyper_conv3d: 3}


class Weighed(NamedTuple):
    """An order that was weighed for an output, and why it was picked or left."""

    output: str
    order: str
    picked: bool
    flops: int
    bytes_moved: int
    workspace_bytes: int
    time_us: float
    why: str

    @property
    def cells(self) -> tuple[str, ...]:
        """For people."""
        sizes = si(self.flops), si(self.bytes_moved), f"{self.workspace_bytes / 2**20:.1f} MiB"
        time = f"{self.time_us:.0f} us" if self.time_us < 1e4 else f"{self.time_us / 1e3:.3g} ms"
        return self.output if self.picked else "", self.order, *sizes, time, self.why


COLUMNS = ("output", "order", "FLOPs", "bytes", "workspace", "estimate", "why")


@dataclass(frozen=True)
class Explanation:
    """The plans of a call: `forward` for y, `backward` for the three gradients; `str()` is the printed account."""

    call: Call
    backend: str
    ruled_out: dict[str, str]
    forward: Plan
    backward: Plan
    forced_order: str | None

    @property
    def weighed(self) -> list[Weighed]:
        """Every order for every output, the picked one first; none for the reference, which has no orders."""
        if self.backend == "reference":
            return []
        plans = (self.forward, self.backward)
        return [row for plan in plans for slot in plan.wanted for row in self._weighed(plan, slot)]

    @property
    def words(self) -> list[str]:
        """What the call is and who runs it, line by line."""
        call, grid, window = self.call, self.call.grid, self.call.window
        tokens = call.entries * call.tokens
        positions, kernel, size, output_size = 1, "", "", ""
        if window:
            positions = prod(window.kernel)
            kernel, size, output_size = (
                "x" + "x".join(map(str, v)) for v in (window.kernel, window.size, window.output_size)
            )
        weights = grid.out_features * grid.in_features * positions
        lines = [
            f"hyper_{f'conv{len(window.kernel)}d' if window else 'linear'}: {tokens} x {grid.in_features}{size} -> "
            f"{tokens} x {grid.out_features}{output_size}, {call.contexts} context{'s' * (call.contexts != 1)}, "
            f"{grid.I}x{grid.J} chunks of {grid.rows}x{grid.cols}{kernel}, "
            f"m = {call.width}, {str(call.dtype).removeprefix('torch.')} on {call.device}",
            f"weights never formed: {si(call.contexts * weights)}; "
            f"rank at most {grid.rank_bound(call.width, positions)}",
            f"backend {self.backend}: {BACKENDS[self.backend].supports(call, self.forced_order)[1]}",
            *(f"  not {name}: {reason}" for name, reason in self.ruled_out.items()),
        ]
        if self.backend == "reference":
            return lines
        dense = 2 * tokens * weights * (prod(window.output_size) if window else 1)
        sharing = ", sharing intermediates" if BACKENDS[self.backend].shares else ""
        shares = self.forward.flops / max(dense, 1), self.backward.flops / max(2 * dense, 1)
        return [*lines, f"y: {shares[0]:.2f} of a dense layer's FLOPs; gradients{sharing}: {shares[1]:.2f}"]

    def __str__(self) -> str:
        rows = [row.cells for row in self.weighed]
        wide = (8, 13, 8, 8, 10, 11)
        lines = []
        for row in [COLUMNS, *rows] if rows else []:
            cells = [f"{cell:{'<' if n < 2 else '>'}{width}}" for n, (cell, width) in enumerate(zip(row, wide))]
            lines.append(" ".join(cells) + "  " + row[-1])
        return "\n".join([*self.words, *lines])

    def _weighed(self, plan: Plan, slot: str) -> list[Weighed]:
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
            sizes = option.flops, option.bytes_moved, option.cost.workspace_bytes
            rows.append(Weighed(OUTPUT[slot], option.order, option is picked, *sizes, option.time_us, why))
        return rows


def _comparison(option: Step, picked: Step) -> str:
    ratio = option.time_us / max(picked.time_us, 1e-9)
    if ratio < 1:
        return f"alone {1 / ratio:.1f} times faster, but it would share nothing"
    return "left: no faster" if ratio < 1.05 else f"left: {ratio:.1f} times slower"


def si(number: float) -> str:
    """With three digits and a unit."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"


def explain(target: nn.Module | Callable[..., Tensor], *args, **kwargs) -> Explanation:
    """Print, and return, the plan of a call: the order of y and of each gradient, its cost, and what was ruled out.

    Args:
        target: a hyper layer, `hyper_linear`, `hyper_conv2d` or its like.
        *args, **kwargs: what you would call it with. Nothing is computed but the trunk of a layer. Times are of the
            contraction: the trunk, and some tens of us that every call costs, come on top. Where a convolution takes a
            call for each group of channels, the account is of one.

    Raises:
        TypeError: target is neither; and whatever the call itself would raise.

    Example:
        >>> import torch, hyperkernels as hk
        >>> plan = hk.explain(hk.HyperLinear(512, 512, width=4), torch.randn(8, 512))  # doctest: +ELLIPSIS
        hyper_linear: 8 x 512 -> 8 x 512, 1 context, ...
        >>> plan.forward.order_of("y")
        'head_first'
    """
    if isinstance(target, HyperLayer):
        given = inspect.signature(target.forward).bind(*args, **kwargs)
        function, kwargs = type(target).function, target.arguments(*given.args, **given.kwargs)
    elif target is hyper_linear or target in CONVOLUTIONS:
        function, kwargs = target, inspect.signature(target).bind(*args, **kwargs).arguments
    else:
        raise TypeError(
            f"target: got {type(target).__name__}, wanted a hyper layer, hyper_linear, hyper_conv2d or its like; of a "
            "model explain a layer, of generated weights hyper_linear with the factors of one"
        )
    if function is not hyper_linear and function not in CONVOLUTIONS:
        raise TypeError("target: got a transposed convolution, wanted the convolution whose gradient by x it is")
    order, forced = kwargs.pop("order", None), kwargs.pop("backend", None)
    form: Part | Form
    if function is hyper_linear:
        form = canonical_form(**kwargs)
    else:
        form = next(parts(conv_form(CONVOLUTIONS[function], **kwargs)))
    if form.ids is not None:
        check_context_ids(form.ids, form.call.contexts)
    backend, ruled_out = choose_backend(form.call, order, forced)
    forward = plan_call(form.call, ("y",), order, backend)[1]
    backward = plan_call(form.call, ("hidden", "head", "x"), order, backend)[1]
    explanation = Explanation(form.call, backend, ruled_out, forward, backward, order)
    print(explanation)
    return explanation
