"""A product of two labelled factors by torch: a convolution where they have two positions, else a matrix product."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from hyperkernels.backends.native_cpu import in_large_pages
from hyperkernels.call import Window, convolves


def multiply(window: Window | None, left: str, right: str, out: str, a: Tensor, b: Tensor) -> Tensor:
    """The sum over all labels that `out` has not of `a`, labelled `left`, times `b`, labelled `right`."""
    if window and convolves(left + right):
        return _convolve(window, {left: a, right: b}, out)
    if window and "t" in out:
        hidden, images = ((left, a), (right, b)) if "t" in right else ((right, b), (left, a))
        if set(hidden[0]) & set(images[0]) & set(out) == {"g"}:
            return _mix(*hidden, *images, out)
    return torch.einsum(f"{left},{right}->{out}", a, b)


def _mix(hidden: str, h: Tensor, images: str, v: Tensor, out: str) -> Tensor:
    """The labels of `images` that are hidden's make way for others, image by image, with the positions where they lie:
    an einsum would bring them to the front, and its result back."""
    own = [label for label in hidden if label in out and label != "g"]
    summed = [label for label in images if label in hidden and label != "g"]
    h = h.permute([hidden.index(label) for label in ("g", *own, *summed)])
    n = 2 + len(summed)
    extents = h.shape[1 : 1 + len(own)]
    matrix, vectors = h.reshape(h.shape[0], 1, prod(extents), -1), v.flatten(2, n - 1).flatten(3)
    mixed = in_large_pages(v.new_empty(*v.shape[:2], matrix.shape[2], vectors.shape[3]))
    return torch.matmul(matrix, vectors, out=mixed).reshape(*v.shape[:2], *extents, *v.shape[n:])


def _convolve(window: Window, factors: dict[str, Tensor], out: str) -> Tensor:
    """Of an image (which has h), a kernel (s) and a result (p), the one that is not given: torch's convolution, or its
    gradient by the image or by the kernel.

    What image and result share is torch's batch, image and kernel its channels, kernel and result its output channels,
    and what all three share its groups.
    """
    image, kernel, result = (next(v for v in (*factors, out) if position in v) for position in "hsp")
    every = set(image) & set(kernel) & set(result)
    batch, channels, outputs, groups = (
        "".join(label for label in one if label in other and label not in without)
        for one, other, without in (
            (image, result, kernel),
            (image, kernel, result),
            (kernel, result, image),
            (image, every, ""),
        )
    )
    extents = {label: n for labels, v in factors.items() for label, n in zip(labels, v.shape)}

    def size(labels: str) -> int:
        return prod(extents[label] for label in labels)

    shapes = {
        image: (size(batch), size(groups + channels), *window.size),
        kernel: (size(groups + outputs), size(channels), *window.kernel),
        result: (size(batch), size(groups + outputs), *window.output_size),
    }
    orders = {image: batch + groups + channels, kernel: groups + outputs + channels, result: batch + groups + outputs}
    given = {
        labels: v.permute([labels.index(label) for label in orders[labels]] + [len(labels) - 1]).reshape(shapes[labels])
        for labels, v in factors.items()
    }
    moves = (window.stride, window.padding, window.dilation, False, [0] * len(window.kernel), size(groups))
    if out == result:
        found = torch.ops.aten.convolution(given[image], given[kernel], None, *moves)
    else:
        like = next(iter(factors.values())).new_empty(1).expand(shapes[out])
        operands = (given[result], given.get(image, like), given.get(kernel, like))
        wanted = [out == image, out == kernel, False]
        found = next(v for v in torch.ops.aten.convolution_backward(*operands, None, *moves, wanted) if v is not None)
    order = orders[out]
    found = found.reshape(*(extents[label] for label in order), -1)
    return found.permute([order.index(label) for label in out[:-1]] + [len(order)])
