"""A state that does not fit is refused before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def check_state(module: nn.Module, state: Mapping[str, Any], strict: bool) -> None:
    """Raise what `load_state_dict` would, which loads the tensors that fit first."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict: got {type(state).__name__}, wanted tensors by name")
    own = {name: list(value.shape) for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    for name in own:
        if name in state and not isinstance(state[name], Tensor):
            raise TypeError(f"state_dict: got {name} of {type(state[name]).__name__}, wanted a tensor")
    there = {name: list(state[name].shape) for name in own if name in state}
    wrong = [f"{name} of shape {there[name]}, wanted {own[name]}" for name in there if there[name] != own[name]]
    if strict:
        wrong += [f"no {name}" for name in own if name not in state]
        wrong += [f"{name}, which is none here" for name in state if name not in own]
    if wrong:
        raise RuntimeError(f"state_dict: got {'; '.join(wrong)}")


class LoadsWhole(nn.Module):
    """A module whose `load_state_dict` loads all or nothing."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but of a state that does not fit nothing is loaded."""
        check_state(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)
