"""The specification: the equations as written, in plain torch, every weight formed. Slow, any dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperkernels.call import Call, Window
from hyperkernels.chunking import weight_from_chunks


def supports(call: Call, order: str | None) -> tuple[bool, str]:
    if order not in (None, "generate"):
        return False, f"it forms every weight whole, so it has no order {order!r}"
    return True, "forms every weight whole, so only when asked for"


def materialize(hidden: Tensor, head: Tensor, out_features: int, in_features: int, head_bias: Tensor | None) -> Tensor:
    """`W[g, i*rows+r, j*cols+q, s] = sum_k hidden[g,i,j,k] head[k,r,q,s] (+ head_bias[r,q,s])`, `[G, N, K, s]`, with s
    the positions of a kernel in one dimension. Of heads and biases there is one, or one per chunk."""
    I, J, m = hidden.shape[1:]
    rows, cols, positions = head.shape[-3:]
    if head.dim() == 5:
        chunks = torch.einsum("gijk,ijkrqs->gijrqs", hidden, head.reshape(I, J, m, rows, cols, positions))
    else:
        chunks = torch.einsum("gijk,krqs->gijrqs", hidden, head)
    if head_bias is not None:
        chunks = chunks + (head_bias if head_bias.dim() == 3 else head_bias.reshape(I, J, rows, cols, positions))
    return weight_from_chunks(chunks, out_features, in_features)


def hyper_linear(x: Tensor, weight: Tensor, context_ids: Tensor | None) -> Tensor:
    """`y[l,t,:] = W[g(l)] @ x[l,t,:]` with x `[L, T, K]`, W `[G, N, K]`."""
    if context_ids is not None:
        weight = weight[context_ids]
    return torch.matmul(x, weight.transpose(-2, -1))


def hyper_conv(
    window: Window, x: Tensor, weight: Tensor, context_ids: Tensor | None, transposed: bool = False
) -> Tensor:
    """Entry by entry, torch's convolution of x `[L, T, K, h]` with W `[G, N, K, s]`: `[L, T, N, p]`; transposed, of the
    latter's shape to the former's."""
    if context_ids is not None:
        weight = weight[context_ids]
    n, size, output_size = len(window.kernel), window.size, window.output_size
    more = [0] * n
    if transposed:
        steps = zip(size, output_size, window.kernel, window.stride, window.padding, window.dilation)
        more = [length - ((out - 1) * step - 2 * pad + d * (k - 1) + 1) for length, out, k, step, pad, d in steps]
    moves = (window.stride, window.padding, window.dilation, transposed, more, 1)
    images, kernels = x.unflatten(-1, output_size if transposed else size), weight.unflatten(-1, window.kernel)
    entries = [torch.ops.aten.convolution(image, kernel, None, *moves) for image, kernel in zip(images, kernels)]
    if not entries:
        return x.new_empty(*x.shape[:2], weight.shape[2 if transposed else 1], 0)
    return torch.stack(entries).flatten(-n)
