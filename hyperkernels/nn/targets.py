"""What a hypernetwork is to generate: names, shapes, and how each strategy of the literature cuts them into chunks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

from hyperkernels.chunking import Grid, check_chunk, check_sizes
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.planner import default_chunk

CHOICES = {
    "strategy": ("chunk", "once", "multi_head", "component"),
    "component": ("row", "column", "layer"),
    "layout": ("tiles", "flat"),
    "heads": (None, "shared", "shape", "layer"),
    "init": ("fan_in", "fan_out"),
    "nonlinearity": ("relu", "linear"),
}
Chunk = tuple[int, int] | int | None


def check_choices(**given: str | None) -> None:
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(str, CHOICES[name]))}")


def check_flags(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: got {value!r}, wanted True or False")


def check_settings(
    strategy: str, component: str, layout: str, chunk: Chunk, heads: str | None, descriptors: bool
) -> None:
    """A setting that would not be heeded beside the others is refused."""
    if layout == "flat":
        if not (strategy == "chunk" and isinstance(chunk, int) and heads in (None, "shared") and not descriptors):
            raise ValueError('layout: got "flat", wanted with it a number as chunk, one shared head, no descriptors')
        check_sizes(chunk=chunk)
    if strategy in ("once", "component") and chunk is not None:
        raise ValueError(f'chunk: got {chunk!r}, wanted None: the strategy "{strategy}" says what a chunk is')
    if strategy != "component" and component != "row":
        raise ValueError(f'component: got {component!r}, wanted with it the strategy "component", got "{strategy}"')
    if strategy == "multi_head" and heads not in (None, "layer"):
        raise ValueError(f'heads: got {heads!r}, wanted None: with the strategy "multi_head" each chunk has its own')
    if strategy == "multi_head" and descriptors:
        raise ValueError('descriptors: got True, wanted another strategy than "multi_head": a head for other chunks')


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

    @property
    def chunk(self) -> tuple[int, ...]:
        return self.grid.rows, self.grid.cols, *self.kernel

    @property
    def chunks(self) -> int:
        return self.grid.I * self.grid.J

    @property
    def numbers(self) -> int:
        return prod(self.shape)


def check_filter(filter_fn: object) -> None:
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: got {type(filter_fn).__name__}, wanted a function of a layer and its name")


def find_targets(
    targets: Mapping[str, Sequence[int]] | nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    biases: bool = False,
    layout: str = "tiles",
) -> dict[str, Found]:
    """What is to be generated, by name; a weight that several layers share once, by its first name."""
    check_filter(filter_fn)
    known: dict[str, Found] = {}
    if isinstance(targets, nn.Module):
        found: dict[str, Any] = {}
        seen: set[nn.Parameter] = set()
        for layer, module in targets.named_modules():
            kind = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
            if not kind or not (filter_fn is None or filter_fn(module, layer)):
                continue
            runs = layout == "tiles" and isinstance(module, nn.ConvTranspose2d)
            if getattr(module, "transposed", False) and not runs:
                what = f'{type(module).__name__} {layer!r} in the layout "{layout}"'
                raise ValueError(f"targets: got {what}, which has its weight formed: leave it out by filter_fn")
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
        taken = ": a module of which filter_fn leaves no linear layer or convolution, or a HyperModel took them"
        reason = taken * isinstance(targets, nn.Module)
        raise ValueError(f"targets: got none, wanted at least one weight{reason}")
    for name, shape in found.items():
        if not isinstance(name, str):
            raise TypeError(f"targets: got the name {name!r}, wanted a string")
        fits = isinstance(shape, Sequence) and 1 <= len(shape) <= 5
        if not fits or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
            got = f"a tensor {list(shape.shape)}" if isinstance(shape, Tensor) else repr(shape)
            raise ValueError(f"targets: got {got} for {name!r}, wanted one to five positive integers")
    return {name: known.get(name, Found(tuple(shape))) for name, shape in found.items()}


def cut(name: str, found: Found, chunk: Chunk, width: int, strategy: str, component: str) -> Target:
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
    return Target(shape, Grid(N, K, rows, cols), tuple(kernel))


def share_heads(
    targets: Mapping[str, Target], strategy: str, heads: str | None, size: tuple[int] | None
) -> tuple[dict[str, int], list[tuple[int, ...]]]:
    """Which head each target reads, and the sizes of the heads, of a head for each chunk how many first; of a `size`
    that is given there is one, of the flat layout."""
    each = strategy == "multi_head"
    heads = "layer" if each else heads or ("layer" if strategy == "once" else "shared")
    keys: dict[Any, int] = {}
    head_of = {}
    for name, target in targets.items():
        key = {"shape": target.chunk, "layer": name}.get(heads)
        head_of[name] = keys.setdefault(key, len(keys))
    sizes: list[tuple[int, ...]] = [size or ()] * len(keys)
    for name, target in targets.items() if size is None else ():
        sizes[head_of[name]] = max(sizes[head_of[name]], (*(target.chunks,) * each, prod(target.chunk)))
    return head_of, sizes


def split_chunks(hidden: Tensor | AdditiveHidden, targets: Collection[Target]) -> list[Tensor | AdditiveHidden]:
    """Each target's chunks, as its grid."""
    own = hidden.chunks[:, 0] if isinstance(hidden, AdditiveHidden) else hidden
    parts = own.split([target.chunks for target in targets], -2)
    grids = [part.unflatten(-2, (target.grid.I, target.grid.J)) for part, target in zip(parts, targets)]
    return [hidden.with_chunks(grid) for grid in grids] if isinstance(hidden, AdditiveHidden) else grids


def count_chunks(chunks: dict[str, slice]) -> int:
    """How many there are, of all targets together."""
    return max(own.stop for own in chunks.values())
