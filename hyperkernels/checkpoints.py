"""Hypernetworks that others trained, read into a `HyperNet`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from math import prod

import torch
from torch import Tensor

from hyperkernels.nn.encoders import Tasks
from hyperkernels.nn.hypernet import HyperNet
from hyperkernels.nn.trunks import MLPTrunk


def read_hypnettorch(
    state: Mapping[str, Tensor],
    targets: Mapping[str, Sequence[int]] | Sequence[Sequence[int]],
    *,
    activation: str = "relu",
    cond_in_size: int | None = None,
) -> HyperNet:
    """The `HyperNet` that generates what a hypnettorch `HMLP` or `ChunkedHMLP` of this `state_dict` does.

    Args:
        state: the `state_dict`, as `torch.load(path, weights_only=True)` gives it.
        targets: the `target_shapes` that it was built with, in their order: a list, or `{name: shape}`.
        activation: of its hidden layers, one of `AdditiveHidden`'s.
        cond_in_size: what it was built with, where it is chunked and has no embeddings of tasks: its first layer reads
            `[uncond, chunk embedding, cond]`, and its state does not tell where the chunk embedding lies. With another
            number it would generate other weights.

    Returns:
        A `HyperNet` of one flat vector. Call it with task numbers where the network has embeddings of tasks
        (`cond_id`), with `(uncond_input, tasks)` where it has both, else with z = `[uncond_input, cond_input]`. Its
        weights are applied without being formed whole, and train on.

    Raises:
        TypeError: state is no state_dict, or targets are no shapes.
        ValueError: tensors are missing, or there are some that it would not know what to do with (batch normalisation,
            chunk embeddings of each task), there is no hidden layer, or shapes do not fit. Nothing is built then.

    Source: hypnettorch 0.0.4 (github.com/chrhenning/hypnettorch): input `[uncond, chunk embedding, cond]`, a linear
    last layer, weights row by row one after another.
    """
    _check_kinds(state, targets, cond_in_size)
    shapes = dict(targets) if isinstance(targets, Mapping) else {str(n): shape for n, shape in enumerate(targets)}
    chunked = any(key.startswith("_hnet.") for key in state)
    own = {key: value for key, value in state.items() if not key.startswith("_hnet.")}  # the rest are the same tensors
    weights = [own.pop(key) for key in _numbered(own, "_layer_weight_tensors")]
    biases = [own.pop(key) for key in _numbered(own, "_layer_bias_vectors")]
    if len(weights) < 2 or len(biases) not in (0, len(weights)):
        raise ValueError(f"state: got {len(weights)} layers and {len(biases)} biases, wanted as many, and two at least")
    _check_layers(weights, biases)
    inner = [own.pop(key) for key in _numbered(own, "_internal_params")]
    count = next((n for n, value in enumerate(inner) if value.dim() > 1), 0)
    embeddings, rest = inner[:count], inner[count + len(weights) + len(biases) :]
    if own or len(rest) != chunked:
        extra = [*own, *(f"an internal tensor of shape {list(v.shape)}" for v in rest[chunked:])]
        got = extra or "no chunk embeddings"
        raise ValueError(f"state: got {got}, wanted layers and embeddings of tasks and chunks")
    size, m = weights[-1].shape
    numbers = sum(prod(shape) for shape in shapes.values())
    chunks = rest[0] if chunked else weights[0].new_zeros(1, 1)
    if len(inner) != len(embeddings) + len(weights) + len(biases) + chunked:
        raise ValueError(f"state: got {len(inner)} tensors _internal_params, one for each tensor was wanted")
    layers = [v for pair in zip_longest(weights, biases) for v in pair if v is not None]
    for n, (twin, layer) in enumerate(zip(inner[count:], layers)):
        if not torch.equal(twin, layer):
            raise ValueError(f"state: got _internal_params.{count + n} other than the layer's tensor that it is")
    if chunked:
        _check_twins(state, f"_internal_params.{len(inner) - 1}")
    if len({value.shape for value in embeddings}) > 1:
        raise ValueError(f"state: got embeddings of shapes {[list(v.shape) for v in embeddings]}, wanted them alike")
    if -(-numbers // size) != len(chunks) or (numbers != size and not chunked):
        least = (len(chunks) - 1) * size + 1 if chunked else size
        raise ValueError(f"targets: got {numbers} weights, wanted {least} to {len(chunks) * size}")
    cond, chunk_features = (embeddings[0].shape[0] if embeddings else 0), chunks.shape[1] if chunked else 0
    if chunked and not embeddings:
        if cond_in_size is None and weights[0].shape[1] > chunk_features:
            raise ValueError("cond_in_size: got None, wanted what the network was built with: its state does not tell")
        cond = cond_in_size or 0
    elif cond_in_size not in (None, cond):
        raise ValueError(f"cond_in_size: got {cond_in_size}, wanted {cond}, as the state's embeddings tell")
    uncond = weights[0].shape[1] - cond - chunk_features
    if uncond < 0 or uncond + cond == 0:
        raise ValueError(f"state: got a first layer of {list(weights[0].shape)}, too narrow for its embeddings")
    context = uncond + cond
    factory = {"dtype": weights[0].dtype, "device": weights[0].device}
    tasks = Tasks(len(embeddings), cond, beside=uncond, **factory) if embeddings else None
    net = HyperNet(
        shapes,
        layout="flat",
        chunk=size,
        width=m,
        head_bias=bool(biases),
        context_features=context,
        encoder=tasks,
        embedding_features=chunks.shape[1],
        trunk=MLPTrunk(
            [len(weight) for weight in weights[:-1]],
            chunks.shape[1],
            context_features=context,
            activation=activation,
            **factory,
        ),
        **factory,
    )
    first = weights[0]
    columns = torch.arange(first.shape[1])
    of_chunk = (columns >= uncond) & (columns < uncond + chunk_features)
    loaded = {
        "scales": torch.ones(len(shapes)),
        "embedding": chunks,
        "heads.0": weights[-1].T,
        "trunk.chunk_layer.weight": first[:, of_chunk] if chunked else first.new_zeros(len(first), 1),
        "trunk.context_layer.weight": first[:, ~of_chunk],
        **{f"trunk.layers.{n}.weight": weight for n, weight in enumerate(weights[1:-1])},
    }
    hidden = biases[:-1] if biases else [weight.new_zeros(len(weight)) for weight in weights[:-1]]
    loaded |= {"trunk.chunk_layer.bias": hidden[0]}
    loaded |= {f"trunk.layers.{n}.bias": bias for n, bias in enumerate(hidden[1:])}
    if biases:
        loaded["head_biases.0"] = biases[-1]
    if embeddings:
        loaded["encoder.weight"] = torch.stack(embeddings)
    net.load_state_dict(loaded)
    return net


def _check_kinds(state: object, targets: object, cond_in_size: object) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise TypeError(f"state: got {type(state).__name__}, wanted the tensors by name of a state_dict")
    listed = isinstance(targets, Sequence) and all(isinstance(shape, Sequence) for shape in targets)
    if isinstance(targets, str) or not (isinstance(targets, Mapping) or listed):
        raise TypeError(f"targets: got {targets!r}, wanted a list of shapes, or {{name: shape}}")
    if cond_in_size is None:
        return
    if not isinstance(cond_in_size, int) or isinstance(cond_in_size, bool) or cond_in_size < 0:
        raise ValueError(f"cond_in_size: got {cond_in_size!r}, wanted 0 or more")


def _check_layers(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    before = weights[0].shape[-1]
    for n, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != before:
            got = list(weight.shape)
            raise ValueError(f"state: got _layer_weight_tensors.{n} of shape {got}, wanted [*, {before}]")
        before = weight.shape[0]
        if biases and biases[n].shape != (before,):
            got = list(biases[n].shape)
            raise ValueError(f"state: got _layer_bias_vectors.{n} of shape {got}, wanted [{before}]")


def _check_twins(state: Mapping[str, Tensor], of_chunks: str) -> None:
    """A chunked network has every tensor twice, but those of its chunks: by its own name and its inner network's."""
    own = {key: v for key, v in state.items() if not key.startswith("_hnet.") and key != of_chunks}
    twins = {key.removeprefix("_hnet."): v for key, v in state.items() if key.startswith("_hnet.")}
    for key in sorted(own.keys() ^ twins.keys()):
        raise ValueError(f"state: got {key} without its twin _hnet.{key}, or the other way round")
    for key, value in own.items():
        if not torch.equal(value, twins[key]):
            raise ValueError(f"state: got {key} of shape {list(value.shape)}, and another of _hnet.{key}")


def _numbered(state: Mapping[str, Tensor], name: str) -> list[str]:
    """Keys `name.0`, `name.1` and so on, none left out."""
    found = [key for key in state if key.startswith(f"{name}.")]
    wanted = [f"{name}.{n}" for n in range(len(found))]
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ValueError(f"state: wanted {', '.join(missing)}, got none")
    return wanted
