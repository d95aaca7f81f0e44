"""A state that does not fit is refused before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def check_state(module: nn.Module, state: Mapping[str, Any], strict: bool) -> None:
    """Raise what `load_state_dict` would, which loads the tensors that fit first."""
    own = {name: list(value.shape) for name, value in module.state_dict().items()}
    there = {name: list(state[name].shape) for name in own if name in state}
    wrong = [f"{name} of shape {there[name]}, wanted {own[name]}" for name in there if there[name] != own[name]]
    if strict:
        wrong += [f"no {name}" for name in own if name not in state]
        wrong += [f"{name}, which is none here" for name in state if name not in own]
    if wrong:
        raise RuntimeError(f"state_dict: got {'; '.join(wrong)}")
