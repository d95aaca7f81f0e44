"""What every hyper layer is: a hypernetwork, a head, a bias, and where the context comes from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hyperkernels.chunking import Grid, check_sizes
from hyperkernels.deferred import DeferredWeight
from hyperkernels.fitting import fit
from hyperkernels.form import autocast_enabled
from hyperkernels.functional import generate_weight, hyper_linear
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.nn.ambient import find_context
from hyperkernels.nn.start import draw_head_, in_evaluation, moments, normal_contexts
from hyperkernels.nn.trunk import FreeTrunk, Trunk
from hyperkernels.weight import GeneratedWeight

Hidden = Tensor | AdditiveHidden


class HyperLayer(nn.Module):
    """A layer whose weight `[N, K, *kernel]` is generated chunk by chunk, and applied by `function` without being
    formed; `to_dense` alone forms it."""

    function: Callable[..., Tensor]
    dense: Any  # the class of the layer that this one stands for
    fit_error: float | None = None  # of one that was fitted to a dense layer, `||W - W_dense|| / ||W_dense||`

    def __init__(
        self,
        grid: Grid,
        kernel: tuple[int, ...],
        bias: bool | str,
        context_features: int | None,
        width: int,
        hypernet: nn.Module | None,
        factory: dict[str, Any],
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(width=width)
        dtype = factory.get("dtype")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: got {dtype}, wanted a floating one")
        if not (isinstance(bias, bool) or (isinstance(bias, str) and bias == "generated")):
            raise ValueError(f'bias: got {bias!r}, wanted True, False or "generated"')
        if hypernet is not None and not isinstance(hypernet, nn.Module):
            raise TypeError(f"hypernet: got {type(hypernet).__name__}, wanted a torch.nn.Module")
        self.grid, self.kernel = grid, kernel
        self.width, self.context_features = width, context_features
        self.order: str | None = None
        self.backend: str | None = None
        generated = bias == "generated"
        self._owns_hypernet = hypernet is None
        if hypernet is None:
            chunks = grid.I, grid.J + generated
            if context_features is None:  # what a trunk would make of an embedding as wide as hidden, an embedding is
                hypernet = FreeTrunk(chunks, width, **factory)
            else:
                hypernet = Trunk(chunks, width, context_features=context_features, **factory)
        self.hypernet = hypernet
        self.head = nn.Parameter(torch.empty(width, grid.rows, grid.cols, *kernel, **factory))
        self.bias_head = nn.Parameter(torch.empty(width, grid.rows, 1, **factory)) if generated else None
        outputs = grid.out_features if outputs is None else outputs
        self.bias = nn.Parameter(torch.empty(outputs, **factory)) if bias is True else None
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """The head, of more dimensions than an image's kernel, has no part in a change of memory format."""
        shape = self.head.shape

        def own(value: Tensor) -> Tensor:
            return fn(value.flatten()).view(shape) if value.shape == shape and value.dim() > 3 else fn(value)

        return super()._apply(own, recurse)

    @property
    def chunk(self) -> tuple[int, int]:
        return self.grid.rows, self.grid.cols

    @property
    def fan_in(self) -> int:
        return self.grid.in_features * prod(self.kernel)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A new trunk (the layer's own; one that was passed in stays), and heads and bias as a dense layer's vary."""
        if self._owns_hypernet:
            self.hypernet.reset_parameters()  # type: ignore[operator]
        contexts = normal_contexts(self.context_features, self.width, self.head)
        columns = self.grid.J + (self.bias_head is not None)

        def checked(z: Tensor | None) -> Hidden:
            hidden, wanted = self.hypernet(z), (self.grid.I, columns, self.width)
            if not isinstance(hidden, (Tensor, AdditiveHidden)):
                made = f"a {type(self.hypernet).__name__}, which makes a {type(hidden).__name__}"
                raise TypeError(f"hypernet: got {made}, wanted what makes hidden, a tensor or AdditiveHidden")
            if tuple(hidden.shape[-3:]) != wanted:
                raise ValueError(
                    f"hypernet: got hidden {list(hidden.shape)}, wanted {list(wanted)} or [G, *{list(wanted)}]"
                )
            return hidden

        with in_evaluation(self.hypernet):
            found = moments(checked, contexts, [(slice(None), columns)])
        for head in (self.head, self.bias_head):
            if head is not None:
                drawn = torch.empty_like(head, memory_format=torch.contiguous_format)
                (variance,) = draw_head_(drawn.view(len(head), -1), found)
                head.copy_(drawn * (3 * self.fan_in * variance).rsqrt())
        if self.bias is not None:
            bound = self.fan_in**-0.5
            self.bias.uniform_(-bound, bound)

    def hidden(self, context: Tensor | None = None) -> tuple[Hidden, Tensor | None]:
        """`(hidden, context_ids)` for a context: the argument, else the ambient one, else none (a static layer)."""
        context, context_ids = find_context(context, self.context_features)
        if context is not None:
            self._check_dtype("context", context)
        return self.hypernet(context), context_ids

    def _check_dtype(self, name: str, value: Tensor) -> None:
        if value.dtype != self.head.dtype and not autocast_enabled(value.device.type):
            raise TypeError(f"{name}: got {value.dtype}, wanted the layer's dtype {self.head.dtype}")

    def arguments(
        self, x: Tensor, context: Tensor | None = None, context_ids: Tensor | None = None, **more: Any
    ) -> dict[str, Any]:
        """The arguments of `function` that a call of the layer comes to, and `more`."""
        head = self.head
        if x.dtype != head.dtype:
            self._check_dtype("x", x)
        hidden, ambient_ids = self.hidden(context)
        weight_hidden, bias = self._split_bias(hidden)
        ids = ambient_ids if context_ids is None else context_ids
        given = {"x": x, "hidden": weight_hidden, "head": head, "bias": bias, "context_ids": ids}
        return {**given, "order": self.order, "backend": self.backend, **more}

    def forward(self, x: Tensor, context: Tensor | None = None, context_ids: Tensor | None = None) -> Tensor:
        return type(self).function(**self.arguments(x, context, context_ids))

    def _split_bias(self, hidden: Hidden) -> tuple[Hidden, Tensor | None]:
        """The weight's chunks, and the bias: the last column of chunks through its own head, where it is generated."""
        if self.bias_head is None:
            return hidden, self.bias
        J = self.grid.J
        if isinstance(hidden, AdditiveHidden):
            weight, last = hidden.with_chunks(hidden.chunks[:, :J]), hidden.with_chunks(hidden.chunks[:, J:])
        else:
            weight, last = hidden[..., :J, :], hidden[..., J:, :]
        contexts = _contexts(hidden)
        ones = self.bias_head.new_ones((contexts, 1) if contexts != 1 else (1,))
        return weight, hyper_linear(ones, last, self.bias_head, out_features=self.grid.out_features)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise AttributeError(
                f"weight: {type(self).__name__} generates it, and no parameter can take its place: generate that one "
                "(`from_dense`), or put a dense layer here (`hyperkernels.merge_`)"
            )
        super().register_parameter(name, param)

    @property
    def weight(self) -> Tensor:
        """W `[N, K, *kernel]`, which is not there, for code that reads a layer's weight: a `GeneratedWeight` of the
        ambient context, to whoever computes with it."""
        shape = (self.grid.out_features, self.grid.in_features, *self.kernel)

        def made() -> GeneratedWeight:
            hidden, ids = self.hidden()
            given: dict[str, Any] = {"context_ids": ids, "order": self.order, "backend": self.backend}
            return GeneratedWeight(self._split_bias(hidden)[0], self.head, shape, **given)

        return made() if torch.compiler.is_compiling() else DeferredWeight(self.head, shape, made)

    @classmethod
    def from_dense(
        cls,
        dense: Any,
        *,
        chunk: tuple[int, int] | None = None,
        width: int = 32,
        context_features: int | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """A layer that generates the weight of `dense` as well as its chunks and width allow, in closed form (`fit`),
        and has its bias. Its trunk is a `FreeTrunk`; `layer.fit_error` is `||W - W_dense|| / ||W_dense||`.

        Args:
            dense: the layer that this one stands for; its dtype and mode are kept.
            device: of the layer, dense's by default; on "meta" nothing is fitted.
            chunk, width, context_features: as of the layer. A context changes nothing until it has learned to.

        Raises:
            TypeError, ValueError: dense is another kind of layer, or as the layer's constructor and `fit`.

        Example:
            >>> import torch, hyperkernels as hk
            >>> layer = hk.HyperConv2d.from_dense(torch.nn.Conv2d(8, 16, 3), chunk=(4, 4), width=8)
            >>> layer.fit_error < 1e-5  # as many singular values as there are
            True
        """
        if not (isinstance(dense, cls.dense) or (cls.dense is nn.Linear and type(dense).__name__ == "Conv1D")):
            raise TypeError(f"dense: got {type(dense).__name__}, wanted a {cls.dense.__name__}")
        weight, build = weight_of(dense), partial(cls, **cls._sizes_of(dense))
        factory: dict[str, Any] = {"device": weight.device if device is None else device, "dtype": weight.dtype}
        given = {"bias": dense.bias is not None, "context_features": context_features, "width": width}
        grid = build(**given, chunk=chunk, device="meta").grid
        trunk = FreeTrunk((grid.I, grid.J), width, context_features=context_features, **factory)
        layer = build(**given, chunk=(grid.rows, grid.cols), hypernet=trunk, **factory)
        layer.dense = type(dense)
        if not layer.head.is_meta:
            hidden, head, layer.fit_error = fit(weight, (grid.rows, grid.cols), width)
            with torch.no_grad():
                trunk.chunks.copy_(hidden)
                layer.head.copy_(head)
                if layer.bias is not None:
                    layer.bias.copy_(dense.bias)
        return layer.train(dense.training)

    @classmethod
    def _sizes_of(cls, dense: Any) -> dict[str, Any]:
        """The arguments of this class, but bias, device and dtype, that `dense` was built with."""
        raise NotImplementedError

    @torch.no_grad()
    def to_dense(self, context: Tensor | None = None) -> Any:
        """The dense layer that this one is, for one context: its weight formed, and trainable."""
        hidden, _ = self.hidden(context)
        contexts = _contexts(hidden)
        if contexts != 1:
            raise ValueError(f"context: got {contexts} contexts, wanted one: a dense layer has one weight")
        weight_hidden, bias = self._split_bias(hidden)
        shape = (self.grid.out_features, self.grid.in_features, *self.kernel)
        weight = generate_weight(weight_hidden, self.head, shape)
        dense = self._dense(bias is not None, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
        weight_of(dense).copy_(weight.view(shape))
        if bias is not None:
            dense.bias.copy_(bias)
        elif dense.bias is not None:  # transformers' Conv1D always has one
            dense.bias.zero_()
        return dense.train(self.training)

    def _dense(self, bias: bool, **factory: Any) -> Any:
        raise NotImplementedError

    def extra_repr(self) -> str:
        bias = "generated" if self.bias_head is not None else self.bias is not None
        context = "static" if self.context_features is None else f"context_features={self.context_features}"
        own = sum(p.numel() for p in self.parameters())
        return (
            f"bias={bias}, chunk={self.grid.rows}x{self.grid.cols}, width={self.width}, {context}, "
            f"{own:,} parameters for {self.grid.out_features * self.fan_in:,} weights"
        )


def weight_of(dense: Any) -> Tensor:
    """`[N, K, *kernel]`: the `Conv1D` of transformers, a linear layer, keeps `[K, N]`."""
    return dense.weight.T if type(dense).__name__ == "Conv1D" else dense.weight


def _contexts(hidden: Hidden) -> int:
    return hidden.shape[0] if len(hidden.shape) == 4 else 1
