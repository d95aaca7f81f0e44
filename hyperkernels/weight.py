"""`GeneratedWeight`: a weight that is never there, for models that nobody rewrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperkernels.form import autocast, check_head_bias, check_tensors, grid_of_weight
from hyperkernels.functional import generate_weight
from hyperkernels.hidden import AdditiveHidden
from hyperkernels.user_line import warn_at_users_line

_warned: set[str] = set()


class AbsentWeight(Tensor):
    """A tensor of a weight's shape, dtype and device that holds none of its numbers. `FUNCTIONS[kind]` says what torch
    asks of it and who answers; whatever is not there has the weight formed, and warns."""

    hidden: Tensor | AdditiveHidden
    head: Tensor
    scale: float | Tensor
    contexts: int
    settings: dict[str, Any]

    def __init__(self, *_arguments: Any, **_settings: Any) -> None:
        """`__new__` has done it, as for every tensor."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for answers in (FUNCTIONS[cls], TOLD):
            if function in answers:
                found = answers[function](*args, **kwargs)
                if found is not NotImplemented:
                    return found
        if function not in AS_IT_IS:
            check_in_place(function, kwargs)
            form_it = partial(_formed_for, function)
            args, kwargs = pytree.tree_map_only(AbsentWeight, form_it, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    def materialize(self) -> Tensor:
        """W itself, `[*shape]`, or of more contexts than one `[G, *shape]`, differentiable: to export or to look at."""
        return form(self)

    def __repr__(self) -> str:  # type: ignore[override]
        parts = f"hidden={list(self.hidden.shape)}, head={list(self.head.shape)}"
        return f"{type(self).__name__}(shape={list(shape_of(self))}, {parts})"


def absent(cls: Any, like: Tensor, shape: tuple[int, ...]) -> Any:
    """One number in memory: whoever reads the weight past its functions sees at once that it is not there."""
    return like.detach().new_full((1,), float("nan")).expand(shape).as_subclass(cls)


class GeneratedWeight(AbsentWeight):
    """`W[g, i*rows+r, j*cols+q, *s] = scale * (sum_k hidden[g,i,j,k] head[k,r,q,*s] (+ head_bias))`: a tensor of W's
    shape, dtype and device that holds none of its numbers.

    As the weight of `F.linear`, `F.conv1d`, `2d`, `3d` and `F.conv_transpose2d`, and in `matmul` and `addmm`, it runs
    `hyper_linear` and its like, and W is not formed: `torch.func.functional_call(model, {name: weight}, x)` runs a
    model with generated weights. `.T` and `.to(dtype)` are generated weights again. Any other operation forms W, and
    warns with its name, once; what would change it in place is refused.

    Args:
        hidden, head, head_bias, order, backend: as for `hyper_linear`, or `hyper_conv2d`.
        shape: `(N, K)`; of a convolution `(out_channels, in_channels / groups, *kernel)`; of a bias `(N,)`, which is
            generated as the column `(N, 1)`.
        scale: a number, or a tensor of one.
        context_ids: as for `hyper_linear`, of the layer that the weight is given to. Where hidden has G contexts each
            has a weight of this shape, and entry g of the layer's input uses that of context g, without ids.

    Gradients reach hidden, head and head_bias.

    Raises:
        TypeError, ValueError: as `generate_weight`, and later as the function that it is given to.
        RuntimeError: an operation that forms W, and there is more than one, or that would change it.

    Example:
        >>> import torch, hyperkernels as hk
        >>> weight = hk.GeneratedWeight(torch.randn(2, 3, 6), torch.randn(6, 4, 5), (8, 14))
        >>> torch.func.functional_call(torch.nn.Linear(14, 8), {"weight": weight}, torch.randn(9, 14)).shape
        torch.Size([9, 8])
    """

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor | AdditiveHidden,
        head: Tensor,
        shape: Sequence[int],
        *,
        head_bias: Tensor | None = None,
        scale: float | Tensor = 1.0,
        context_ids: Tensor | None = None,
        order: str | None = None,
        backend: str | None = None,
    ) -> GeneratedWeight:
        head, hidden, head_bias = autocast(head, hidden, head_bias)
        check_tensors(head, hidden, head)
        shape = tuple(shape)
        grid = grid_of_weight(hidden, head, matrix_of(shape))
        check_head_bias(head_bias, grid, head, shape[2:])
        if not isinstance(scale, (int, float)) and not (isinstance(scale, Tensor) and scale.numel() == 1):
            got = f"a tensor of {scale.numel()}" if isinstance(scale, Tensor) else repr(scale)
            raise ValueError(f"scale: got {got}, wanted a number, or a tensor of one")
        weight = absent(cls, head, shape)
        weight.hidden, weight.head, weight.scale = hidden, head, scale
        weight.contexts = hidden.shape[0] if len(hidden.shape) == 4 else 1
        weight.settings = {"head_bias": head_bias, "context_ids": context_ids, "order": order, "backend": backend}
        return weight


def check_in_place(function: Any, kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():  # who traces cannot read a function's name
        return
    name = name_of(function)
    in_place = (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE
    if in_place or any(isinstance(out, AbsentWeight) for out in pytree.tree_leaves(kwargs.get("out"))):
        raise RuntimeError(f"{name}: a generated weight cannot be changed in place; change what generates it")


def name_of(function: Any) -> str:
    """A property's getter is called by the property."""
    owner = getattr(function, "__self__", None)
    return getattr(owner if function.__name__ == "__get__" else function, "__name__", str(function))


def form(weight: AbsentWeight) -> Tensor:
    """W itself, `[*shape]`, or of more contexts than one `[G, *shape]`."""
    return FORM[type(weight)](weight)


def is_one(scale: float | Tensor) -> bool:
    """Whether there is nothing to multiply by; of a tensor nobody waits to know."""
    return not isinstance(scale, Tensor) and scale == 1


def scaled(weight: AbsentWeight) -> tuple[Tensor, dict[str, Any]]:
    """Head and settings of what generates it, the scale in them."""
    bias, scale = weight.settings["head_bias"], weight.scale
    if is_one(scale):
        return weight.head, weight.settings
    return scale * weight.head, weight.settings | {"head_bias": None if bias is None else scale * bias}


def _form(weight: AbsentWeight) -> Tensor:
    shape, contexts = shape_of(weight), weight.contexts
    head, settings = scaled(weight)
    formed = generate_weight(weight.hidden, head, matrix_of(shape), head_bias=settings["head_bias"])
    return formed.reshape(shape if contexts == 1 else (contexts, *shape))


def _formed_for(function: Any, weight: AbsentWeight) -> Tensor:
    contexts, shape = weight.contexts, shape_of(weight)
    if contexts > 1:
        name = name_of(function)
        raise RuntimeError(f"{name}: got a generated weight of {contexts} contexts, wanted one: W is not one tensor")
    if len(shape) > 1 and not torch.compiler.is_compiling():
        name = name_of(function)
        if name not in _warned:
            _warned.add(name)
            warn_at_users_line(f"{name} forms a generated weight; F.linear, F.conv2d and matmul do not")
    return form(weight)


def shape_of(weight: Tensor) -> tuple[int, ...]:
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(weight.shape)


def matrix_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1) if len(shape) == 1 else shape


def formed_of(value: Any) -> Any:
    return form(value) if isinstance(value, AbsentWeight) else value


def getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


def _parts(weight: Any) -> list[Tensor]:
    hidden, bias = weight.hidden, weight.settings["head_bias"]
    parts = [hidden.context, hidden.chunks] if isinstance(hidden, AdditiveHidden) else [hidden]
    return [*parts, weight.head, *([] if bias is None else [bias])]


def _requires_grad(weight: Any) -> bool:
    return any(part.requires_grad for part in _parts(weight))


def _learns(weight: Any) -> Tensor:
    """The part whose gradient stands for that of W: whoever hooks the one hears of the other."""
    parts = _parts(weight)
    return next((part for part in parts if part.grad_fn is not None), parts[0])


GENERATED: dict[Any, Callable[..., Any]] = {}  # filled by `weight_products.py` and `rows.py`
TOLD: dict[Any, Callable[..., Any]] = {
    getter("requires_grad"): _requires_grad,
    getter("is_leaf"): lambda weight: not _requires_grad(weight),
    getter("grad"): lambda weight: None,  # what generates it has them
    getter("grad_fn"): lambda weight: _learns(weight).grad_fn,
    Tensor.data_ptr: lambda weight: 0,  # it has no memory of its own
    Tensor.register_hook: lambda weight, hook: _learns(weight).register_hook(hook),
}
IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
IN_PLACE |= {"__setitem__", "__set__"}
AS_IT_IS = {
    *(getter(name) for name in ("shape", "dtype", "device", "ndim", "layout", "is_cpu", "is_cuda", "is_meta")),
    *(
        getter(name)
        for name in ("nbytes", "itemsize", "is_nested", "is_sparse", "is_sparse_csr", "is_quantized", "is_mkldnn")
    ),
    *(getter(name) for name in ("_base", "_version")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "element_size", "__len__")),
    *(getattr(Tensor, name) for name in ("stride", "storage_offset", "is_contiguous", "get_device", "is_complex")),
    *(getattr(Tensor, name) for name in ("is_inference", "is_conj", "is_neg", "_is_view", "untyped_storage")),
    torch.is_floating_point,
    torch.numel,
}
FUNCTIONS: dict[type, dict[Any, Callable[..., Any]]] = {GeneratedWeight: GENERATED}
FORM: dict[type, Callable[[Any], Tensor]] = {GeneratedWeight: _form}
