"""Second moments of additive hidden layers by the native engine (`csrc/cpu/moments.h`), which never holds the layers.

A layer is `(context [G, m], chunks [C, 1, m], scale [C, 1] or None)`: `h[g,c] = scale[c] act(context[g] + chunks[c])`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperkernels.backends import native_cpu
from hyperkernels.hidden import ACTIVATIONS, AdditiveHidden

THREAD_WORK = 18  # multiplications worth a thread, as a power of two
VECTOR_BYTES = 64  # the widest vector: rows are filled up to whole ones with zeros, which every activation keeps

Layers = Sequence[tuple[Tensor, Tensor, Tensor | None]]


def supports(hidden: AdditiveHidden) -> bool:
    some = bool(hidden.context.numel() and hidden.chunks.numel())
    return (
        not native_cpu.MISSING
        and some
        and hidden.device.type == "cpu"
        and hidden.dtype in (torch.float32, torch.float64)
    )


class Run:
    """One layer's moments, or those of `[h - h', h']`: what is read for them, and the engine."""

    def __init__(self, layers: Layers, activation: str) -> None:
        context, chunks, _ = layers[0]
        self.width, self.parts = context.shape[-1], len(layers)
        self.padded = -(-self.width * context.itemsize // VECTOR_BYTES) * VECTOR_BYTES // context.itemsize
        self.read = [(self._filled(c), self._filled(h), s if s is None else s.contiguous()) for c, h, s in layers]
        work = len(context) * len(chunks) * (self.parts * self.padded) ** 2
        self.engine = native_cpu._cpu.Moments(
            contexts=len(context),
            chunks=len(chunks),
            width=self.padded,
            activation=list(ACTIVATIONS).index(activation),
            storage=native_cpu.STORAGE[context.dtype],
            threads=min(torch.get_num_threads(), max(1, work >> THREAD_WORK)),
            isa=native_cpu.INSTRUCTIONS,
        )

    def _filled(self, value: Tensor) -> Tensor:
        missing = self.padded - self.width
        return F.pad(value, (0, missing)) if missing else value.contiguous()

    def _pointers(self) -> list[tuple[int, ...]]:
        return [tuple(0 if value is None else value.data_ptr() for value in layer) for layer in self.read]

    def moments(self) -> Tensor:
        """`[G, parts * m, parts * m]`."""
        like, wide = self.read[0][0], self.parts * self.padded
        sums = like.new_empty(len(like), self.engine.slices, wide, wide)
        self.engine.run(self._pointers(), sums.data_ptr())
        found = sums.sum(1) if self.engine.slices > 1 else sums[:, 0]
        if self.parts > 1:  # the engine leaves the lower quarter out
            found[:, self.padded :, : self.padded] = found[:, : self.padded, self.padded :].mT
        if self.padded == self.width:
            return found
        blocks = found.view(len(like), self.parts, self.padded, self.parts, self.padded)
        return blocks[:, :, : self.width, :, : self.width].flatten(3).flatten(1, 2)

    def pull_back(self, sides: Tensor, wanted: Sequence[bool]) -> list[tuple[Tensor, Tensor] | None]:
        """dcontext and dchunks of each wanted layer, through `du[g,c] = u[g,c] sides[g]`."""
        if self.padded != self.width:
            blocks = sides.unflatten(2, (self.parts, -1)).unflatten(1, (self.parts, -1))
            missing = self.padded - self.width
            sides = F.pad(blocks, (0, missing, 0, 0, 0, missing)).flatten(3).flatten(1, 2)
        sums: list[Any] = [None] * self.parts
        for n in range(self.parts):
            context, chunks, _ = self.read[n]
            if wanted[n]:
                dcontext = context.new_zeros(self.engine.threads, *context.shape)
                sums[n] = dcontext, torch.empty_like(chunks)
        pointers = [tuple(v.data_ptr() for v in pair) if pair else (0, 0) for pair in sums]
        self.engine.pull_back(self._pointers(), sides.contiguous().data_ptr(), pointers)
        own = slice(self.width)
        return [pair and (pair[0].sum(0)[..., own], pair[1][..., own]) for pair in sums]
