"""`HyperModel`: a model that somebody else wrote, run with the weights that a hypernetwork generates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hyperkernels.nn.hypernet import HyperNet
from hyperkernels.nn.loading import LoadsWhole
from hyperkernels.weight import form


class HyperModel(LoadsWhole):
    """A model that runs with the weights that a hypernetwork generates, none of them formed.

    Args:
        model: any module. The weights that are generated stop being its parameters, in place, under every name that
            they have there; whatever else it has stays and learns on.
        hypernet: a `HyperNet` whose targets are parameters of `model`, by name and shape.

    Call:
        `hyper_model(*args, context=None, context_ids=None, members=None, **kwargs)`: the model's arguments, and the
        hypernetwork's.

    Raises:
        TypeError, ValueError: an argument is no such module, or a target no parameter of the model. Nothing has been
            changed then.

    Example:
        >>> import torch, hyperkernels as hk
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 2))
        >>> hyper = hk.HyperModel(model, hk.HyperNet(model, context_features=5, width=8))
        >>> hyper(torch.randn(4, 20), context=torch.randn(4, 5)).shape
        torch.Size([4, 2])
    """

    def __init__(self, model: nn.Module, hypernet: HyperNet) -> None:
        super().__init__()
        for name, value, kind in (("model", model, nn.Module), ("hypernet", hypernet, HyperNet)):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: got {type(value).__name__}, wanted a {kind.__name__}")
        own = dict(model.named_parameters(remove_duplicate=False))
        names: dict[str, list[str]] = {}
        for name, target in hypernet.targets.items():
            if name not in own or tuple(own[name].shape) != target.shape:
                got = list(own[name].shape) if name in own else "no such parameter"
                raise ValueError(f"hypernet: wanted {name!r} {list(target.shape)} in the model, got {got}")
            names[name] = [other for other, parameter in own.items() if parameter is own[name]]
        self.model, self.hypernet, self.names = model, hypernet, names
        self._register(dict.fromkeys(names))

    def _register(self, values: Mapping[str, nn.Parameter | None]) -> None:
        """Under every name that the model has for it."""
        for name, value in values.items():
            for path, _, leaf in (other.rpartition(".") for other in self.names[name]):
                self.model.get_submodule(path).register_parameter(leaf, value)

    def forward(
        self,
        *args: Any,
        context: Any = None,
        context_ids: Tensor | None = None,
        members: int | None = None,
        **kwargs: Any,
    ) -> Any:
        generated = self.hypernet(context, context_ids, members=members)
        weights = {other: weight for name, weight in generated.items() for other in self.names[name]}
        return torch.func.functional_call(self.model, weights, args, kwargs, tie_weights=False)

    @torch.no_grad()
    def to_dense(self, context: Any = None) -> nn.Module:
        """The model with the weights of one context formed, as its own parameters again, in place."""
        formed = {name: form(weight) for name, weight in self.hypernet(context).items()}
        for name, weight in formed.items():
            if tuple(weight.shape) != self.hypernet.targets[name].shape:
                raise ValueError(f"context: got {weight.shape[0]} contexts, wanted one: a dense layer has one weight")
        self._register({name: nn.Parameter(weight) for name, weight in formed.items()})
        return self.model
