"""How a step of the native engine is cut, in closed form: the blocks of each label, and the one that threads divide."""

from __future__ import annotations

from math import inf, prod
from typing import NamedTuple

from hyperkernels.call import SLOTS, Call
from hyperkernels.chunking import ceil_div

LABELS = "tijkrq"
DEPTH, LANES = 256, 128  # of an intermediate's block as the next product reads it, where there is as much
FORMED = DEPTH * LANES  # numbers of the intermediate
TALL = 28  # rows of the product that forms it
OPERAND = 1 << 18  # numbers of head or hidden that a block reads


class Split(NamedTuple):
    """The label that threads divide, and whether a context's rows stay with one thread."""

    label: str
    aligned: bool


def split_of(
    call: Call,
    forms: tuple[str, str],
    outputs: tuple[str, ...],
    sizes: dict[str, int],
    formed: set[str],
    balanced: bool,
    threads: int,
    limit: int,
) -> Split | None:
    """The label whose division costs least in numbers moved: what every thread packs again or forms again, and sums
    that threads hold apart. None where the threads' sums would not fit half the workspace `limit`."""

    def numbers(slot: str) -> int:
        own = {"k"} if slot == "hidden" and call.activation else set(call.labels[slot]) - {"g"}
        return prod(sizes[label] for label in own) * (call.contexts if slot == "hidden" else 1)

    aligned = balanced and call.contexts >= 2 * threads
    factors = [slot for slot in SLOTS if slot in forms or slot not in outputs]

    def cost(label: str) -> float:
        if sizes[label] < threads:
            return inf
        if label == "t":
            apart = sum(numbers(s) for s in outputs if s == "head" or (s == "hidden" and not aligned))
            again = 0 if "t" in formed or aligned else prod(sizes[n] for n in formed) * sizes["k"] // 16
        else:
            apart = sum(numbers(slot) for slot in outputs if label not in call.labels[slot])
            again = sum(numbers(slot) for slot in factors if slot in ("x", "y") and label not in call.labels[slot])
        if 4 * threads * apart * call.dtype.itemsize > limit:
            return inf
        return 2 * threads * apart + (threads - 1) * again

    candidates = ["t", *(label for label in LABELS if label in formed - {"t"})]
    best = min(candidates, key=cost)
    return None if cost(best) == inf else Split(best, aligned and best == "t")


def blocks_of(call: Call, sizes: dict[str, int], formed: set[str]) -> dict[str, int]:
    """How many of each label a block holds, so that what it forms and what it reads stay in a core's own cache."""
    block = dict(sizes)
    if "t" not in formed:  # a tile of the weight
        for outer, inner in (("i", "r"), ("j", "q")):
            block[inner] = min(sizes[inner], DEPTH)
            block[outer] = min(sizes[outer], max(1, DEPTH // sizes[inner]))
        block["t"] = min(sizes["t"], 2 * DEPTH)
        while sizes["k"] * block["r"] * block["q"] > OPERAND and max(block["r"], block["q"]) > 1:
            longest = max("r", "q", key=lambda label: block[label])
            block[longest] = ceil_div(block[longest], 2)
        return block
    # lane stays in the intermediate while the pair's other chunk label is summed, and deep the other way round
    lane, deep, summed, kept = ("r", "j", "q", "i") if "r" in formed else ("q", "i", "r", "j")
    block[lane] = min(sizes[lane], LANES)
    of_a_context = ceil_div(sizes["t"], max(1, min(call.contexts, sizes["t"])))
    wanted = max(min(ceil_div(LANES, block[lane]), of_a_context), ceil_div(TALL, sizes[deep]))
    block["t"] = min(sizes["t"], wanted)
    depth = max(DEPTH, FORMED // (block["t"] * block[lane]))
    block["k"] = min(sizes["k"], max(1, depth // sizes[deep]))
    block[deep] = min(sizes[deep], max(1, depth // block["k"]))
    if kept in formed:  # a head per chunk
        block[kept] = 1
    operand = OPERAND if sizes["t"] > block["t"] else OPERAND // 8  # read once, packed operands are best short-lived
    while block["k"] * max(block[lane], block[deep]) > 1 and (
        block["k"] * block[lane] * sizes[summed] > operand or block["k"] * block[deep] * sizes[kept] > operand
    ):
        longest = max("k", lane, deep, key=lambda label: block[label])
        block[longest] = ceil_div(block[longest], 2)
    return block
