"""The weight of a layer that generates it: made when somebody computes with it, and not before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hyperkernels.weight import (
    AS_IT_IS,
    FORM,
    FUNCTIONS,
    TOLD,
    AbsentWeight,
    absent,
    check_in_place,
    formed_of,
    shape_of,
)


class DeferredWeight(AbsentWeight):
    """A weight that `made()` gives to whoever computes with it, and until then its shape, dtype and device.

    `learns`: a tensor that learns if it does.
    """

    made: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, learns: Tensor, shape: Sequence[int], made: Callable[[], Tensor]) -> DeferredWeight:
        weight = absent(cls, learns, tuple(shape))
        weight.hidden = weight.head = learns
        weight.scale, weight.contexts, weight.settings, weight.made = 1.0, 1, {"head_bias": None}, made
        return weight

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={list(shape_of(self))})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in AS_IT_IS or function in TOLD:
            return super().__torch_function__(function, types, args, kwargs)
        if torch.compiler.is_compiling():  # who traces would take the numbers that are not there
            raise RuntimeError("a layer's `.weight` was given to a compiled function: let that read it from the layer")
        check_in_place(function, kwargs or {})
        args, kwargs = pytree.tree_map_only(DeferredWeight, lambda weight: weight.made(), (args, kwargs or {}))
        return function(*args, **kwargs)


def made(weight: Any) -> Any:
    """The weight that a `DeferredWeight` stands for; any other as it is."""
    return weight.made() if isinstance(weight, DeferredWeight) else weight


FUNCTIONS[DeferredWeight] = {}
FORM[DeferredWeight] = lambda weight: formed_of(weight.made())
