"""The activations of `AdditiveHidden` and their slopes, in fp32; the list is `hyperkernels.hidden.ACTIVATIONS`."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Near 0 by its series: the difference of two numbers near 1/2 would have no digits left."""
    s = x * x
    series = x * (1 + s * (-0.3333333333 + s * (0.1333333333 + s * (-0.0539682540 + s * 0.0218694885))))
    return tl.where(s < 0.0625, series, 2 * sigmoid(2 * x) - 1)


@triton.jit
def gelu_inner(x):
    """`gelu_tanh(x) = x sigmoid(inner(x))`."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.maximum(x, 0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return x * sigmoid(gelu_inner(x))
    elif ACTIVATION == "silu":
        return x * sigmoid(x)
    elif ACTIVATION == "tanh":
        return tanh(x)
    elif ACTIVATION == "sin":
        return tl.sin(x)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at x."""
    if ACTIVATION == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        x = tl.minimum(tl.maximum(x, -100.0), 100.0)  # 0 or 1 from there, and no overflow
        s = sigmoid(gelu_inner(x))
        return s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACTIVATION == "silu":
        s = sigmoid(x)
        return s * (1 + x * (1 - s))
    elif ACTIVATION == "tanh":
        return 1 - tanh(x) * tanh(x)
    elif ACTIVATION == "sin":
        return tl.cos(x)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return tl.full(x.shape, 1.0, x.dtype)
