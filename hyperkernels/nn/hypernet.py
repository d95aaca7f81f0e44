"""`HyperNet`: one hypernetwork for many weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hyperkernels.chunking import ceil_div, check_sizes
from hyperkernels.flat import FlatWeight
from hyperkernels.form import autocast_enabled
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.nn.ambient import current_context, find_context
from hyperkernels.nn.encoders import Descriptors
from hyperkernels.nn.loading import LoadsWhole
from hyperkernels.nn.start import in_evaluation, moments, normal_contexts, start_heads_, start_scales
from hyperkernels.nn.targets import (
    Chunk,
    Found,
    Target,
    check_choices,
    check_flags,
    check_settings,
    count_chunks,
    cut,
    find_targets,
    share_heads,
    split_chunks,
)
from hyperkernels.nn.trunk import TrunkLayer, check_parts
from hyperkernels.watched import transformed
from hyperkernels.weight import AbsentWeight, GeneratedWeight

Targets = Mapping[str, Sequence[int]] | nn.Module


class HyperNet(LoadsWhole):
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
            "relu" or "linear", on the mean over contexts, whatever the head that they share and whatever the trunk
            makes for each: `scale_l`, measured at the start (`reset_parameters`) and kept as the buffer `scales`, sees
            to it (of a target alone on its head the head has it). Where a trunk makes more of some contexts than of
            others, as layers of relu do, theirs vary more, and in a deep target their activations grow by orders. A
            head that chunks share starts small along what the chunks of a row or column have in common: that would
            repeat all over a weight, and activations grow by it from layer to layer, right as each variance is.
        device, dtype: of the parameters.

    Call:
        `hypernet(context=None, context_ids=None, targets=None, members=None)`: `{name: weight}`. The context is the
        argument, else the ambient `hyperkernels.context(z)`; z `[G, context_features]` generates G weights for each
        target. A static hypernetwork generates an ensemble of `members`, each by a mask of its own, where its trunk has
        dropout and is in training mode (`hypernet.trunk.train()`).

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
        if width is None:
            raise TypeError("width: got None, wanted a positive integer")
        check_sizes(width=width, embedding_features=features, context_features=context_features)
        check_choices(strategy=strategy, component=component, layout=layout, heads=heads)
        check_choices(init=init, nonlinearity=nonlinearity)
        check_parts(trunk, encoder, context_features)
        check_flags(biases=biases, head_bias=head_bias, descriptors=descriptors)
        check_settings(strategy, component, layout, chunk, heads, descriptors)
        self.width, self.context_features, self.flat = width, context_features, layout == "flat"
        self.order: str | None = None
        self.backend: str | None = None
        self._settings, self._start = (chunk, width, strategy, component), (init, nonlinearity)
        self._choice: Any = (filter_fn, biases) if descriptors else ()  # of the layers of another module
        found = find_targets(targets, filter_fn, biases, layout)
        self._starts, self.targets = start_scales(found, init, nonlinearity), self._cut(found, chunk)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._owns_trunk = trunk is None
        if trunk is None:
            trunk = TrunkLayer(width, features, context_features=context_features, **factory)
        self.trunk, self.encoder = trunk, encoder
        self.embedding = None if descriptors else nn.Parameter(torch.empty(self._embeddings(), features, **factory))
        self.descriptors = Descriptors(features, **factory) if descriptors else None
        whole: Any = (chunk,) if self.flat else None
        self.head_of, sizes = share_heads(self.targets, strategy, heads, whole)
        self.heads = nn.ParameterList(torch.empty(*lead, width, size, **factory) for *lead, size in sizes)
        self.head_biases = nn.ParameterList(torch.empty(size, **factory) for size in sizes * head_bias)
        owners = list(self.head_of.values())
        self.scales: Tensor | None
        self._alone = {name for name, n in self.head_of.items() if owners.count(n) == 1 and not descriptors}
        self.register_buffer("scales", None if descriptors else torch.ones(len(owners), device=device, dtype=dtype))
        self.reset_parameters()

    def _cut(self, found: dict[str, Found], chunk: Chunk) -> dict[str, Target]:
        settings = (None if self.flat else chunk, *self._settings[1:])
        return {name: cut(name, own, *settings) for name, own in found.items()}

    def _chunks(self, targets: dict[str, Target]) -> dict[str, slice]:
        """Which chunks are each target's; in the flat layout those that it has a part in."""
        found, start = {}, 0
        for name, target in targets.items():
            size, own = (self._settings[0], target.numbers) if self.flat else (1, target.chunks)
            found[name] = slice(start // size, ceil_div(start + own, size))  # type: ignore[operator, arg-type]
            start += own
        return found

    def _embeddings(self) -> int:
        """One for each chunk; of a trunk that has neighbours in a row share one, fewer."""
        each = getattr(self.trunk, "chunks_per_embedding", 1)
        for name, target in self.targets.items():
            if target.grid.J % each:
                raise ValueError(f"trunk: {name!r} has {target.grid.J} columns of chunks, wanted a multiple of {each}")
        return count_chunks(self._chunks(self.targets)) // each

    @torch.no_grad()
    def reset_parameters(self, context: Any = None) -> None:
        """New embeddings and heads, such that each target starts with its variance; the net's own trunk too, but one
        that was passed in, and the encoder, stay.

        Args:
            context: what the hypernetwork will be called with, a few: by these the trunk's output is measured, as in
                evaluation. By default the `examples()` of the encoder, as `Tasks` has them, else standard normal z.
        """
        if self._owns_trunk:
            self.trunk.reset_parameters()  # type: ignore[operator]
        if self.descriptors is not None:
            self.descriptors.reset_parameters()
        if self.embedding is not None:
            nn.init.normal_(self.embedding)
        for bias in self.head_biases:
            bias.zero_()
        own, targets = self._chunks(self.targets).values(), self.targets.values()
        parts = [(c, c.stop - c.start if self.flat else target.grid.J) for c, target in zip(own, targets)]
        with in_evaluation(self):
            found = moments(lambda z: self._hidden(self.targets, z), self._examples(context), parts)
        start_heads_(list(self.heads), self.scales, list(self.head_of.values()), list(self._starts.values()), found)

    def _examples(self, context: Any) -> Tensor | None:
        examples: Any = getattr(self.encoder, "examples", None)
        if context is None and examples is None:
            return normal_contexts(self.context_features, self.width, self.heads[0])
        return examples() if context is None else self._context(context)[0]

    def _context(self, context: Any) -> tuple[Tensor | None, Tensor | None]:
        """z and the ids that came with it, of what the hypernetwork is called with."""
        if self.encoder is not None and context is not None:
            context = self.encoder(*context) if isinstance(context, tuple) else self.encoder(context)
        elif self.encoder is not None and current_context()[0] is None:
            raise ValueError(
                f"context: got none, wanted what {type(self.encoder).__name__} makes z of, or z by "
                "`with hyperkernels.context(z):`"
            )
        z, ids = find_context(context, self.context_features)
        own = self.heads[0].dtype
        if z is not None and z.dtype != own and not autocast_enabled(z.device.type):
            raise TypeError(f"context: got {z.dtype}, wanted the hypernetwork's dtype {own}")
        return z, ids

    def _hidden(self, targets: dict[str, Target], context: Tensor | None) -> Tensor | AdditiveHidden:
        embedding = self.embedding if self.descriptors is None else self.descriptors(targets.values())
        hidden = self.trunk(embedding, context)
        if not isinstance(hidden, (Tensor, AdditiveHidden)):
            raise TypeError(f"trunk: got {type(hidden).__name__}, wanted hidden as a tensor or as AdditiveHidden")
        count, m = count_chunks(self._chunks(targets)), self.width
        shape = tuple(hidden.shape)
        wanted = [(count, 1, m)] if isinstance(hidden, AdditiveHidden) else [(count, m)]
        if shape not in wanted and shape[1:] not in wanted:
            raise ValueError(f"trunk: got hidden {list(shape)}, wanted [{count}, {m}] or [G, {count}, {m}]")
        return hidden

    def forward(
        self,
        context: Any = None,
        context_ids: Tensor | None = None,
        *,
        targets: Targets | None = None,
        members: int | None = None,
    ) -> dict[str, AbsentWeight]:
        z, ambient_ids = self._context(context)
        cuts, scales = (self.targets, self._own_scales()) if targets is None else self._other(targets)
        if members is None:
            hidden = self._hidden(cuts, z)
        else:
            check_sizes(members=members)
            if self.context_features is not None:
                raise ValueError("members: got a number, wanted a context for each: this hypernetwork is conditional")
            hidden = torch.stack([self._hidden(cuts, None) for _ in range(members)])  # type: ignore[arg-type]
            if members > 1 and not transformed() and bool((hidden == hidden[0]).all()):
                raise ValueError(f"members: got {members} all alike, wanted a trunk with dropout, in training mode")
        ids = ambient_ids if context_ids is None else context_ids
        if self.flat:
            return self._flat_weights(hidden, ids, scales)
        parts = split_chunks(hidden, cuts.values())
        read: dict[Any, list[Tensor]] = {}
        weights: dict[str, AbsentWeight] = {}
        for (name, target), part in zip(cuts.items(), parts):
            n, chunk = self.head_of.get(name, 0), target.chunk
            if (n, chunk) not in read:
                read[n, chunk] = self._read(n, chunk)
            head, *bias = read[n, chunk]
            given: dict[str, Any] = {"scale": scales[name], "order": self.order, "backend": self.backend}
            given |= {"head_bias": bias[0] if bias else None, "context_ids": ids}
            weights[name] = GeneratedWeight(part, head, target.shape, **given)
        return weights

    def _read(self, n: int, chunk: tuple[int, ...]) -> list[Tensor]:
        """Of head n, and its bias, as many numbers as the chunk has, in its shape."""
        both = (self.heads, self.head_biases)
        return [part[n].narrow(-1, 0, prod(chunk)).unflatten(-1, chunk) for part in both if len(part)]

    def _own_scales(self) -> dict[str, Any]:
        """A large head of one target has its scale in it, and is not multiplied in every call."""
        if self.scales is None:
            return self._starts
        return {n: 1.0 if n in self._alone else scale for n, scale in zip(self.targets, self.scales.unbind())}

    def _other(self, targets: Targets) -> tuple[dict[str, Target], dict[str, float]]:
        if self.descriptors is None or len(self.heads) > 1:
            raise ValueError("targets: got others than at the start, wanted descriptors=True and one head for that")
        found = find_targets(targets, *(self._choice if isinstance(targets, nn.Module) else ()))
        chunk, most = self._settings[0], self.heads[0].shape[-1]
        free = self._settings[2] == "chunk" and not isinstance(chunk, (tuple, list))
        cuts = self._cut(found, most if free else chunk)
        for name, target in cuts.items():
            if prod(target.chunk) > most:
                got = prod(target.chunk)
                raise ValueError(f"targets: got a chunk of {got} numbers in {name!r}, wanted at most the head's {most}")
        return cuts, start_scales(found, *self._start)

    def _flat_weights(
        self, hidden: Tensor | AdditiveHidden, ids: Tensor | None, scales: dict[str, Any]
    ) -> dict[str, AbsentWeight]:
        for name in ("order", "backend"):
            if getattr(self, name) is not None:
                raise ValueError(f'{name}: got {getattr(self, name)!r}, wanted None: the layout "flat" has but one')
        weights: dict[str, AbsentWeight] = {}
        start, bias = 0, self.head_biases[0] if len(self.head_biases) else None
        for name, target in self.targets.items():
            given: dict[str, Any] = {"head_bias": bias, "scale": scales[name], "context_ids": ids}
            weights[name] = FlatWeight(hidden, self.heads[0], target.shape, start, **given)
            start += target.numbers
        return weights

    def extra_repr(self) -> str:
        own, made = sum(p.numel() for p in self.parameters()), sum(t.numbers for t in self.targets.values())
        context = "static" if self.context_features is None else f"context_features={self.context_features}"
        return f"targets={len(self.targets)}, width={self.width}, {context}, {own:,} parameters for {made:,} weights"
