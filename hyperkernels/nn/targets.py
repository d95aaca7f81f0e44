"""What a hypernetwork is to generate: names, shapes, and how each strategy of the literature cuts them into chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import nn

from hyperkernels.chunking import Grid, check_chunk
from hyperkernels.nn.trunk import check_sizes
from hyperkernels.planner import default_chunk

STRATEGIES = ("chunk", "once", "multi_head", "component")
COMPONENTS = ("row", "column", "layer")
Chunk = tuple[int, int] | int | None
LEAST_VARIANCE = 1e-4  # of what is to start at zero: a scale of zero would keep it there


class Found(NamedTuple):
    """A weight of a model: its shape, the groups that its rows are in, and whether it is a transposed convolution's,
    `[in, out / groups, *kernel]`."""

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @property
    def fans(self) -> tuple[int, int]:
        """`(d_out, d_in)`: how many outputs an input reaches, and how many inputs an output sums."""
        N, K, *kernel = (*self.shape, 1) if len(self.shape) == 1 else self.shape
        rows, cols = N // self.groups * prod(kernel), K * prod(kernel)
        return (cols, rows) if self.transposed else (rows, cols)


class Target(NamedTuple):
    """A weight to generate: its shape, as a grid of chunks, each of `rows x cols x kernel` numbers of one head."""

    shape: tuple[int, ...]
    grid: Grid
    kernel: tuple[int, ...]
    scale: float

    @property
    def chunk(self) -> tuple[int, ...]:
        return self.grid.rows, self.grid.cols, *self.kernel

    @property
    def chunks(self) -> int:
        return self.grid.I * self.grid.J

    @property
    def numbers(self) -> int:
        return prod(self.shape)


def find_targets(
    targets: Mapping[str, Sequence[int]] | nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    biases: bool = False,
) -> dict[str, Found]:
    """What is to be generated, by name; a weight that several layers share once, by its first name."""
    known: dict[str, Found] = {}
    if isinstance(targets, nn.Module):
        found: dict[str, Any] = {}
        seen: set[nn.Parameter] = set()
        for layer, module in targets.named_modules():
            kind = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
            if not kind or not (filter_fn is None or filter_fn(module, layer)):
                continue
            for part in ("weight", "bias")[: 1 + biases]:
                parameter, name = getattr(module, part), f"{layer}.{part}".lstrip(".")
                if parameter is not None and parameter not in seen:
                    seen.add(parameter)
                    found[name] = tuple(parameter.shape)
                    known[name] = Found(found[name], getattr(module, "groups", 1), getattr(module, "transposed", False))
    elif isinstance(targets, Mapping):
        if filter_fn is not None or biases:
            raise ValueError("filter_fn, biases: got one with {name: shape}, wanted them with a torch.nn.Module alone")
        found = dict(targets)
    else:
        raise TypeError(f"targets: got {type(targets).__name__}, wanted {{name: shape}} or a torch.nn.Module")
    if not found:
        raise ValueError("targets: got none, wanted at least one weight")
    for name, shape in found.items():
        fits = isinstance(shape, Sequence) and 1 <= len(shape) <= 5 and all(isinstance(n, int) and n > 0 for n in shape)
        if not fits:
            raise ValueError(f"targets: got {shape!r} for {name!r}, wanted one to five positive integers")
    return {name: known.get(name, Found(tuple(shape))) for name, shape in found.items()}


def cut(name: str, found: Found, chunk: Chunk, width: int, strategy: str, component: str, scale: float) -> Target:
    """What was found as a target, with the chunks that the strategy gives it."""
    shape, groups, _ = found
    N, K, *kernel = shape if len(shape) > 1 else (*shape, 1)
    own, positions = N // groups, prod(kernel)
    if strategy in ("once", "component"):
        whole = strategy == "once" or component == "layer"
        chunk = (N, K) if whole else (1, K) if component == "row" else (N, 1)
    if chunk is None or isinstance(chunk, int):
        if chunk is not None:
            check_sizes(chunk=chunk)
        try:
            rows, cols = default_chunk(own, K, width, positions, chunk)
        except ValueError as error:
            raise ValueError(f"{error}, of target {name!r} {list(shape)}") from None
    else:
        rows, cols = (min(size, extent) for size, extent in zip(check_chunk(chunk), (own, K)))
        while groups > 1 and own % rows:
            rows -= 1
    return Target(shape, Grid(N, K, rows, cols), tuple(kernel), scale)


def start_scales(found: Mapping[str, Found], init: str, nonlinearity: str) -> dict[str, float]:
    """The standard deviation that each target is to have at the start, by Chang et al. 2020.

    With c = 2 for relu and 1 otherwise, a weight varies by `c / (k d_in)`, where k is 2 if the bias of its layer is
    generated too and 1 else, and that bias by `c / 2`; or, by fan_out, `c / d_out` and
    `max(0, c (1 - d_in / d_out))`, but `LEAST_VARIANCE` for that 0: what is scaled by nothing cannot learn.
    """
    c = 2.0 if nonlinearity == "relu" else 1.0
    scales = {}
    for name, target in found.items():
        is_bias = len(target.shape) == 1
        layer = name.removesuffix("bias" if is_bias else "weight")
        d_out, d_in = found.get(f"{layer}weight", target).fans
        if is_bias:
            variance = c / 2 if init == "fan_in" else max(LEAST_VARIANCE, c * (1 - d_in / d_out))
        elif init == "fan_in":
            variance = c / ((1 + (f"{layer}bias" in found)) * d_in)
        else:
            variance = c / d_out
        scales[name] = variance**0.5
    return scales
