"""Who plays which part in `chain`'s two products; no triton here, so that the planner can ask."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from hyperkernels.call import PAIRS, Call
from hyperkernels.kernels.tiles import Sizes
from hyperkernels.planner import workspace_bytes


class Roles(NamedTuple):
    """Slots u, f, w and v, of which w or v comes out; labels s, o, n and d (k is k)."""

    u: str
    f: str
    w: str
    v: str
    s: str
    o: str
    n: str
    d: str


def roles_of(call: Call, order: str, out: str) -> Roles:
    """In head_first and hidden_first a tensor with rows and a factor are paired; generate has head_first's parts."""
    pairs = PAIRS["head_first" if order == "generate" else order]
    forms, consumers = sorted(pairs, key=lambda pair: out in pair)
    u, v = (next(slot for slot in pair if slot in ("x", "y")) for pair in (forms, consumers))
    f, w = (next(slot for slot in pair if slot in ("hidden", "head")) for pair in (forms, consumers))

    def own(slot: str) -> set[str]:
        return set(call.labels[slot]) - set("gtk")

    (d,), (s,), (o,), (n,) = own(u) & own(f), own(u) - own(f), own(f) - own(u), own(w) - own(u)
    return Roles(u, f, w, v, s, o, n, d)


def sizes_of(call: Call, order: str, out: str, gathered: bool = False) -> Sizes:
    """`gathered`: x, or where its partial comes out y, is read through tables, number by number."""
    roles, sizes = roles_of(call, order, out), call.sizes
    kernel = ("generate" if order == "generate" else "contract") + ("_rows" if out == roles.v else "_sums")
    S, M, O, N, D = (sizes[label] for label in (roles.s, "k", roles.o, roles.n, roles.d))
    letters = {roles.s: "s", "k": "k", roles.o: "o", roles.n: "n", roles.d: "d"}
    side_by_side = {"x": "q", "y": "r", "hidden": "k", "head": "q"}
    apart = ("y" if out == "x" else "x") if gathered else ""
    slots = roles.u, roles.f, roles.w, roles.v
    runs = "".join("-" if slot == apart else letters[side_by_side[slot]] for slot in slots)
    additive = out == "hidden" and bool(call.activation)
    by_context = out == "hidden" and not additive and call.contexts > 1
    room = workspace_bytes() // 4
    planes = room // max(prod(call.shape("chunks" if additive else out)), 1)
    context_planes = room // max(call.contexts * call.width, 1)
    extents = (sizes["g"], max(sizes["t"], 1), S, M, O, N, D)
    activated = "" if not call.activation or out == "hidden" else "f" if roles.f == "hidden" else "w"
    return Sizes(kernel, *extents, call.dtype.itemsize, runs, planes, context_planes, by_context, additive, activated)
