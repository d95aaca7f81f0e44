"""`save_pretrained` and `from_pretrained` of Hugging Face models whose layers `hyperize_` swapped.

Import this module, and transformers knows hyper layers: their settings are saved in `config.json` as a quantization
config, and a quantizer of that name puts them into the model that `from_pretrained` builds, before it loads. There
transformers lets other libraries change a model's layers, so that `AutoModel`, sharded files, dtypes and devices work
as for any model. (`PyTorchModelHubMixin` would want a class of ours around each model.)

Without this import transformers has no way to refuse: it warns of an "Unknown quantization type, got hyperkernels", and
of weights that are missing, and gives a model of random layers.

    >>> import hyperkernels.huggingface
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("saved/by/save_pretrained")  # doctest: +SKIP
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hyperkernels.hyper_config import HyperConfig
from hyperkernels.nn.layer import HyperLayer
from hyperkernels.nn.residual import HyperResidual
from hyperkernels.swap import hyper_layers, hyperize_
from hyperkernels.weight import AbsentWeight

NAME = "hyperkernels"
AbsentWeight._is_hf_initialized = True  # type: ignore[attr-defined] - nor can it be: a model's own code may try


@register_quantization_config(NAME)
class HyperLayersConfig(QuantizationConfigMixin):
    """Which layers of a model are hyper layers: `layers[name]` are the fields of a `HyperConfig`, and of a head that
    several have `heads[path]` is where it is first."""

    def __init__(self, layers: dict[str, dict[str, Any]], heads: dict[str, str] | None = None, **_: Any) -> None:
        self.quant_method = NAME  # type: ignore[assignment]
        self.layers, self.heads = layers, heads or {}
        known = {field.name for field in fields(HyperConfig)}
        for name, own in layers.items():
            if not isinstance(own, dict) or not own.keys() <= known:
                raise ValueError(
                    f"quantization_config: got {own!r} for {name!r}, wanted some of {', '.join(sorted(known))}"
                )

    def configs(self) -> dict[str, HyperConfig]:
        return {name: HyperConfig(**own) for name, own in self.layers.items()}


@register_quantizer(NAME)
class HyperLayersQuantizer(HfQuantizer):
    """Puts the hyper layers of a saved model into the one that is to be loaded."""

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        config: Any = self.quantization_config
        here = _names_in(model, config.layers)
        configs = {here(name): own for name, own in config.configs().items() if here(name)}
        built = {re.escape(name): replace(own, share_head=False, output_head=True) for name, own in configs.items()}
        report = hyperize_(model, built)
        swapped = {layer.name for layer in report.swapped}
        left = {name: report.skipped.get(name, "it is no such layer") for name in configs.keys() - swapped}
        if left:
            raise ValueError(f"config.json: wants hyper layers where none can be: {left}")
        self._in_files = _check_files(checkpoint_files, model, configs, here)
        for name, own in configs.items():
            model.get_submodule(name).config = own
        for path, other in config.heads.items():
            if here(path):
                model.get_submodule(here(path).rpartition(".")[0]).head = model.get_parameter(here(other))
        remember(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """What the file does not have, transformers leaves as it was made: here that is an error."""
        for names in hyper_layers(model).values():
            absent = [
                f"{names[0]}.{own}"
                for own, parameter in model.get_submodule(names[0]).named_parameters()
                if not getattr(parameter, "_is_hf_initialized", False)
                and not (parameter.is_meta and f"{names[0]}.{own}" in self._in_files)  # it stays on disk
            ]
            if absent:
                raise ValueError(f"the file has no {', '.join(absent)}, which config.json wants for a hyper layer")
        for module in model.modules():
            if isinstance(module, HyperResidual):
                module.base.requires_grad_(False)  # loading made parameters anew
        remember(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _names_in(model: Any, layers: Iterable[str]) -> Callable[[str], str]:
    """What a saved name is called in a model that has a head more than the saved one, or fewer; "" where it is not."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    if all(name in modules for name in layers):
        return str
    if any(name.startswith(prefix) and name.removeprefix(prefix) in modules for name in layers):
        return lambda name: name.removeprefix(prefix) if name.startswith(prefix) else ""
    if any(prefix + name in modules for name in layers):
        return lambda name: prefix + name
    missing = [name for name in layers if name not in modules]
    raise ValueError(f"config.json: names hyper layers {missing}, which a {type(model).__name__} does not have")


def _check_files(files: Any, model: Any, layers: Iterable[str], here: Callable[[str], str]) -> set[str]:
    """A hyper layer's tensors are those that `config.json` makes it have, or fewer, of their shapes, and no other layer
    has such: transformers would only warn. What is there, by its name here."""
    modules, known, there = dict(model.named_modules()), {*layers, ""}, set()
    within = tuple(f"{name}." for name in layers)
    wanted = {
        f"{name}.{own}": list(value.shape)
        for name in layers
        for own, value in model.get_submodule(name).state_dict().items()
    }
    for file in files or []:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, "pt") as opened:
            found = {here(key): opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
        there |= found.keys()
        for key, shape in found.items():
            owner = re.split(r"\.(?:hypernet|change)\.", key)[0]
            if owner in modules.keys() - known:
                raise ValueError(f"config.json: names no hyper layer {owner!r}, of which {file} has the tensors")
            if key.startswith(within) and shape != wanted.get(key):
                told = f"{key} of shape {wanted[key]}" if key in wanted else f"a layer without {key}"
                raise ValueError(f"config.json: wants {told}, of which {file} has one of shape {shape}")
    return there


def remember(model: Any) -> None:
    """Bring `model.config`, and what transformers knows of tied weights, in step with the hyper layers of the model."""
    found = {names[0]: layer for layer, names in hyper_layers(model).items() if hasattr(layer, "config")}
    first: dict[nn.Parameter, str] = {}
    heads = {
        f"{name}.head": first[layer.head]
        for name, layer in model.named_modules()
        if isinstance(layer, HyperLayer) and first.setdefault(layer.head, f"{name}.head") != f"{name}.head"
    }
    if found:
        layers = {name: asdict(layer.config) for name, layer in found.items()}
        model.config.quantization_config = HyperLayersConfig(layers=layers, heads=heads)  # type: ignore[call-arg]
    elif isinstance(getattr(model.config, "quantization_config", None), HyperLayersConfig):
        del model.config.quantization_config
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):  # of one that was loaded
            vars(model).pop(name, None)

    own, before = _own_ties(model), model.all_tied_weights_keys
    if type(model)._tied_weights_keys and (not own or own.keys() - before.keys()):  # they have parted, or are back
        model.config.tie_word_embeddings = bool(own)
    model._tied_weights_keys = {re.escape(path): other for path, other in (own | heads).items()}
    model.all_tied_weights_keys = own | heads


def _own_ties(model: Any) -> dict[str, str]:
    """The ties of the model's class that are there, or, before a file is loaded, will be. A layer that was swapped has
    parted from the other, and stays so when it is merged."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = (type(model)._tied_weights_keys or {}) | model.all_tied_weights_keys
    return {
        name: other
        for name, other in known.items()
        if {name, other} <= parameters.keys()
        and (name in model.all_tied_weights_keys or parameters[name] is parameters[other])
    }
