"""Hyper layers into a model that somebody else wrote, and generated weights back out of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyperkernels.hyper_config import HyperConfig, configs_by_name
from hyperkernels.nn.ambient import context as ambient_context
from hyperkernels.nn.conv import HyperConv1d, HyperConv2d, HyperConv3d, HyperConvTranspose2d
from hyperkernels.nn.layer import HyperLayer, weight_of
from hyperkernels.nn.linear import HyperLinear
from hyperkernels.nn.residual import HyperResidual
from hyperkernels.nn.targets import Found, check_filter, cut
from hyperkernels.swap_report import Swap, SwappedLayer, SwapReport, tell_transformers

Filter = Callable[[nn.Module, str], bool]
HYPER: dict[type, Any] = {
    nn.Linear: HyperLinear,
    nn.Conv1d: HyperConv1d,
    nn.Conv2d: HyperConv2d,
    nn.Conv3d: HyperConv3d,
    nn.ConvTranspose2d: HyperConvTranspose2d,
}


def hyperize_(
    model: nn.Module,
    config: HyperConfig | Mapping[str, HyperConfig | None] | None = None,
    filter_fn: Filter | None = None,
    *,
    dry_run: bool = False,
) -> SwapReport:
    """Put a `HyperLinear` in the place of every `nn.Linear` of `model` (and of the `Conv1D` of transformers, a linear
    layer), and a hyper convolution in that of every `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` and `nn.ConvTranspose2d`.

    Args:
        model: any module. A layer found under several names stays one layer.
        config: what to build; `HyperConfig()` by default. Or a mapping of regular expressions to configs: the first
            that matches a layer's whole name counts, None leaves it, and so does no match.
        filter_fn: `filter_fn(layer, name)` is True for a layer to swap; all by default.
        dry_run: report only. Nothing is fitted, built on a device or changed.

    The new layers keep dtype, device (meta as well), training mode and whether parameters are frozen, and for whoever
    reads their `weight` it is a `GeneratedWeight`. Left alone, with the reason in the report: subclasses of these, the
    model itself, layers whose weight is shared or parametrized, and layers with hooks. Into hyper layers nobody looks.

    A Hugging Face model that is swapped so is saved by `save_pretrained` and comes back by `from_pretrained`, once
    `hyperkernels.huggingface` has been imported: before that transformers only warns, and its layers are random.

    Returns:
        A report to print; `report.restore()` puts the layers back.

    Raises:
        TypeError: model is no module, filter_fn no function, or config nothing of the kind above.
        ValueError: the config does not fit a layer, or a pattern matches none. Nothing has been swapped then.

    Example:
        >>> import torch, hyperkernels as hk
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> report = hk.hyperize_(model, hk.HyperConfig(width=4), lambda layer, name: layer.out_features > 8)
        >>> [layer.name for layer in report.swapped], report.skipped
        (['0'], {'2': 'filter_fn said no'})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    check_filter(filter_fn)
    report, built, configs = SwapReport([], _other_matrices(model), dry_run, model), {}, {}
    names = _names(model, lambda module: _hyper_kind(module) is not None or isinstance(module, tuple(HYPER)))
    called = _called(model)
    config_of = configs_by_name(HyperConfig() if config is None else config, [found[0] for found in names.values()])
    for layer, found in names.items():
        own, reason = config_of(found[0])
        reason = _reason_to_skip(model, called, layer, found, own) or reason
        if not reason and filter_fn is not None and not filter_fn(layer, found[0]):
            reason = "filter_fn said no"
        if reason or own is None:
            report.skipped[found[0]] = reason
            continue
        try:
            built[layer] = _hyper_layers_like(layer, own, dry_run)
        except (TypeError, ValueError) as error:
            raise ValueError(f"config: does not fit {found[0]!r}: {error}") from error
        first, configs[layer] = built[layer][0], own
        report.swapped.append(
            SwappedLayer(
                found[0],
                tuple(weight_of(layer).shape),
                first.chunk,
                sum(p.numel() for p in layer.parameters()),
                sum(p.numel() for part in built[layer] for p in part.parameters()),
                own.mode,
                first.fit_error,
                own.chunk,
            )
        )
    if not dry_run:
        _share_heads([part for layer, parts in built.items() if configs[layer].share_head for part in parts])
        places = {}
        for layer, parts in built.items():
            learned = [parameter.requires_grad for parameter in layer.parameters()]
            new: Any = parts[0]
            if configs[layer].mode == "residual":  # what is another's as well goes on learning there, a copy is frozen
                new = HyperResidual(copy.deepcopy(layer) if _shared(called, layer, names[layer]) else layer, parts)
                new.train(layer.training)
            else:
                _keep_shared_bias(called, layer, new, names[layer])
            new.config = configs[layer] if configs[layer].rank else replace(configs[layer], chunk=parts[0].chunk)
            places |= dict.fromkeys(names[layer], new)
            report.swaps.append(Swap(layer, new, names[layer], learned))
        try:
            _put(model, places)
        except BaseException:
            for swap in report.swaps:
                swap.let_learn()
            raise
    return report


def _hyper_kind(layer: Any) -> Any:
    """The hyper layer for a dense one."""
    kind = type(layer)
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return HyperLinear
    return HYPER.get(kind)


def _share_heads(layers: list[HyperLayer]) -> None:
    heads: dict[Any, nn.Parameter] = {}
    for layer in layers:
        head = layer.head
        layer.head = heads.setdefault((head.shape, head.dtype, head.device, layer.fan_in), head)


def _other_matrices(model: nn.Module) -> dict[str, str]:
    """Other layers that hold a matrix or more: nobody should wonder why they were not swapped."""
    found = {}
    known = (*HYPER, nn.Embedding, HyperLayer, HyperResidual)
    for module, (name, *_) in _names(
        model, lambda module: not (isinstance(module, known) or _hyper_kind(module))
    ).items():
        for own, parameter in module.named_parameters(recurse=False):
            stacked = parameter.dim() > 2 and min(parameter.shape) > 1  # experts, one on another
            if stacked or (parameter.dim() > 1 and "weight" in own):
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

    Memory: this forms all the weights, and keeps them, trainable. A bias that another module has too stays shared.

    Raises:
        TypeError: model is no module.
        ValueError: a conditional layer finds no context, or more than one; or there is a context and no conditional
            layer. Nothing has been merged then.

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
    names = hyper_layers(model)
    parts = (part for layer in names for part in layer.modules() if isinstance(part, HyperLayer))
    if context is not None and all(part.context_features is None for part in parts):
        raise ValueError("context: got one, wanted None: no layer of the model is conditional")
    if context is None:
        built = {layer: layer.to_dense() for layer in names}
    else:
        with ambient_context(context):
            built = {layer: layer.to_dense() for layer in names}
    if model in built:
        return built[model]
    called = _called(model)
    for layer, dense in built.items():
        _keep_shared_bias(called, layer, dense, names[layer])
    _put(model, {name: new for layer, new in built.items() for name in names[layer]})
    return model


def _put(model: nn.Module, places: Mapping[str, nn.Module]) -> None:
    """Each where it is named, or, if anything raises, none."""
    before = {name: model.get_submodule(name) for name in places}
    try:
        for name, new in places.items():
            model.set_submodule(name, new)
        tell_transformers(model)
    except BaseException:
        for name, old in before.items():
            if model.get_submodule(name) is not old:
                model.set_submodule(name, old)
        raise


def _names(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[Any, list[str]]:
    """Each module that is wanted and no part of a hyper layer, with every name it goes by."""
    outer = [module for module in model.modules() if isinstance(module, (HyperLayer, HyperResidual))]
    parts = {part for layer in outer for part in layer.modules() if part is not layer}
    names: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in parts and wanted(module):
            names.setdefault(module, []).append(name)
    return names


def hyper_layers(model: nn.Module) -> dict[Any, list[str]]:
    """Each hyper layer, but those that are part of another, with every name it goes by."""
    return _names(model, lambda module: isinstance(module, (HyperLayer, HyperResidual)))


def _reason_to_skip(
    model: nn.Module, called: dict[Any, list[str]], layer: Any, names: list[str], config: HyperConfig | None
) -> str:
    if layer is model:
        return "it is the model itself: build a hyper layer instead"
    if _hyper_kind(layer) is None:
        return f"it is a {type(layer).__name__}, whose owner may read its weight"
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized"
    if layer._parameters.get("weight") is None:
        return "its weight is no plain parameter"
    if not (config is not None and config.output_head):
        shared = _shared(called, layer, names)
        if shared:
            return shared
        if layer is getattr(model, "get_output_embeddings", lambda: None)():
            return "it is the output head: HyperConfig(output_head=True) swaps it"
    if any(hooks for name, hooks in vars(layer).items() if name.endswith("_hooks")):
        return "it has hooks"
    if layer.weight._backward_hooks or layer.weight._post_accumulate_grad_hooks:
        return "its weight has hooks"
    if "forward" in vars(layer):  # as accelerate gives one, to move what is elsewhere
        return "it has a forward of its own"
    return ""


def _shared(called: dict[Any, list[str]], layer: Any, names: list[str]) -> str:
    """Which of the layer's parameters another module has as well; "" for none."""
    for own, parameter in layer.named_parameters():
        if other := _also(called, parameter, names):
            return f"its {own} is shared with {other}"
    return ""


def _called(model: nn.Module) -> dict[Any, list[str]]:
    """Every name of each parameter."""
    called: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        called.setdefault(parameter, []).append(name)
    return called


def _keep_shared_bias(called: dict[Any, list[str]], layer: Any, new: Any, names: list[str]) -> None:
    """The weight alone parts from what else has the bias: else its other owner would keep one that nothing reads."""
    if new.bias is not None and _also(called, layer.bias, names):
        new.bias = layer.bias


def _also(called: dict[Any, list[str]], parameter: Tensor | None, names: list[str]) -> str:
    """What the parameter is called outside of the modules of these names."""
    return next((name for name in called.get(parameter, ()) if name.rpartition(".")[0] not in names), "")


def _hyper_layers_like(layer: Any, config: HyperConfig, dry_run: bool) -> list[HyperLayer]:
    """What is to stand for a dense layer, or be added to it; of a dry run on no device."""
    kind, weight = _hyper_kind(layer), layer.weight
    sizes = kind._sizes_of(layer)
    chunk = None
    if config.chunk is not None:
        found = Found(tuple(weight_of(layer).shape), getattr(layer, "groups", 1), getattr(layer, "transposed", False))
        chunk = cut("", found, config.chunk, config.width, "chunk", "row").chunk[:2]
    given: dict[str, Any] = {"width": config.width, "context_features": config.context_features}
    given["device"] = "meta" if dry_run else weight.device
    if config.mode == "fit":
        layers = [kind.from_dense(layer, chunk=chunk, **given)]
    else:
        given["dtype"] = weight.dtype
        bias = False if config.mode == "residual" else (layer.bias is not None) if config.bias is None else config.bias
        if config.rank is None:
            layers = [kind(**sizes, chunk=chunk, bias=bias, **given)]
        else:
            layers = _low_rank(kind, sizes, config.rank, **given)
    for new in layers:
        new.order, new.backend, new.dense = config.order, config.backend, type(layer)
        new.train(layer.training).requires_grad_(config.mode == "residual" or weight.requires_grad)
        if new.bias is not None and layer.bias is not None:
            new.bias.requires_grad_(layer.bias.requires_grad)
    return layers


def _low_rank(kind: Any, sizes: dict[str, Any], rank: int, **given: Any) -> list[HyperLayer]:
    """Down to `rank` features or channels, and up."""
    if kind is HyperLinear:
        N, K = sizes["out_features"], sizes["in_features"]
        return [HyperLinear(K, rank, False, **given), HyperLinear(rank, N, False, **given)]
    if kind is HyperConvTranspose2d or sizes["groups"] != 1:
        raise ValueError(f"rank: got {rank}, wanted None for a transposed convolution, or one in groups")
    channels = sizes["out_channels"]
    return [kind(**sizes | {"out_channels": rank}, bias=False, **given), kind(rank, channels, 1, bias=False, **given)]
