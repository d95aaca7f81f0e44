"""Pictures of generated weights, drawn from their parts: nothing is formed that is bigger than the picture. Needs
matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from hyperkernels import algebra
from hyperkernels.chunking import ceil_div, check_sizes
from hyperkernels.deferred import made
from hyperkernels.flat import FlatWeight
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.matrices import Matrix, all_of
from hyperkernels.weight import AbsentWeight, GeneratedWeight, form

Weights = GeneratedWeight | Mapping[str, GeneratedWeight]


def _axis(axis: Any) -> Any:
    """The one given, or that of a new figure."""
    if axis is not None:
        if not hasattr(axis, "imshow"):
            raise TypeError(f"axis: got {type(axis).__name__}, wanted a matplotlib axis")
        return axis
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("viz draws with matplotlib, which is not installed: pip install matplotlib") from error
    return Figure(layout="constrained").subplots()


def filters(weight: GeneratedWeight, count: int = 64, context: int = 0, axis: Any = None) -> Any:
    """The first `count` filters of a generated kernel `[out, in, H, W]`, in a grid; where there are three input
    channels, in colour, else the first of them. Only their chunks are formed, or of a flat vector their numbers.

    Args:
        weight: of a 2-d convolution, in blocks of its own or in chunks of a flat vector.
        count: how many filters, positive.
        context: of which context.
        axis: a matplotlib axis to draw on; by default one of a new figure.

    Returns:
        The axis; `axis.figure.savefig(path)` saves it.

    Raises:
        TypeError, ValueError: weight is no generated 2-d kernel, count not positive, or context none of its.
        ImportError: there is no matplotlib.
    """
    weight = made(weight)
    if not isinstance(weight, GeneratedWeight | FlatWeight) or weight.dim() != 4:
        got = list(weight.shape) if isinstance(weight, AbsentWeight) else type(weight).__name__
        raise TypeError(f"weight: got {got}, wanted a generated weight [out, in, H, W]")
    check_sizes(count=count)
    N, K, height, width = weight.shape
    channels, count = 3 if K == 3 else 1, min(count, N)
    own = _corner(weight, count, channels, context)
    low, high = own.amin((1, 2, 3), keepdim=True), own.amax((1, 2, 3), keepdim=True)
    tiles = ((own - low) / (high - low).clamp_min(1e-12)).movedim(1, -1)
    across = ceil_div(count, int(count**0.5))
    sheet = torch.ones(ceil_div(count, across) * (height + 1), across * (width + 1), channels, dtype=tiles.dtype)
    for n, tile in enumerate(tiles):
        y, x = n // across * (height + 1), n % across * (width + 1)
        sheet[y : y + height, x : x + width] = tile
    axis = _axis(axis)
    axis.imshow(sheet.float().numpy().squeeze(), cmap="gray")
    axis.set(title=f"{count} of {N} filters, each between its own extremes", xticks=[], yticks=[])
    return axis


@torch.no_grad()
def _corner(weight: GeneratedWeight | FlatWeight, rows: int, cols: int, context: int) -> Tensor:
    """`W[context, :rows, :cols]`, from the chunks that hold it."""
    hidden = weight.hidden
    _check_context(context, weight.contexts)
    if isinstance(hidden, AdditiveHidden):
        hidden = AdditiveHidden(hidden.context[context : context + 1], hidden.chunks, hidden.activation)
    elif hidden.dim() == (3 if isinstance(weight, FlatWeight) else 4):
        hidden = hidden[context]
    settings = {"head_bias": weight.settings["head_bias"], "scale": weight.scale}
    shape = (cols, *weight.shape[2:])
    if isinstance(weight, FlatWeight):
        starts = range(weight.start, weight.start + rows * prod(weight.shape[1:]), prod(weight.shape[1:]))
        return torch.stack([form(FlatWeight(hidden, weight.head, shape, n, **settings)).view(shape) for n in starts])
    size_r, size_q = weight.head.shape[-4:-2]
    I, J = ceil_div(rows, size_r), ceil_div(cols, size_q)

    def of_corner(heads: Tensor, shared: int) -> Tensor:
        """Those of the corner's chunks, where each has its own."""
        if heads.dim() == shared:
            return heads
        return heads.unflatten(0, tuple(hidden.shape[-3:-1]))[:I, :J].flatten(0, 1)

    head, bias = of_corner(weight.head, 5), settings["head_bias"]
    settings["head_bias"] = None if bias is None else of_corner(bias, 4)
    if isinstance(hidden, AdditiveHidden):
        hidden = AdditiveHidden(hidden.context, hidden.chunks[:I, :J], hidden.activation)
    else:
        hidden = hidden[:I, :J]
    return form(GeneratedWeight(hidden, head, (rows, *shape), **settings))


def chunks(weight: GeneratedWeight, context: int = 0, axis: Any = None) -> Any:
    """The norm of every chunk of a weight, as a map of `I x J`: where in the layer the hypernetwork puts its weight.

    Arguments, result and errors as of `filters`, of a weight of any shape.
    """
    Matrix.of(weight, "weight")  # or raises
    norms = algebra.chunk_norms(weight)
    _check_context(context, len(norms))
    axis = _axis(axis)
    image = axis.imshow(norms[context].detach().float().cpu().numpy(), cmap="cividis", aspect="auto")
    axis.figure.colorbar(image, ax=axis, label="Frobenius norm")
    axis.set(xlabel="chunk of inputs, j", ylabel="chunk of outputs, i", title="norms of chunks")
    return axis


def _gram(weights: Weights, centred: bool = False) -> Tensor:
    if not isinstance(weights, Mapping):
        Matrix.of(weights, "weights")  # or raises
        weights = {"": weights}
    all_of(weights)
    with torch.no_grad():
        return torch.stack([algebra.gram(weight, centred=centred) for weight in weights.values()]).sum(0).double().cpu()


def similarity(weights: Weights, names: Sequence[str] | None = None, axis: Any = None) -> Any:
    """The cosine of every two contexts' weights, `<W_g, W_h> / (||W_g|| ||W_h||)`, as a map of `G x G`.

    Args:
        weights: a generated weight of G contexts, or what a `HyperNet` returns: then over all its weights together.
        names: of the contexts.
        axis: as of `filters`.

    Raises:
        ValueError: not as many names as contexts.
    """
    gram = _gram(weights)
    _check_names(names, len(gram))
    norms = gram.diagonal().clamp_min(1e-300).sqrt()
    axis = _axis(axis)
    image = axis.imshow((gram / norms / norms[:, None]).numpy(), cmap="RdBu", vmin=-1, vmax=1)
    axis.figure.colorbar(image, ax=axis, label="cosine")
    axis.set(title="similarity of what is generated", xlabel="context", ylabel="context")
    if names is not None:
        axis.set_xticks(range(len(gram)), names, rotation=90)
        axis.set_yticks(range(len(gram)), names)
    return axis


def pca(weights: Weights, names: Sequence[str] | None = None, axis: Any = None) -> Any:
    """Contexts by the first two principal components of their weights, from the Gram matrix: distances in the plane
    are as near as a plane allows to distances of weights. As `similarity`, of two contexts at least."""
    gram = _gram(weights, centred=True)
    _check_names(names, len(gram))
    if len(gram) < 2:
        raise ValueError(f"weights: got {len(gram)} context, wanted two at least")
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    x, y = (vectors[:, -1 - n] * values[-1 - n].sqrt() for n in range(2))
    shares = values.flip(0)[:2] / values.sum().clamp_min(1e-300)
    axis = _axis(axis)
    axis.scatter(x.numpy(), y.numpy(), color="#0072b2")
    for n, name in enumerate(names if names is not None else map(str, range(len(gram)))):
        axis.annotate(name, (x[n].item(), y[n].item()), xytext=(3, 3), textcoords="offset points", fontsize=8)
    labels = [f"component {n + 1}, {share:.0%} of the variance" for n, share in enumerate(shares.tolist())]
    axis.set(xlabel=labels[0], ylabel=labels[1], title="contexts by their weights")
    axis.grid(alpha=0.3)
    return axis


def _check_context(context: int, count: int) -> None:
    if not isinstance(context, int) or isinstance(context, bool) or not 0 <= context < count:
        raise ValueError(f"context: got {context!r}, wanted 0 to {count - 1}")


def _check_names(names: Sequence[str] | None, count: int) -> None:
    if names is not None and not isinstance(names, Sequence):
        raise TypeError(f"names: got {type(names).__name__}, wanted a list of strings")
    if names is not None and len(names) != count:
        raise ValueError(f"names: got {len(names)}, wanted one for each of {count} contexts")
