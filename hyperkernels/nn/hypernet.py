"""`HyperNet`: one hypernetwork for many weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hyperkernels.chunking import Grid
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.nn.ambient import find_context
from hyperkernels.nn.layer import check_chunk, hidden_second_moment
from hyperkernels.nn.trunk import TrunkLayer, check_sizes
from hyperkernels.planner import default_chunk
from hyperkernels.weight import GeneratedWeight

HEADS = ("shared", "shape", "layer")
INITS = ("fan_in", "fan_out")


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


class HyperNet(nn.Module):
    """One hypernetwork for many weights: `hidden = trunk(embedding, z)` for every chunk of all of them, and of target l
    `W_l[i*rows+r, j*cols+q, *s] = scale_l * (sum_k hidden[i,j,k] head[k,r,q,*s] (+ head_bias[r,q,*s]))`.

    What comes back are `GeneratedWeight`s: weights of the right shapes that are never formed.

    Args:
        targets: what to generate: `{name: shape}`, or a module, whose targets are the weights of its `nn.Linear` and
            `nn.Conv`s (`{name + ".weight": shape}`). A shape is `(N, K)`, `(out, in / groups, *kernel)` or `(N,)`.
        filter_fn: of a module's layers, `filter_fn(layer, name)` is True for a target; all by default.
        context_features: size of the context z; None makes the hypernetwork static.
        width: m, of the trunk's output.
        chunk: `(rows, cols)` for all targets, or less where a target, or a group of a convolution's channels, is
            smaller; or a number, the most numbers that a chunk may have: each target is then cut as is cheapest for
            it. None leaves also that to each.
        heads: "shared", one head for all targets, of which each reads as many numbers as its chunks have, in their
            shape; "shape", one for each shape of chunk; "layer", one for each target.
        head_bias: whether the heads have one, the same for all chunks.
        embedding_features: size of a chunk's learned embedding; `width` by default.
        trunk: any module, called as `trunk(embedding [C, e], z)`, with all C chunks of all targets and z `[G,
            context_features]` or None, that returns hidden `[C, m]`, `[G, C, m]` or `AdditiveHidden` `[G, C, 1, m]`. By
            default a `TrunkLayer`. Where it has `chunks_per_embedding`, neighbours in a row share one (`ColumnTrunk`).
        init, nonlinearity: at first the weights vary as He et al. would have them, by fan_in or fan_out, for "relu" or
            "linear", whatever the head that they share: `scale_l` sees to it.
        device, dtype: of the parameters.

    Call:
        `hypernet(context=None, context_ids=None)`: `{name: GeneratedWeight}`. The context is the argument, else the
        ambient `hyperkernels.context(z)`; z `[G, context_features]` generates G weights for each target.

    Its attributes `order` and `backend` are those of `hyper_linear`, for all targets.

    Memory: hidden for all chunks; of a conditional `TrunkLayer`, what contexts and chunks have apart.

    Raises:
        TypeError, ValueError: a target, size, chunk or name that is none; no context where one is needed, or one for a
            static hypernetwork; a trunk whose output does not fit.

    Example:
        >>> import torch, hyperkernels as hk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3))
        >>> net = hk.HyperNet(model, context_features=5, width=8, chunk=(8, 8))
        >>> weights = net(torch.randn(4, 5))
        >>> torch.func.functional_call(model, weights, torch.randn(4, 3, 9, 9)).shape  # four images, four networks
        torch.Size([4, 32, 5, 5])

    Source: Ha, Dai and Le 2016 (HyperNetworks); of the start, Chang et al. 2020 (hyperfan-in and hyperfan-out).
    """

    def __init__(
        self,
        targets: Mapping[str, Sequence[int]] | nn.Module,
        *,
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
        context_features: int | None = None,
        width: int = 32,
        chunk: tuple[int, int] | int | None = None,
        heads: str = "shared",
        head_bias: bool = False,
        embedding_features: int | None = None,
        trunk: nn.Module | None = None,
        init: str = "fan_in",
        nonlinearity: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        features = width if embedding_features is None else embedding_features
        check_sizes(width=width, embedding_features=features, context_features=context_features)
        for name, value, known in (
            ("heads", heads, HEADS),
            ("init", init, INITS),
            ("nonlinearity", nonlinearity, ("relu", "linear")),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(known)}")
        if trunk is not None and not isinstance(trunk, nn.Module):
            raise TypeError(f"trunk: got {type(trunk).__name__}, wanted a torch.nn.Module")
        shapes = _shapes(targets, filter_fn)
        variance = 2.0 if nonlinearity == "relu" else 1.0
        self.targets = {
            name: _target(name, shape, groups, chunk, width, init, variance) for name, (shape, groups) in shapes.items()
        }
        self.width, self.context_features = width, context_features
        self.order: str | None = None
        self.backend: str | None = None
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if trunk is None:
            trunk = TrunkLayer(width, features, context_features=context_features, **factory)
        self.trunk = trunk
        each = getattr(trunk, "chunks_per_embedding", 1)
        for name, target in self.targets.items():
            if target.grid.J % each:
                raise ValueError(f"trunk: {name!r} has {target.grid.J} columns of chunks, wanted a multiple of {each}")
        self.chunks = sum(target.chunks for target in self.targets.values())
        self.embedding = nn.Parameter(torch.empty(self.chunks // each, features, **factory))
        keys: dict[Any, int] = {}
        self.head_of: dict[str, int] = {}
        for name, target in self.targets.items():
            key = {"shared": None, "shape": target.chunk, "layer": name}[heads]
            self.head_of[name] = keys.setdefault(key, len(keys))
        sizes = [
            max(prod(t.chunk) for name, t in self.targets.items() if self.head_of[name] == head)
            for head in range(len(keys))
        ]
        self.heads = nn.ParameterList(torch.empty(width, size, **factory) for size in sizes)
        self.head_biases = nn.ParameterList(torch.empty(size, **factory) for size in sizes * head_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """New embeddings, and heads such that what they generate, before it is scaled, has unit variance; the trunk
        stays."""
        nn.init.normal_(self.embedding)
        std = (self.width * hidden_second_moment(self._hidden, self.context_features, self.embedding)).rsqrt()
        for head in self.heads:
            head.normal_().mul_(std.to(head.dtype))
        for bias in self.head_biases:
            bias.zero_()

    def _hidden(self, context: Tensor | None) -> Tensor | AdditiveHidden:
        hidden = self.trunk(self.embedding, context)
        count, m = self.chunks, self.width
        shape = tuple(hidden.shape)
        wanted = [(count, 1, m)] if isinstance(hidden, AdditiveHidden) else [(count, m)]
        if shape not in wanted and shape[1:] not in wanted:
            raise ValueError(f"trunk: got hidden {list(shape)}, wanted [{count}, {m}] or [G, {count}, {m}]")
        return hidden

    def forward(self, context: Tensor | None = None, context_ids: Tensor | None = None) -> dict[str, GeneratedWeight]:
        context, ambient_ids = find_context(context, self.context_features)
        ids = ambient_ids if context_ids is None else context_ids
        hidden = self._hidden(context)
        counts = [target.chunks for target in self.targets.values()]
        return {
            name: GeneratedWeight(
                _grid_of(part, target.grid),
                target.scale * self._view(self.heads, name, 1),
                target.shape,
                head_bias=target.scale * self._view(self.head_biases, name, 0) if len(self.head_biases) else None,
                context_ids=ids,
                order=self.order,
                backend=self.backend,
            )
            for (name, target), part in zip(self.targets.items(), _split(hidden, counts))
        }

    def _view(self, parameters: nn.ParameterList, name: str, dim: int) -> Tensor:
        """The numbers of its head that a target reads, in the shape of its chunk."""
        chunk = self.targets[name].chunk
        return parameters[self.head_of[name]].narrow(dim, 0, prod(chunk)).unflatten(dim, chunk)

    def extra_repr(self) -> str:
        own, made = sum(p.numel() for p in self.parameters()), sum(prod(t.shape) for t in self.targets.values())
        context = "static" if self.context_features is None else f"context_features={self.context_features}"
        return f"targets={len(self.targets)}, width={self.width}, {context}, {own:,} parameters for {made:,} weights"


def _shapes(
    targets: Mapping[str, Sequence[int]] | nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Of each target, and in how many groups of rows it is applied."""
    if isinstance(targets, nn.Module):
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        layers: dict[str, Any] = {name: m for name, m in targets.named_modules() if isinstance(m, kinds)}
        chosen = {name: m for name, m in layers.items() if filter_fn is None or filter_fn(m, name)}
        found: dict[str, Any] = {f"{name}.weight".lstrip("."): tuple(m.weight.shape) for name, m in chosen.items()}
        groups = {f"{name}.weight".lstrip("."): getattr(m, "groups", 1) for name, m in chosen.items()}
    elif isinstance(targets, Mapping):
        found, groups = dict(targets), {}
    else:
        raise TypeError(f"targets: got {type(targets).__name__}, wanted {{name: shape}} or a torch.nn.Module")
    if not found:
        raise ValueError("targets: got none, wanted at least one weight")
    for name, shape in found.items():
        fits = isinstance(shape, Sequence) and 1 <= len(shape) <= 5 and all(isinstance(n, int) and n > 0 for n in shape)
        if not fits:
            raise ValueError(f"targets: got {shape!r} for {name!r}, wanted one to five positive integers")
    return {name: (tuple(shape), groups.get(name, 1)) for name, shape in found.items()}


def _target(
    name: str,
    shape: tuple[int, ...],
    groups: int,
    chunk: tuple[int, int] | int | None,
    width: int,
    init: str,
    variance: float,
) -> Target:
    N, K, *kernel = shape if len(shape) > 1 else (*shape, 1)
    own = N // groups
    positions = prod(kernel)
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
    fan = (K if init == "fan_in" else N) * positions
    return Target(shape, Grid(N, K, rows, cols), tuple(kernel), (variance / fan) ** 0.5)


def _split(hidden: Tensor | AdditiveHidden, counts: list[int]) -> list[Tensor | AdditiveHidden]:
    if isinstance(hidden, AdditiveHidden):
        return [AdditiveHidden(hidden.context, part, hidden.activation) for part in hidden.chunks.split(counts)]
    return list(hidden.split(counts, -2))


def _grid_of(hidden: Tensor | AdditiveHidden, grid: Grid) -> Tensor | AdditiveHidden:
    if isinstance(hidden, AdditiveHidden):
        chunks = hidden.chunks.reshape(grid.I, grid.J, -1)
        return AdditiveHidden(hidden.context, chunks, hidden.activation)
    return hidden.unflatten(-2, (grid.I, grid.J))
