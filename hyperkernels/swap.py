"""Hyper layers into a model that somebody else wrote, and generated weights back out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyperkernels.backends import check_backend
from hyperkernels.call import check_order
from hyperkernels.nn.ambient import context as ambient_context
from hyperkernels.nn.conv import HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d
from hyperkernels.nn.layer import HyperLayer
from hyperkernels.nn.linear import HyperLinear

Kind = TypeVar("Kind", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]
HYPER: dict[type, Any] = {
    nn.Linear: HyperLinear,
    nn.Conv1d: HyperConv1d,
    nn.Conv2d: HyperConv2d,
    nn.Conv3d: HyperConv3d,
    nn.ConvTranspose2d: HyperConvTranspose2d,
}
READS_WEIGHTS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


@dataclass(frozen=True)
class HyperConfig:
    """What `hyperize_` builds: the keywords of `HyperLinear` and `HyperConv2d`. `bias` None keeps a layer's own choice.

    Raises:
        ValueError: an unknown order or backend.
    """

    chunk: tuple[int, int] | None = None
    width: int = 32
    context_features: int | None = None
    bias: bool | str | None = None
    order: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        check_order(self.order)
        check_backend(self.backend)


@dataclass(frozen=True)
class SwappedLayer:
    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, int]
    parameters_before: int
    parameters: int


@dataclass
class SwapReport:
    """Every layer swapped, and every layer with a weight matrix left as it was, with the reason; `print` it."""

    swapped: list[SwappedLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        before = sum(layer.parameters_before for layer in self.swapped)
        after = sum(layer.parameters for layer in self.swapped)
        lines = [f"layers swapped: {len(self.swapped)}, {before:,} parameters became {after:,}"]
        for layer in self.swapped:
            rows, cols = layer.chunk
            grown = ", more than before" if layer.parameters > layer.parameters_before else ""
            counts = f"{layer.parameters_before:,} -> {layer.parameters:,} parameters{grown}"
            lines.append(f"  {layer.name}: {'x'.join(map(str, layer.shape))} in chunks of {rows}x{cols}, {counts}")
        lines.append(f"layers skipped: {len(self.skipped)}")
        lines += [f"  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def hyperize_(model: nn.Module, config: HyperConfig | None = None, filter_fn: Filter | None = None) -> SwapReport:
    """Put a freshly initialised `HyperLinear` in the place of every `nn.Linear` of `model`, and a hyper
    convolution in that of every `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` and `nn.ConvTranspose2d`, in place.

    Args:
        model: any module. A layer found under several names stays one layer.
        config: what to build; `HyperConfig()` by default.
        filter_fn: `filter_fn(layer, name)` is True for a layer to swap; all by default.

    The new layers keep dtype, device, training mode and whether parameters are frozen. Left alone, with the reason
    in the report: subclasses of these, the model itself, parts of a hyper layer, layers whose weight is shared
    or parametrized or read by their owner, and layers with hooks.

    Raises:
        TypeError: model is no module, or config no HyperConfig.
        ValueError: the config does not fit a layer. Nothing has been swapped then.

    Example:
        >>> import torch, hyperkernels as hk
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> report = hk.hyperize_(model, hk.HyperConfig(width=4), lambda layer, name: layer.out_features > 8)
        >>> [layer.name for layer in report.swapped], report.skipped
        (['0'], {'2': 'filter_fn said no'})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    config = HyperConfig() if config is None else config
    if not isinstance(config, HyperConfig):
        raise TypeError(f"config: got {type(config).__name__}, wanted a HyperConfig")
    report, built = SwapReport(skipped=_other_matrices(model)), {}
    names = _names(model, tuple(HYPER))
    for layer, found in names.items():
        reason = _reason_to_skip(model, layer, found, filter_fn)
        if reason:
            report.skipped[found[0]] = reason
            continue
        try:
            built[layer] = _hyper_layer_like(layer, config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"config: does not fit {found[0]!r}: {error}") from error
        report.swapped.append(
            SwappedLayer(
                found[0],
                tuple(layer.weight.shape),
                built[layer].chunk,
                sum(p.numel() for p in layer.parameters()),
                sum(p.numel() for p in built[layer].parameters()),
            )
        )
    for layer, new in built.items():
        for name in names[layer]:
            model.set_submodule(name, new)
    return report


def _other_matrices(model: nn.Module) -> dict[str, str]:
    """Other layers that hold a matrix or more: nobody should wonder why they were not swapped."""
    found = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() > 1 and not isinstance(module, (*HYPER, nn.Embedding)):
            found[name] = f"it is a {type(module).__name__}, neither nn.Linear nor nn.Conv"
    return found


def merge_(model: nn.Module, context: Tensor | None = None) -> nn.Module:
    """Put an `nn.Linear` or `nn.Conv2d` (or 1d, 3d) with the generated weight in the place of every hyper layer of
    `model`, in place.

    Args:
        model: any module; a hyper layer itself comes back as the dense one.
        context: `[context_features]` or `[1, context_features]`, the one context whose weights stay; only for
            conditional layers. The ambient `hyperkernels.context` does as well.

    Returns:
        The model.

    Memory: this forms all the weights, and keeps them, trainable.

    Raises:
        TypeError: model is no module.
        ValueError: a conditional layer finds no context, or more than one. Nothing has been merged then.

    Example:
        >>> import torch, hyperkernels as hk
        >>> model = torch.nn.Sequential(hk.HyperLinear(64, 8, width=4), torch.nn.ReLU())
        >>> hk.merge_(model)
        Sequential(
          (0): Linear(in_features=64, out_features=8, bias=True)
          (1): ReLU()
        )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    names = _names(model, HyperLayer)
    if context is None:
        built = {layer: layer.to_dense() for layer in names}
    else:
        with ambient_context(context):
            built = {layer: layer.to_dense() for layer in names}
    for layer, new in built.items():
        if layer is model:
            return new
        for name in names[layer]:
            model.set_submodule(name, new)
    return model


def _names(model: nn.Module, kind: type[Kind] | tuple[type[Kind], ...]) -> dict[Kind, list[str]]:
    """Each module of a kind, with every name it goes by."""
    names: dict[Kind, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            names.setdefault(module, []).append(name)
    return names


def _reason_to_skip(model: nn.Module, layer: Any, names: list[str], filter_fn: Filter | None) -> str:
    if layer is model:
        return "it is the model itself: build a hyper layer instead"
    if type(layer) not in HYPER:
        return f"it is a {type(layer).__name__}, whose owner may read its weight"
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized"
    if layer._parameters.get("weight") is None:
        return "its weight is no plain parameter"
    parents = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    reader = next((parent for parent in parents if isinstance(parent, READS_WEIGHTS)), None)
    if reader is not None:
        return f"its {type(reader).__name__} reads its weight"
    if any(_inside_hyper_layer(model, name) for name in names):
        return "it is part of a hyper layer"
    owners = [n for n, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]
    if len(owners) > len(names):
        return f"its weight is shared with {next(n for n in owners if n.rpartition('.')[0] not in names)}"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it has hooks"
    if filter_fn is not None and not filter_fn(layer, names[0]):
        return "filter_fn said no"
    return ""


def _inside_hyper_layer(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:n])), HyperLayer) for n in range(len(parts)))


def _hyper_layer_like(layer: Any, config: HyperConfig) -> HyperLayer:
    bias = (layer.bias is not None) if config.bias is None else config.bias
    given: dict[str, Any] = {
        "bias": bias,
        "context_features": config.context_features,
        "chunk": config.chunk,
        "width": config.width,
        "device": layer.weight.device,
        "dtype": layer.weight.dtype,
    }
    if isinstance(layer, nn.Linear):
        new = HyperLinear(layer.in_features, layer.out_features, **given)
    else:
        kind, sizes = HYPER[type(layer)], (layer.in_channels, layer.out_channels, layer.kernel_size)
        new = kind(*sizes, **{name: getattr(layer, name) for name in kind.SETTINGS}, **given)
    new.order, new.backend = config.order, config.backend
    new.train(layer.training).requires_grad_(layer.weight.requires_grad)
    if new.bias is not None and layer.bias is not None:
        new.bias.requires_grad_(layer.bias.requires_grad)
    return new
