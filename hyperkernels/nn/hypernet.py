"""`HyperNet`: one hypernetwork for many weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hyperkernels.chunking import Grid, ceil_div
from hyperkernels.flat import FlatWeight
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.nn.ambient import find_context
from hyperkernels.nn.encoders import Descriptors
from hyperkernels.nn.layer import hidden_second_moment
from hyperkernels.nn.targets import COMPONENTS, STRATEGIES, Chunk, Found, Target, cut, find_targets, start_scales
from hyperkernels.nn.trunk import TrunkLayer, check_sizes
from hyperkernels.weight import AbsentWeight, GeneratedWeight

Targets = Mapping[str, Sequence[int]] | nn.Module
CHOICES = {
    "strategy": STRATEGIES,
    "component": COMPONENTS,
    "layout": ("tiles", "flat"),
    "heads": (None, "shared", "shape", "layer"),
    "init": ("fan_in", "fan_out"),
    "nonlinearity": ("relu", "linear"),
}


class HyperNet(nn.Module):
    """One hypernetwork for many weights: `hidden = trunk(embedding, z)` for every chunk of all of them, and of target l
    `W_l[i*rows+r, j*cols+q, *s] = scale_l * (sum_k hidden[i,j,k] head[k,r,q,*s] (+ head_bias[r,q,*s]))`.

    What comes back are `GeneratedWeight`s: weights of the right shapes that are never formed.

    Args:
        targets: what to generate: `{name: shape}`, or a module, whose targets are the weights of its `nn.Linear` and
            `nn.Conv`s (`{name + ".weight": shape}`). A shape is `(N, K)`, `(out, in / groups, *kernel)` or `(N,)`.
        filter_fn, biases: of a module, `filter_fn(layer, name)` is True for a layer to generate, all by default; and
            whether its bias is generated too.
        context_features: size of the context z; None makes the hypernetwork static.
        encoder: a module that makes z of what the hypernetwork is called with: `Tasks` of task numbers, `Noise` of a
            count, any network of data. By default z comes as it is.
        width: m, of the trunk's output.
        strategy: "chunk"; "once", all of a weight by a head of its own; "multi_head", chunks with a head each;
            "component", a chunk for each `component`.
        component: "row", an output neuron or channel; "column", an input one; "layer", a whole weight.
        layout: "tiles", chunks of `rows x cols` of one weight; "flat", of one vector of all weights one after another,
            wherever they fall: `FlatWeight`, which is slower.
        chunk: `(rows, cols)` for all targets, or less where a target, or a group of a convolution's channels, is
            smaller; or a number, the most numbers that a chunk may have: each target is then cut as is cheapest for
            it. None leaves also that to each. With the layout "flat" a number, of exactly so many.
        heads: "shared", one head for all targets, of which each reads as many numbers as its chunks have, in their
            shape; "shape", one for each shape of chunk; "layer", one for each target. Shared by default; with "once"
            and "multi_head", one for each.
        head_bias: whether the heads have one, the same for all chunks.
        embedding_features: size of a chunk's learned embedding; `width` by default.
        descriptors: whether embeddings are computed from what and where a chunk is, and not learned: then `targets` may
            differ from call to call, in depth and widths.
        trunk: any module, called as `trunk(embedding [C, e], z)`, with all C chunks of all targets and z `[G,
            context_features]` or None, that returns hidden `[C, m]`, `[G, C, m]` or `AdditiveHidden` `[G, C, 1, m]`. By
            default a `TrunkLayer`. Where it has `chunks_per_embedding`, neighbours in a row share one (`ColumnTrunk`).
        init, nonlinearity: at first the weights vary as Chang et al. would have them, by "fan_in" or "fan_out", for
            "relu" or "linear", whatever the head that they share: `scale_l` sees to it (`targets.start_scales`).
        device, dtype: of the parameters.

    Call:
        `hypernet(context=None, context_ids=None, targets=None)`: `{name: weight}`. The context is the argument, else
        the ambient `hyperkernels.context(z)`; z `[G, context_features]` generates G weights for each target.

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
        targets: Targets,
        *,
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
        biases: bool = False,
        context_features: int | None = None,
        encoder: nn.Module | None = None,
        width: int = 32,
        strategy: str = "chunk",
        component: str = "row",
        layout: str = "tiles",
        chunk: Chunk = None,
        heads: str | None = None,
        head_bias: bool = False,
        embedding_features: int | None = None,
        descriptors: bool = False,
        trunk: nn.Module | None = None,
        init: str = "fan_in",
        nonlinearity: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        features = width if embedding_features is None else embedding_features
        check_sizes(width=width, embedding_features=features, context_features=context_features)
        given = {"strategy": strategy, "component": component, "layout": layout, "heads": heads}
        for name, value in (given | {"init": init, "nonlinearity": nonlinearity}).items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(str, CHOICES[name]))}")
        for name, module in (("trunk", trunk), ("encoder", encoder)):
            if module is not None and not isinstance(module, nn.Module):
                raise TypeError(f"{name}: got {type(module).__name__}, wanted a torch.nn.Module")
        if encoder is not None and context_features is None:
            raise ValueError("encoder: got one, wanted context_features, the size of what it makes")
        flat = layout == "flat"
        plain = strategy == "chunk" and isinstance(chunk, int) and heads in (None, "shared") and not descriptors
        if flat and not plain:
            raise ValueError('layout: got "flat", wanted with it a number as chunk, one shared head, no descriptors')
        self.width, self.context_features, self.flat = width, context_features, flat
        self.order: str | None = None
        self.backend: str | None = None
        self._settings = (chunk, width, strategy, component)
        self._start = (init, nonlinearity)
        self.targets = self._cut(find_targets(targets, filter_fn, biases))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if trunk is None:
            trunk = TrunkLayer(width, features, context_features=context_features, **factory)
        self.trunk, self.encoder = trunk, encoder
        self.embedding = None if descriptors else nn.Parameter(torch.empty(self._embeddings(), features, **factory))
        self.descriptors = Descriptors(features, **factory) if descriptors else None
        self.head_of, sizes = self._heads(heads or ("layer" if strategy in ("once", "multi_head") else "shared"))
        self.heads = nn.ParameterList(torch.empty(*lead, width, size, **factory) for *lead, size in sizes)
        self.head_biases = nn.ParameterList(torch.empty(size, **factory) for size in sizes * head_bias)
        self._head_scales = [1.0] * len(sizes) if flat or descriptors else self._scales_into_heads()
        self.reset_parameters()

    def _cut(self, found: dict[str, Found]) -> dict[str, Target]:
        scales = start_scales(found, *self._start)
        settings = (None, *self._settings[1:]) if self.flat else self._settings
        return {name: cut(name, own, *settings, scales[name]) for name, own in found.items()}

    def _chunks(self, targets: dict[str, Target]) -> int:
        if self.flat:
            return ceil_div(sum(target.numbers for target in targets.values()), self._settings[0])  # type: ignore[operator]
        return sum(target.chunks for target in targets.values())

    def _embeddings(self) -> int:
        """One for each chunk; of a trunk that has neighbours in a row share one, fewer."""
        each = getattr(self.trunk, "chunks_per_embedding", 1)
        for name, target in self.targets.items():
            if target.grid.J % each:
                raise ValueError(f"trunk: {name!r} has {target.grid.J} columns of chunks, wanted a multiple of {each}")
        return self._chunks(self.targets) // each

    def _heads(self, heads: str) -> tuple[dict[str, int], list[tuple[int, ...]]]:
        """Which head each target reads, and the sizes of the heads: of a head for each chunk, how many, first."""
        if self.flat:
            return dict.fromkeys(self.targets, 0), [(self._settings[0],)]  # type: ignore[list-item]
        keys: dict[Any, int] = {}
        head_of = {}
        for name, target in self.targets.items():
            key = name if self._settings[2] == "multi_head" else {"shape": target.chunk, "layer": name}.get(heads)
            head_of[name] = keys.setdefault(key, len(keys))
        sizes: list[tuple[int, ...]] = [()] * len(keys)
        for name, target in self.targets.items():
            lead = (target.chunks,) if self._settings[2] == "multi_head" else ()
            sizes[head_of[name]] = max(sizes[head_of[name]], (*lead, prod(target.chunk)))
        return head_of, sizes

    def _scales_into_heads(self) -> list[float]:
        """Of a head whose targets have one scale, which starts with it: a large head of one target is not multiplied in
        every call."""
        scales: list[set[float]] = [set() for _ in self.heads]
        for name, target in self.targets.items():
            scales[self.head_of[name]].add(target.scale)
        own = [found.pop() if len(found) == 1 else 1.0 for found in scales]
        for name, target in self.targets.items():
            if own[self.head_of[name]] == target.scale:
                self.targets[name] = target._replace(scale=1.0)
        return own

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """New embeddings, and heads such that what they generate, before it is scaled, has unit variance, or the one of
        their only target; the trunk and the encoder stay."""
        if self.embedding is not None:
            nn.init.normal_(self.embedding)

        def hidden(context: Tensor | None) -> Tensor | AdditiveHidden:
            return self._hidden(self.targets, context)

        std = (self.width * hidden_second_moment(hidden, self.context_features, self.heads[0])).rsqrt()
        for head, scale in zip(self.heads, self._head_scales):
            head.normal_().mul_(scale * std.to(head.dtype))
        for bias in self.head_biases:
            bias.zero_()

    def _hidden(self, targets: dict[str, Target], context: Tensor | None) -> Tensor | AdditiveHidden:
        embedding = self.embedding if self.descriptors is None else self.descriptors(targets.values())
        hidden = self.trunk(embedding, context)
        count, m = self._chunks(targets), self.width
        shape = tuple(hidden.shape)
        wanted = [(count, 1, m)] if isinstance(hidden, AdditiveHidden) else [(count, m)]
        if shape not in wanted and shape[1:] not in wanted:
            raise ValueError(f"trunk: got hidden {list(shape)}, wanted [{count}, {m}] or [G, {count}, {m}]")
        return hidden

    def forward(
        self, context: Any = None, context_ids: Tensor | None = None, *, targets: Targets | None = None
    ) -> dict[str, AbsentWeight]:
        if self.encoder is not None and context is not None:
            context = self.encoder(*context) if isinstance(context, tuple) else self.encoder(context)
        context, ambient_ids = find_context(context, self.context_features)
        cuts = self.targets if targets is None else self._other(targets)
        hidden = self._hidden(cuts, context)
        ids = ambient_ids if context_ids is None else context_ids
        if self.flat:
            return self._flat_weights(hidden, ids)
        parts = _split(hidden, [target.chunks for target in cuts.values()])
        read: dict[Any, list[Tensor]] = {}
        weights: dict[str, AbsentWeight] = {}
        for (name, target), part in zip(cuts.items(), parts):
            n, chunk = self.head_of.get(name, 0), target.chunk
            if (n, chunk) not in read:
                read[n, chunk] = self._read(n, chunk)
            head, *bias = read[n, chunk]
            given: dict[str, Any] = {"scale": target.scale, "order": self.order, "backend": self.backend}
            given |= {"head_bias": bias[0] if bias else None, "context_ids": ids}
            weights[name] = GeneratedWeight(_grid_of(part, target.grid), head, target.shape, **given)
        return weights

    def _read(self, n: int, chunk: tuple[int, ...]) -> list[Tensor]:
        """Of head n, and its bias, as many numbers as the chunk has, in its shape."""
        both = (self.heads, self.head_biases)
        return [part[n].narrow(-1, 0, prod(chunk)).unflatten(-1, chunk) for part in both if len(part)]

    def _other(self, targets: Targets) -> dict[str, Target]:
        if self.descriptors is None or len(self.heads) > 1:
            raise ValueError("targets: got others than at the start, wanted descriptors=True and one head for that")
        cuts = self._cut(find_targets(targets))
        for name, target in cuts.items():
            if prod(target.chunk) > self.heads[0].shape[-1]:
                got, most = prod(target.chunk), self.heads[0].shape[-1]
                raise ValueError(f"targets: got a chunk of {got} numbers in {name!r}, wanted at most the head's {most}")
        return cuts

    def _flat_weights(self, hidden: Tensor | AdditiveHidden, ids: Tensor | None) -> dict[str, AbsentWeight]:
        weights: dict[str, AbsentWeight] = {}
        start, bias = 0, self.head_biases[0] if len(self.head_biases) else None
        for name, target in self.targets.items():
            given: dict[str, Any] = {"head_bias": bias, "scale": target.scale, "context_ids": ids}
            weights[name] = FlatWeight(hidden, self.heads[0], target.shape, start, **given)
            start += target.numbers
        return weights

    def extra_repr(self) -> str:
        own, made = sum(p.numel() for p in self.parameters()), sum(t.numbers for t in self.targets.values())
        context = "static" if self.context_features is None else f"context_features={self.context_features}"
        return f"targets={len(self.targets)}, width={self.width}, {context}, {own:,} parameters for {made:,} weights"


def _split(hidden: Tensor | AdditiveHidden, counts: list[int]) -> list[Tensor | AdditiveHidden]:
    if isinstance(hidden, AdditiveHidden):
        return [AdditiveHidden(hidden.context, part, hidden.activation) for part in hidden.chunks.split(counts)]
    return list(hidden.split(counts, -2))


def _grid_of(hidden: Tensor | AdditiveHidden, grid: Grid) -> Tensor | AdditiveHidden:
    if isinstance(hidden, AdditiveHidden):
        chunks = hidden.chunks.reshape(grid.I, grid.J, -1)
        return AdditiveHidden(hidden.context, chunks, hidden.activation)
    return hidden.unflatten(-2, (grid.I, grid.J))
