"""The specification: the equations as written, in plain torch, every weight formed. Slow, any dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperkernels.call import Call
from hyperkernels.chunking import weight_from_chunks


def supports(call: Call, order: str | None) -> tuple[bool, str]:
    if order not in (None, "generate"):
        return False, f"it forms every weight whole, so it has no order {order!r}"
    return True, "forms every weight whole, so only when asked for"


def materialize(hidden: Tensor, head: Tensor, out_features: int, in_features: int, head_bias: Tensor | None) -> Tensor:
    """`W[g, i*rows+r, j*cols+q] = sum_k hidden[g,i,j,k] head[k,r,q] (+ head_bias[r,q])`, `[G, N, K]`."""
    I, J, m = hidden.shape[1:]
    rows, cols = head.shape[-2:]
    if head.dim() == 4:
        chunks = torch.einsum("gijk,ijkrq->gijrq", hidden, head.reshape(I, J, m, rows, cols))
    else:
        chunks = torch.einsum("gijk,krq->gijrq", hidden, head)
    if head_bias is not None:
        chunks = chunks + (head_bias if head_bias.dim() == 2 else head_bias.reshape(I, J, rows, cols))
    return weight_from_chunks(chunks, out_features, in_features)


def hyper_linear(x: Tensor, weight: Tensor, context_ids: Tensor | None) -> Tensor:
    """`y[l,t,:] = W[g(l)] @ x[l,t,:]` with x `[L, T, K]`, W `[G, N, K]`."""
    if context_ids is not None:
        weight = weight[context_ids]
    return torch.matmul(x, weight.transpose(-2, -1))
