"""Products and convolutions with a generated weight, which do not form it; its transpose, and its other dtypes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperkernels.conv import hyper_conv1d, hyper_conv2d, hyper_conv3d, hyper_conv_transpose2d
from hyperkernels.functional import hyper_linear
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.weight import GENERATED, AbsentWeight, GeneratedWeight, formed_of, getter, matrix_of, scaled, shape_of


def _check_features(input: Tensor, dim: int, wanted: int) -> None:
    """Of the last chunk's columns some may be cropped: what is as wide as the chunks need not fit the weight."""
    if input.dim() >= -dim and input.shape[dim] != wanted:
        raise ValueError(f"input: got shape {list(input.shape)}, wanted {wanted} features in dimension {dim}")


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if isinstance(input, AbsentWeight) or not isinstance(weight, GeneratedWeight):
        return NotImplemented
    head, settings = scaled(weight)
    N, K = matrix_of(shape_of(weight))
    _check_features(input, -1, K)
    return hyper_linear(input, weight.hidden, head, out_features=N, bias=formed_of(bias), **settings)


def _convolution(function: Callable[..., Tensor], names: str) -> Callable[..., Any]:
    """torch's function of `(input, weight, bias, *settings)`, the settings by `names`, as `function`."""

    def run(input: Tensor, weight: Tensor, bias: Tensor | None = None, *given: Any, **named: Any) -> Any:
        if isinstance(input, AbsentWeight) or not isinstance(weight, GeneratedWeight):
            return NotImplemented
        head, settings = scaled(weight)
        settings = settings | dict(zip(names.split(), given)) | named
        N, K = shape_of(weight)[:2]
        groups = settings.get("groups", 1)
        wanted, channels = (N, K * groups) if function is hyper_conv_transpose2d else (K * groups, N)
        _check_features(input, 1 - len(shape_of(weight)), wanted)
        return function(input, weight.hidden, head, out_channels=channels, bias=formed_of(bias), **settings)

    return run


def _transposed(input: Any) -> Any:
    weight, bias = input, input.settings["head_bias"]
    if len(shape_of(weight)) != 2 or weight.head.dim() == 4 or (bias is not None and bias.dim() == 3):
        return NotImplemented  # one head for each chunk: they lie in the chunks' order
    hidden = weight.hidden
    if isinstance(hidden, AdditiveHidden):
        hidden = hidden.with_chunks(hidden.chunks.transpose(0, 1))
    else:
        hidden = hidden.transpose(-3, -2)
    settings = weight.settings | {"head_bias": None if bias is None else bias.T, "scale": weight.scale}
    return GeneratedWeight(hidden, weight.head.transpose(-2, -1), shape_of(weight)[::-1], **settings)


def _swapped(input: Any, dim0: int, dim1: int) -> Any:
    dims = len(shape_of(input))
    if not -dims <= min(dim0, dim1) <= max(dim0, dim1) < dims:
        raise IndexError(f"dim0, dim1: got {dim0}, {dim1}, wanted {-dims} to {dims - 1}")
    return _transposed(input) if {dim0 % 2, dim1 % 2} == {0, 1} else NotImplemented


def _matmul(input: Tensor, other: Any = None, *more: Any, **unusual: Any) -> Any:
    """With a result to write to, or by other names (`mat2`), it is as any other operation."""
    if more or unusual or (isinstance(input, GeneratedWeight) and isinstance(other, GeneratedWeight)):
        return NotImplemented
    if isinstance(input, GeneratedWeight) and len(shape_of(input)) == 1:  # a bias, which stands as a column
        return NotImplemented
    if isinstance(input, GeneratedWeight):
        return _linear(other.mT, input).mT if other.dim() > 1 else _linear(other, input)
    turned = _transposed(other)
    return NotImplemented if turned is NotImplemented else _linear(input, turned)


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *more: Any, beta: float = 1, alpha: float = 1, **unusual: Any
) -> Any:
    if more or unusual or isinstance(input, GeneratedWeight) or beta == 0:  # which ignores even nan in the input
        return NotImplemented
    product = _matmul(mat1, mat2)
    return product if product is NotImplemented else beta * input + alpha * product


def _to(weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Of hidden, head and head_bias alike."""
    bias = weight.settings["head_bias"]
    bias = bias if bias is None else bias.to(*args, **kwargs)
    settings = weight.settings | {"head_bias": bias, "scale": weight.scale}
    return GeneratedWeight(
        weight.hidden.to(*args, **kwargs), weight.head.to(*args, **kwargs), shape_of(weight), **settings
    )


def _cast(dtype: torch.dtype, weight: Any, **kwargs: Any) -> Any:
    return _to(weight, dtype, **kwargs)


DTYPES = {"half": torch.half, "bfloat16": torch.bfloat16, "float": torch.float, "double": torch.double}
CONVOLUTION = "stride padding dilation groups"
GENERATED.update(
    {
        F.linear: _linear,
        F.conv1d: _convolution(hyper_conv1d, CONVOLUTION),
        F.conv2d: _convolution(hyper_conv2d, CONVOLUTION),
        F.conv3d: _convolution(hyper_conv3d, CONVOLUTION),
        F.conv_transpose2d: _convolution(hyper_conv_transpose2d, "stride padding output_padding groups dilation"),
        **dict.fromkeys((getter("T"), getter("mT"), Tensor.t, torch.t), _transposed),
        **dict.fromkeys((Tensor.transpose, torch.transpose), _swapped),
        Tensor.to: _to,
        **{getattr(Tensor, n): partial(_cast, d) for n, d in DTYPES.items()},
        **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
        **dict.fromkeys((torch.mm, Tensor.mm, torch.mv, Tensor.mv), _matmul),
        Tensor.__rmatmul__: lambda other, input: _matmul(input, other),
        **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    }
)
