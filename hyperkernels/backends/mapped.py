"""Which entries of x use which context, where an integer tensor says so."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mapped(NamedTuple):
    """Context g has `counts[g]` entries: `entries[starts[g]:starts[g + 1]]`, in their own order."""

    counts: Tensor
    starts: Tensor
    entries: Tensor

    @classmethod
    def of(cls, context_ids: Tensor, contexts: int) -> Mapped:
        """On the ids' device, without waiting for it."""
        counts = context_ids.new_zeros(contexts).scatter_add_(0, context_ids, torch.ones_like(context_ids))
        starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return cls(counts, starts, torch.argsort(context_ids, stable=True))
