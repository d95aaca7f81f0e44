"""`HyperConv1d`, `HyperConv2d`, `HyperConv3d`, `HyperConvTranspose2d`: a generated kernel that is never formed."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperkernels.chunking import Grid, check_chunk, check_sizes
from hyperkernels.conv import hyper_conv1d, hyper_conv2d, hyper_conv3d, hyper_conv_transpose2d
from hyperkernels.nn.layer import HyperLayer
from hyperkernels.planner import default_chunk

Sizes = int | tuple[int, ...]
SIZES = ("in_channels", "out_channels", "kernel_size")


class HyperConv(HyperLayer):
    """What the three have in common; nn.ConvNd itself checks the sizes and keeps the settings."""

    SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode")
    dimensions: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool | str = True,
        padding_mode: str = "zeros",
        *,
        context_features: int | None = None,
        chunk: tuple[int, int] | None = None,
        width: int = 32,
        hypernet: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(in_channels=in_channels, out_channels=out_channels, width=width)
        _check_kernel(kernel_size, self.dimensions)
        given = (kernel_size, stride, padding, dilation, groups, False, padding_mode)
        like = self.dense(in_channels, out_channels, *given, device="meta")
        N, K, *kernel = like.weight.shape
        grid = _grid(N, K, tuple(kernel), groups, chunk, width, "out_channels")
        factory = {"device": device, "dtype": dtype}
        super().__init__(grid, tuple(kernel), bias, context_features, width, hypernet, factory)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, like.kernel_size
        self.stride, self.padding, self.dilation, self.groups, self.padding_mode = (
            getattr(like, name) for name in self.SETTINGS
        )
        self._around = like._reversed_padding_repeated_twice

    def arguments(self, x: Tensor, context: Tensor | None = None, context_ids: Tensor | None = None) -> dict[str, Any]:
        """The arguments of `hyper_conv2d`, or its like, that a call of the layer comes to."""
        _check_images(x, self.in_channels, self.dimensions)
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._around, mode=self.padding_mode), 0
        given = {name: getattr(self, name) for name in ("out_channels", "stride", "dilation", "groups")}
        return super().arguments(x, context, context_ids) | given | {"padding": padding}

    @classmethod
    def _sizes_of(cls, dense: Any) -> dict[str, Any]:
        return {name: getattr(dense, name) for name in (*SIZES, *cls.SETTINGS)}

    def _dense(self, bias: bool, **factory: Any) -> nn.Module:
        settings = {name: getattr(self, name) for name in self.SETTINGS}
        return self.dense(self.in_channels, self.out_channels, self.kernel_size, bias=bias, **settings, **factory)

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in ("kernel_size", *self.SETTINGS))
        return f"{self.in_channels}, {self.out_channels}, {settings}, {super().extra_repr()}"


class HyperConv1d(HyperConv):
    """`HyperConv2d` in one dimension.

    Example:
        >>> import torch, hyperkernels as hk
        >>> hk.HyperConv1d(16, 32, 5, padding="same", width=4)(torch.randn(2, 16, 50)).shape
        torch.Size([2, 32, 50])
    """

    function = staticmethod(hyper_conv1d)
    dense = nn.Conv1d
    dimensions = 1


class HyperConv2d(HyperConv):
    """`y = W(z) * x + b`, a convolution whose kernel
    `W[i*rows+r, j*cols+q, s] = sum_k hidden(z)[i,j,k] head[k,r,q,s]` is never formed.

    Takes the place of `nn.Conv2d`: `layer(x)` with x `[B, in_channels, H, W]` or `[in_channels, H, W]`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as of `nn.Conv2d`.
        bias: True for a learned `[out_channels]`, False for none, "generated" for one that is generated too.
        context_features: size of the context z; None makes the layer static.
        chunk: `(rows, cols)` of `(out_channels, in_channels / groups)`; a chunk holds the whole kernel of each pair of
            channels. `rows` must divide `out_channels / groups`, unless groups is 1. By default the cheapest that does
            not limit the rank.
        width, hypernet, device, dtype: as of `HyperLinear`.

    Call:
        `layer(x, context=None, context_ids=None)`, with the context of `HyperLinear`: `z [B, context_features]` gives
        each image a kernel of its own.

    At first the generated kernel has nn.Conv2d's variance, for contexts of unit variance.

    Memory, numerics: `hyper_conv2d`.

    Raises:
        ValueError, RuntimeError: what `nn.Conv2d` refuses; a chunk that does not fit the groups; no context where one
            is needed, or one for a static layer; a context or x of the wrong size.
        TypeError: x or the context is not of the layer's dtype, or hypernet is no module.

    Example:
        >>> import torch, hyperkernels as hk
        >>> layer = hk.HyperConv2d(16, 32, 3, padding=1, context_features=5, width=8)
        >>> layer(torch.randn(4, 16, 10, 10), torch.randn(4, 5)).shape  # a kernel for each image
        torch.Size([4, 32, 10, 10])

    Source: Ha, Dai and Le 2016 (HyperNetworks), section 3.1.
    """

    function = staticmethod(hyper_conv2d)
    dense = nn.Conv2d
    dimensions = 2


class HyperConv3d(HyperConv):
    """`HyperConv2d` in three dimensions.

    Example:
        >>> import torch, hyperkernels as hk
        >>> hk.HyperConv3d(4, 8, 3, stride=2, width=4)(torch.randn(2, 4, 7, 7, 7)).shape
        torch.Size([2, 8, 3, 3, 3])
    """

    function = staticmethod(hyper_conv3d)
    dense = nn.Conv3d
    dimensions = 3


class HyperConvTranspose2d(HyperLayer):
    """`nn.ConvTranspose2d` with a generated kernel, never formed.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, dilation: as of
            `nn.ConvTranspose2d`.
        bias: True for a learned `[out_channels]`, False for none.
        context_features, width, hypernet, device, dtype: as of `HyperConv2d`.
        chunk: `(rows, cols)` of `(in_channels, out_channels / groups)`, as the kernel lies.

    The rest is as of `HyperConv2d`.

    Example:
        >>> import torch, hyperkernels as hk
        >>> layer = hk.HyperConvTranspose2d(16, 8, 4, stride=2, padding=1, context_features=5, width=8)
        >>> layer(torch.randn(4, 16, 10, 10), torch.randn(4, 5)).shape
        torch.Size([4, 8, 20, 20])
    """

    function = staticmethod(hyper_conv_transpose2d)
    dense = nn.ConvTranspose2d
    SETTINGS = ("stride", "padding", "output_padding", "groups", "dilation")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        *,
        context_features: int | None = None,
        chunk: tuple[int, int] | None = None,
        width: int = 32,
        hypernet: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(in_channels=in_channels, out_channels=out_channels, width=width)
        if not isinstance(bias, bool):
            raise ValueError(f"bias: got {bias!r}, wanted True or False")
        _check_kernel(kernel_size, 2)
        given = (kernel_size, stride, padding, output_padding, groups, False, dilation)
        like = nn.ConvTranspose2d(in_channels, out_channels, *given, device="meta")  # type: ignore[arg-type]
        N, K, *kernel = like.weight.shape
        factory = {"device": device, "dtype": dtype}
        grid = _grid(N, K, tuple(kernel), groups, chunk, width, "in_channels")
        super().__init__(grid, tuple(kernel), bias, context_features, width, hypernet, factory, out_channels)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, like.kernel_size
        for name in self.SETTINGS:
            setattr(self, name, getattr(like, name))

    def arguments(self, x: Tensor, context: Tensor | None = None, context_ids: Tensor | None = None) -> dict[str, Any]:
        """The arguments of `hyper_conv_transpose2d` that a call of the layer comes to."""
        _check_images(x, self.in_channels, 2)
        given = {name: getattr(self, name) for name in ("out_channels", *self.SETTINGS)}
        return super().arguments(x, context, context_ids) | given

    @classmethod
    def _sizes_of(cls, dense: Any) -> dict[str, Any]:
        return {name: getattr(dense, name) for name in (*SIZES, *cls.SETTINGS)}

    def _dense(self, bias: bool, **factory: Any) -> nn.Module:
        settings: dict[str, Any] = {name: getattr(self, name) for name in self.SETTINGS}
        sizes: Any = (self.in_channels, self.out_channels, self.kernel_size)
        return nn.ConvTranspose2d(*sizes, bias=bias, **settings, **factory)

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in ("kernel_size", *self.SETTINGS))
        return f"{self.in_channels}, {self.out_channels}, {settings}, {super().extra_repr()}"


def _grid(
    N: int, K: int, kernel: tuple[int, ...], groups: int, chunk: tuple[int, int] | None, width: int, name: str
) -> Grid:
    """Of a kernel `[N, K, *kernel]`, whose rows are the channels that `name` counts."""
    if chunk is None:
        rows, cols = default_chunk(N // groups, K, width, positions=prod(kernel))
    else:
        rows, cols = check_chunk(chunk)
    if groups > 1 and N // groups % rows:
        raise ValueError(f"chunk: got {rows} rows, wanted a divisor of {N} {name} / {groups} groups")
    return Grid(N, K, rows, cols)


def _check_kernel(kernel_size: Sizes, n: int) -> None:
    sizes = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size,) * n
    if len(sizes) != n or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"kernel_size: got {kernel_size!r}, wanted a positive integer, or {n} of them")


def _check_images(x: Tensor, channels: int, n: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, wanted a tensor")
    if x.dim() not in (n + 1, n + 2) or x.shape[-n - 1] != channels:
        wanted = ", ".join([str(channels), *"DHW"[3 - n :]])
        raise ValueError(f"x: got shape {list(x.shape)}, wanted [B, {wanted}] or [{wanted}]")
