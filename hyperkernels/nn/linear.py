"""`HyperLinear`: `nn.Linear` with a generated weight that is never formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hyperkernels.chunking import Grid, check_chunk, check_sizes
from hyperkernels.functional import hyper_linear
from hyperkernels.nn.layer import HyperLayer, weight_of
from hyperkernels.planner import default_chunk


class HyperLinear(HyperLayer):
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
            scale the head by what it returns. By default a `Trunk` of its own; of a static layer a `FreeTrunk`, whose
            chunk embeddings are hidden itself.
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

    function = staticmethod(hyper_linear)
    dense = nn.Linear

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
        check_sizes(in_features=in_features, out_features=out_features, width=width)
        rows, cols = default_chunk(out_features, in_features, width) if chunk is None else check_chunk(chunk)
        grid = Grid(out_features, in_features, rows, cols)
        super().__init__(grid, (), bias, context_features, width, hypernet, {"device": device, "dtype": dtype})
        self.in_features, self.out_features = in_features, out_features

    def arguments(self, x: Tensor, context: Tensor | None = None, context_ids: Tensor | None = None) -> dict[str, Any]:
        """The arguments of `hyper_linear` that a call of the layer comes to."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, wanted a tensor")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: got shape {list(x.shape)}, wanted [*, {self.in_features}]")
        return super().arguments(x, context, context_ids, out_features=self.out_features)

    @classmethod
    def from_linear(cls, linear: Any, **settings: Any) -> HyperLinear:
        """`from_dense` of an `nn.Linear`, or the `Conv1D` of transformers.

        Example:
            >>> import torch, hyperkernels as hk
            >>> hk.HyperLinear.from_linear(torch.nn.Linear(64, 32), chunk=(8, 8), width=32).fit_error < 1e-5
            True
        """
        return cls.from_dense(linear, **settings)

    @classmethod
    def _sizes_of(cls, dense: Any) -> dict[str, Any]:
        N, K = weight_of(dense).shape
        return {"in_features": K, "out_features": N}

    def _dense(self, bias: bool, **factory: Any) -> Any:
        if self.dense is nn.Linear:
            return nn.Linear(self.in_features, self.out_features, bias, **factory)
        with torch.device(factory["device"]):
            return self.dense(self.out_features, self.in_features).to(factory["dtype"])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"
