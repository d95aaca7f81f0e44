"""What `hyperize_` did: every layer it swapped, every one it left alone and why, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn


def tell_transformers(model: nn.Module) -> None:
    """A Hugging Face model, this or what it wraps, keeps account of its hyper layers, so that `save_pretrained` saves
    them."""
    outer: list[str] = []
    for name, module in model.named_modules():
        within = any(not path or name.startswith(f"{path}.") for path in outer)
        if not within and any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__):
            from hyperkernels.huggingface import remember

            outer.append(name)
            remember(module)


@dataclass(frozen=True)
class SwappedLayer:
    """`error` is `||W - W_dense|| / ||W_dense||` of a layer that was fitted; `wanted` is the chunk that the config asks
    for, `chunk` what the layer has room for."""

    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, int]
    parameters_before: int
    parameters: int
    mode: str = "replace"
    error: float | None = None
    wanted: tuple[int, int] | None = None

    def __str__(self) -> str:
        rows, cols = self.chunk
        cropped = f", cropped from {self.wanted[0]}x{self.wanted[1]}" if self.wanted not in (None, self.chunk) else ""
        how = {"fit": "fitted ", "residual": "a change "}.get(self.mode, "")
        grown = ", more than before" if self.parameters > self.parameters_before else ""
        error = "" if self.error is None else f", relative error {self.error:.3g}"
        counts = f"{self.parameters_before:,} -> {self.parameters:,} parameters{grown}"
        return (
            f"{self.name}: {'x'.join(map(str, self.shape))} {how}in chunks of {rows}x{cols}{cropped}, {counts}{error}"
        )


class Swap(NamedTuple):
    """A layer, what stands in its place, its names in the model, and which of its parameters learned."""

    layer: nn.Module
    new: nn.Module
    names: list[str]
    learned: list[bool]

    def let_learn(self) -> None:
        """The layer's parameters, as before."""
        for parameter, learns in zip(self.layer.parameters(), self.learned):
            parameter.requires_grad_(learns)


@dataclass
class SwapReport:
    """Every layer swapped, and every layer with a weight matrix left as it was, with the reason; `print` it.

    It holds the layers that were swapped, for `restore`, and so their weights, as long as it lives.
    """

    swapped: list[SwappedLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False
    model: nn.Module | None = field(default=None, repr=False)
    swaps: list[Swap] = field(default_factory=list, repr=False)

    def restore(self) -> None:
        """Put every layer that was swapped back in its place, as it is now.

        Raises:
            ValueError: something else has come to a place since. Nothing has been restored then.
        """
        for swap in self.swaps:
            for name in swap.names:
                assert self.model is not None
                if self.model.get_submodule(name) is not swap.new:
                    raise ValueError(
                        f"model: {name!r} is no longer the layer that was put there, so nothing is restored"
                    )
        for swap in self.swaps:
            swap.let_learn()
            for name in swap.names:
                self.model.set_submodule(name, swap.layer)  # type: ignore[union-attr]
        if self.swaps and self.model is not None:
            tell_transformers(self.model)
        self.swaps.clear()

    def __str__(self) -> str:
        before = sum(layer.parameters_before for layer in self.swapped)
        after = sum(layer.parameters for layer in self.swapped)
        done = "would be swapped" if self.dry_run else "swapped"
        lines = [f"layers {done}: {len(self.swapped)}, {before:,} parameters became {after:,}"]
        lines += [f"  {layer}" for layer in self.swapped]
        lines.append(f"layers skipped: {len(self.skipped)}")
        lines += [f"  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)
