"""`HyperLinear`: `nn.Linear` with a generated weight that is never formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hyperkernels.chunking import Grid
from hyperkernels.form import autocast_enabled
from hyperkernels.functional import generate_weight, hyper_linear
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.nn.ambient import check_context, current_context
from hyperkernels.nn.trunk import Trunk
from hyperkernels.planner import default_chunk

Hidden = Tensor | AdditiveHidden


class HyperLinear(nn.Module):
    """`y = W(z) x + b`, where `W[i*rows+r, j*cols+q] = sum_k hidden(z)[i,j,k] head[k,r,q]` is never formed.

    Takes the place of `nn.Linear`: `layer(x)` with x `[*, in_features]` gives `[*, out_features]`.

    Args:
        in_features, out_features: K and N, positive.
        bias: True for a learned `[N]`, False for none, "generated" for one that the hypernetwork generates too.
        context_features: size of the context z. None makes the layer static: its only context is what its chunk
            embeddings learn.
        chunk: `(rows, cols)`; by default the cheapest that does not limit the rank (`planner.default_chunk`).
        width: m, the width of the hypernetwork's last hidden layer.
        hypernet: any module that maps z (or None) to hidden `[I, J, m]`, `[G, I, J, m]` or `AdditiveHidden`, with
            a column of chunks more (`J + 1`) where the bias is generated. Called a few times at construction, to
            scale the head by what it returns. By default a `Trunk` of its own.
        device, dtype: of the parameters.

    Call:
        `layer(x, context=None, context_ids=None)`. The context is the argument, else the ambient
        `hyperkernels.context(z)`. `z [G, context_features]` gives entry g along x's first dimension its own
        weights, one context gives them to all of x, and `context_ids` says which entry uses which.

    At first the generated weight has nn.Linear's variance, `1/(3K)`, for contexts of unit variance.

    Memory, numerics: `hyper_linear`.

    Raises:
        ValueError: a size below 1; no context where one is needed, or one for a static layer; a context or x of
            the wrong size.
        TypeError: x or the context is not of the layer's dtype, or hypernet is no module.

    Example:
        >>> import torch, hyperkernels as hk
        >>> layer = hk.HyperLinear(64, 32, context_features=3, width=8)
        >>> layer(torch.randn(5, 10, 64), torch.randn(5, 3)).shape
        torch.Size([5, 10, 32])

    Source: Ha, Dai and Le 2016 (HyperNetworks).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool | str = True,
        *,
        context_features: int | None = None,
        chunk: tuple[int, int] | None = None,
        width: int = 32,
        hypernet: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features), ("width", width)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: got {size!r}, wanted a positive integer")
        if not (isinstance(bias, bool) or (isinstance(bias, str) and bias == "generated")):
            raise ValueError(f'bias: got {bias!r}, wanted True, False or "generated"')
        rows, cols = default_chunk(out_features, in_features, width) if chunk is None else _check_chunk(chunk)
        self.in_features, self.out_features = in_features, out_features
        self.width, self.context_features = width, context_features
        self.grid = Grid(out_features, in_features, rows, cols)
        self.order: str | None = None
        self.backend: str | None = None
        generated = bias == "generated"
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._owns_hypernet = hypernet is None
        if hypernet is not None and not isinstance(hypernet, nn.Module):
            raise TypeError(f"hypernet: got {type(hypernet).__name__}, wanted a torch.nn.Module")
        if hypernet is None:
            chunks = (self.grid.I, self.grid.J + generated)
            hypernet = Trunk(chunks, width, context_features=context_features, **factory)
        self.hypernet = hypernet
        self.head = nn.Parameter(torch.empty(width, rows, cols, **factory))
        self.bias_head = nn.Parameter(torch.empty(width, rows, 1, **factory)) if generated else None
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias is True else None
        self.reset_parameters()

    @property
    def chunk(self) -> tuple[int, int]:
        return self.grid.rows, self.grid.cols

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A new trunk (the layer's own; one that was passed in stays), and heads and bias to nn.Linear's variance."""
        if self._owns_hypernet:
            self.hypernet.reset_parameters()  # type: ignore[operator]
        moment = self._hidden_second_moment().clamp_min(1e-6)
        std = (3 * self.in_features * self.width * moment).rsqrt()
        for head in (self.head, self.bias_head):
            if head is not None:
                head.normal_().mul_(std.to(head.dtype))
        if self.bias is not None:
            bound = self.in_features**-0.5
            self.bias.uniform_(-bound, bound)

    def _hidden_second_moment(self) -> Tensor:
        """Mean of hidden squared: exact for a static trunk, else over a few standard normal contexts."""
        if self.context_features is None:
            contexts: list[Tensor | None] = [None]
        else:
            contexts = list(torch.randn(16, 1, self.context_features, dtype=self.head.dtype, device=self.head.device))
        moments = []
        for z in contexts:
            hidden = self.hypernet(z)
            dense = hidden.materialize() if isinstance(hidden, AdditiveHidden) else hidden
            moments.append(dense.float().square().mean())
        return torch.stack(moments).mean()

    def hidden(self, context: Tensor | None = None) -> tuple[Hidden, Tensor | None]:
        """`(hidden, context_ids)` for a context: the argument, else the ambient one, else none (a static layer)."""
        context_ids = None
        if context is None and self.context_features is not None:
            context, context_ids = current_context()
            if context is None:
                raise ValueError(
                    f"context: got none, wanted [G, {self.context_features}]: call layer(x, context=z), or the model "
                    "inside `with hyperkernels.context(z):`"
                )
        if context is not None:
            if self.context_features is None:
                raise ValueError("context: this layer is static: build it with context_features to condition it")
            context = check_context(context, "context", self.context_features)
            self._check_dtype("context", context)
        return self.hypernet(context), context_ids

    def _check_dtype(self, name: str, value: Tensor) -> None:
        if value.dtype != self.head.dtype and not autocast_enabled(value.device.type):
            raise TypeError(f"{name}: got {value.dtype}, wanted the layer's dtype {self.head.dtype}")

    def arguments(self, x: Tensor, context: Tensor | None = None, context_ids: Tensor | None = None) -> dict[str, Any]:
        """The arguments of `hyper_linear` that a call of the layer comes to."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, wanted a tensor")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: got shape {list(x.shape)}, wanted [*, {self.in_features}]")
        self._check_dtype("x", x)
        hidden, ambient_ids = self.hidden(context)
        weight_hidden, bias = self._split_bias(hidden)
        return {
            "x": x,
            "hidden": weight_hidden,
            "head": self.head,
            "out_features": self.out_features,
            "bias": bias,
            "context_ids": ambient_ids if context_ids is None else context_ids,
            "order": self.order,
            "backend": self.backend,
        }

    def forward(self, x: Tensor, context: Tensor | None = None, context_ids: Tensor | None = None) -> Tensor:
        return hyper_linear(**self.arguments(x, context, context_ids))

    def _split_bias(self, hidden: Hidden) -> tuple[Hidden, Tensor | None]:
        """The weight's chunks, and the bias: the last column of chunks through its own head, where it is generated."""
        if self.bias_head is None:
            return hidden, self.bias
        J = self.grid.J
        if isinstance(hidden, AdditiveHidden):
            weight, last = (
                AdditiveHidden(hidden.context, part, hidden.activation)
                for part in (hidden.chunks[:, :J], hidden.chunks[:, J:])
            )
        else:
            weight, last = hidden[..., :J, :], hidden[..., J:, :]
        contexts = _contexts(hidden)
        ones = self.bias_head.new_ones((contexts, 1) if contexts != 1 else (1,))
        return weight, hyper_linear(ones, last, self.bias_head, out_features=self.out_features)

    @torch.no_grad()
    def to_linear(self, context: Tensor | None = None) -> nn.Linear:
        """The `nn.Linear` that this layer is, for one context: its weight formed, and trainable."""
        hidden, _ = self.hidden(context)
        contexts = _contexts(hidden)
        if contexts != 1:
            raise ValueError(f"context: got {contexts} contexts, wanted one: an nn.Linear has one weight")
        weight_hidden, bias = self._split_bias(hidden)
        weight = generate_weight(weight_hidden, self.head, (self.out_features, self.in_features))
        linear = nn.Linear(
            self.in_features, self.out_features, bias is not None, device="meta", dtype=weight.dtype
        ).to_empty(device=weight.device)
        linear.weight.copy_(weight.view(self.out_features, self.in_features))
        if bias is not None:
            linear.bias.copy_(bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        bias = "generated" if self.bias_head is not None else self.bias is not None
        context = "static" if self.context_features is None else f"context_features={self.context_features}"
        own = sum(p.numel() for p in self.parameters())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"chunk={self.grid.rows}x{self.grid.cols}, width={self.width}, {context}, "
            f"{own:,} parameters for {self.in_features * self.out_features:,} weights"
        )


def _contexts(hidden: Hidden) -> int:
    return hidden.shape[0] if len(hidden.shape) == 4 else 1


def _check_chunk(chunk: tuple[int, int]) -> tuple[int, int]:
    if not (isinstance(chunk, (tuple, list)) and len(chunk) == 2 and all(isinstance(c, int) and c > 0 for c in chunk)):
        raise ValueError(f"chunk: got {chunk!r}, wanted (rows, cols), positive integers")
    return chunk[0], chunk[1]
