"""`HyperConfig`: what `hyperize_` builds in the place of a layer, and which layer has which."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hyperkernels.backends import check_backend
from hyperkernels.call import check_order
from hyperkernels.chunking import check_chunk, check_sizes

MODES = ("replace", "fit", "residual")


@dataclass(frozen=True)
class HyperConfig:
    """What `hyperize_` builds in the place of a layer.

    Args:
        mode: "replace": a fresh hyper layer. "fit": one that generates the layer's own weight as well as its chunks and
            width allow (`HyperLinear.from_linear`). "residual": the layer, frozen, and a generated change that is zero
            at first (`nn.HyperResidual`).
        chunk, width, context_features: as of `HyperLinear` and `HyperConv2d`. For a layer smaller than the chunk the
            chunk is cropped, and the report says so.
        bias: as of these, for "replace"; None keeps a layer's own choice.
        rank: of a change: two hyper layers in a row, a generated LoRA. None: one, of any rank.
        share_head: layers whose chunks and inputs are alike have one head among them.
        output_head: swap also the output head of a Hugging Face model, and a layer whose weight another module has as
            well (a head tied to the embedding), which then part.
        order, backend: as of `hyper_linear`.

    Raises:
        ValueError: a setting that is none, or settings that do not go with the mode.
    """

    chunk: tuple[int, int] | None = None
    width: int = 32
    context_features: int | None = None
    bias: bool | str | None = None
    order: str | None = None
    backend: str | None = None
    mode: str = "replace"
    rank: int | None = None
    share_head: bool = False
    output_head: bool = False

    def __post_init__(self) -> None:
        check_order(self.order)
        check_backend(self.backend)
        check_sizes(width=self.width, context_features=self.context_features, rank=self.rank)
        if self.width is None:
            raise ValueError("width: got None, wanted a positive integer")
        if self.chunk is not None:
            object.__setattr__(self, "chunk", check_chunk(self.chunk))  # of a file it is a list
        for name in ("share_head", "output_head"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted True or False")
        if self.bias is not None and self.bias != "generated" and not isinstance(self.bias, bool):
            raise ValueError(f'bias: got {self.bias!r}, wanted None, True, False or "generated"')
        if self.mode not in MODES:
            raise ValueError(f"mode: got {self.mode!r}, wanted one of {', '.join(MODES)}")
        if self.mode != "replace" and self.bias is not None:
            raise ValueError(f"bias: got {self.bias!r}, wanted None: mode {self.mode!r} keeps the layer's own")
        if self.rank is not None and self.mode != "residual":
            raise ValueError(f"rank: got {self.rank}, wanted None: only a residual change has a rank")
        if self.rank is not None and self.chunk is not None:
            raise ValueError(f"chunk: got {self.chunk}, wanted None: the two layers of a rank have their own")
        if self.share_head and self.mode == "fit":
            raise ValueError("share_head: got True, wanted False: every layer is fitted by a head of its own")


def _like(pattern: re.Pattern[str], names: list[str]) -> str:
    """What to write for a pattern that matches no name as a whole."""
    parts = [name for name in names if pattern.search(name)]
    few = ", ".join(map(repr, (parts or names)[:4])) + ", ..." * (len(parts or names) > 4)
    hint = f"{f'.*(?:{pattern.pattern}).*'!r} would match " if parts else "the model has "
    return f"it is to match a whole name (re.fullmatch); {hint}{few or 'none'}"


def configs_by_name(config: Any, names: list[str]) -> Callable[[str], tuple[HyperConfig | None, str]]:
    """Of a layer's name: its config, and where it has none, why."""
    if isinstance(config, HyperConfig):
        return lambda name: (config, "")
    if not isinstance(config, Mapping) or not all(v is None or isinstance(v, HyperConfig) for v in config.values()):
        raise TypeError(f"config: got {type(config).__name__}, wanted a HyperConfig, or a dict of them by patterns")
    for pattern in config:
        if not isinstance(pattern, (str, re.Pattern)):
            raise TypeError(f"config: got the key {pattern!r}, wanted a regular expression of names")
    try:
        patterns = {re.compile(pattern): own for pattern, own in config.items()}
    except re.error as error:
        raise ValueError(f"config: got {error.pattern!r}, wanted a regular expression: {error}") from error

    for pattern in patterns:
        if not any(map(pattern.fullmatch, names)):
            raise ValueError(f"config: {pattern.pattern!r} matches no layer: {_like(pattern, names)}")

    def find(name: str) -> tuple[HyperConfig | None, str]:
        for pattern, own in patterns.items():
            if pattern.fullmatch(name):
                return own, "" if own is not None else f"config leaves {pattern.pattern!r}"
        return None, "no pattern of config matches it"

    return find
