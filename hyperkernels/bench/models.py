"""Language models that nobody rewrote: dense, and with every linear layer of their blocks swapped by `hyperize_`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hyperkernels as hk
from hyperkernels.bench.case import OURS, Case, Contestants
from hyperkernels.bench.linear import unusual
from hyperkernels.nn.layer import weight_of

VOCABULARY = 50_257
LAYERS = 12  # GPT-2's, of 124M


def title(layers: int) -> str:
    size = "of 124M" if layers == LAYERS else f"of {layers} layers"
    return f"GPT-2 {size}, every linear of its blocks hyperized, m=32"


def gpt2(context_features: int | None = None, layers: int = LAYERS, **like: Any) -> tuple[Any, Any]:
    """The dense model and the same one swapped, of the device and dtype in `like`; without contexts dense has the
    weights that the other generates."""
    transformers: Any = import_module("transformers")
    dense = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers)).eval().to(**like)
    hyper = copy.deepcopy(dense)
    hk.hyperize_(hyper, hk.HyperConfig(width=32, context_features=context_features))
    if context_features is None:
        with torch.no_grad():
            for name, layer in hyper.named_modules():
                if isinstance(layer, hk.HyperLinear):
                    formed, own = layer.to_dense(), dense.get_submodule(name)
                    weight_of(own).copy_(weight_of(formed))
                    own.bias.copy_(formed.bias)
    return dense, hyper


def linears(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """Those of the blocks, and how many features they take, the dense ones too."""
    found = []
    for layer in model.modules():
        if isinstance(layer, hk.HyperLinear):
            found.append((layer, layer.in_features))
        elif type(layer).__name__ == "Conv1D":
            found.append((layer, layer.weight.shape[0]))  # type: ignore[union-attr, index]
    return found


def inputs_of(model: nn.Module, *lead: int, train: bool = False) -> list[Tensor]:
    """One for each of its linears."""
    like = next(model.parameters())
    return [torch.randn(*lead, n, device=like.device, dtype=like.dtype, requires_grad=train) for _, n in linears(model)]


def run_linears(model: nn.Module, inputs: list[Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Forward, and for inputs that want gradients backward."""
    layers = [layer for layer, _ in linears(model)]

    def run() -> dict[str, Tensor]:
        found = {}
        for n, (layer, x) in enumerate(zip(layers, inputs)):
            with torch.set_grad_enabled(x.requires_grad):
                y = layer(x)
                if x.requires_grad:
                    y.backward(y.detach())
                    layer.zero_grad()
                    x.grad = None
            found[str(n)] = y.detach()
        return found

    return run


def run_attention(
    B: int, tokens: int, past: int, layers: int, *, train: bool = False, **like: Any
) -> Callable[[], None]:
    """Of every layer, its 12 heads of 64: what a block does beside its linear layers, but for norms and activations."""
    shapes = (B, 12, tokens, 64), (B, 12, past + tokens, 64), (B, 12, past + tokens, 64)
    q, k, v = (torch.randn(shape, requires_grad=train, **like) for shape in shapes)

    def run() -> None:
        with torch.set_grad_enabled(train):
            for _ in range(layers):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1)
                if train:
                    y.backward(y.detach())

    return run


def exact_logits(dense: Any, tokens: Tensor) -> Callable[[], dict[str, Tensor]]:
    def exact() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": copy.deepcopy(dense).double()(tokens).logits[:, -1]}

    return exact


def decode(layers: int = LAYERS, past: int = 256, **like: Any) -> Case:
    """One token of one request, some tokens after the first; beside it what its parts take. What they leave is norms,
    activations and torch's own calls."""
    dense, hyper = gpt2(layers=layers, **like)
    tokens = torch.randint(VOCABULARY, (1, past + 1), device=dense.device)

    def after_prompt(model: Any) -> Callable[[], dict[str, Tensor]]:
        name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
        with torch.inference_mode():
            cache = model(tokens[:, :-1], use_cache=True)[name]

        def run() -> dict[str, Tensor]:
            with torch.inference_mode():
                logits = model(tokens[:, -1:], **{name: cache}, use_cache=True).logits[:, -1]
                cache.crop(-1)
            return {"logits": logits}

        return run

    def head() -> None:
        with torch.inference_mode():
            dense.lm_head(torch.ones(1, 1, 768, **like))

    parts: Contestants = {
        "of it the linears, dense": run_linears(dense, inputs_of(dense, 1, 1)),
        "of ours the linears": run_linears(hyper, inputs_of(hyper, 1, 1)),
        "of both the attention": run_attention(1, 1, past, layers, **like),
        "of both the output head": head,
    }
    return Case(
        f"decode a token, {title(layers)}" + unusual(dense.dtype),
        {"dense": after_prompt(dense), **parts, OURS: after_prompt(hyper)},
        exact_logits(dense, tokens),
        "dense",
        parts=tuple(parts),
        values={"B": 1},
    )


def only_linears(B: int, layers: int = LAYERS, **like: Any) -> Case:
    dense, hyper = gpt2(layers=layers, **like)
    inputs = inputs_of(dense, 1, B)
    return Case(
        f"forward of the hyperized linears alone, {B} token{'s' * (B > 1)}, {title(layers)}" + unusual(dense.dtype),
        {"dense": run_linears(dense, inputs), OURS: run_linears(hyper, inputs)},
        lambda: run_linears(copy.deepcopy(dense).double(), [x.double() for x in inputs])(),
        "dense",
        values={"B": B},
    )


def step(B: int, T: int, layers: int = LAYERS, **like: Any) -> Case:
    """Forward and backward; beside it what its parts take. It has dropout, and is judged without."""
    dense, hyper = gpt2(layers=layers, **like)
    device = dense.device
    tokens = torch.randint(VOCABULARY, (B, T), device=device)
    labels = torch.randint(VOCABULARY, (B * T,), device=device)
    activations = torch.randn(B * T, 768, requires_grad=True, **like)
    head = nn.Linear(768, VOCABULARY, bias=False, **like)

    def train(model: Any) -> None:
        model.train()
        F.cross_entropy(model(tokens).logits.flatten(0, 1), labels).backward()
        model.zero_grad()  # here, so that gradients are memory of the step that made them

    def train_head() -> None:
        F.cross_entropy(head(activations), labels).backward()
        head.zero_grad()
        activations.grad = None

    parts: Contestants = {
        "of it the linears, dense": run_linears(dense, inputs_of(dense, B, T, train=True)),
        "of ours the linears": run_linears(hyper, inputs_of(hyper, B, T, train=True)),
        "of both the attention": run_attention(B, T, 0, layers, train=True, **like),
        "of both the output head and the loss": train_head,
    }

    def small_step(model: Any) -> dict[str, Tensor]:
        """Without dropout. The embeddings' gradient comes through every layer; the heads' are ours alone."""
        logits = model.eval()(tokens[:1, :16]).logits[0]
        heads = [layer.head for layer in model.modules() if isinstance(layer, hk.HyperLinear)]
        leaves = [model.get_input_embeddings().weight, *heads]
        first, *others = torch.autograd.grad(F.cross_entropy(logits, labels[:16]), leaves)
        found = {"logits": logits.detach(), "dembedding": first}
        return found | ({"dheads": torch.cat([v.flatten() for v in others])} if others else {})

    def exact() -> dict[str, Tensor]:
        high = copy.deepcopy(hyper).double()
        for layer in high.modules():
            if isinstance(layer, hk.HyperLinear):
                layer.backend = "reference"
        return small_step(high) | small_step(copy.deepcopy(dense).double())

    evaluated: Contestants = {"dense": lambda: small_step(dense), OURS: lambda: small_step(hyper)}
    return Case(
        f"forward and backward, batch {B} x {T}, {title(layers)}" + unusual(dense.dtype),
        {"dense": lambda: train(dense), **parts, OURS: lambda: train(hyper)},
        proof=Case("", evaluated, exact, "dense"),
        parts=tuple(parts),
        values={"B": B * T},
    )


def serving(requests: int, tasks: int, T: int, layers: int = LAYERS, **like: Any) -> Case:
    """Requests of many tasks in one batch, each with its task's weights: against the same model task by task, and a
    dense model for each task."""
    _, hyper = gpt2(context_features=16, layers=layers, **like)
    z, which = torch.randn(tasks, 16, **like), torch.arange(requests, device=hyper.device) % tasks
    tokens = torch.randint(VOCABULARY, (requests, T), device=hyper.device)
    separate = [hk.merge_(copy.deepcopy(hyper), own) for own in z]

    @torch.no_grad()
    def mixed() -> dict[str, Tensor]:
        with hk.context(z, context_ids=which):
            return {"logits": hyper(tokens, logits_to_keep=1).logits}

    @torch.no_grad()
    def by_task(run: Callable[[int, Tensor], Tensor]) -> dict[str, Tensor]:
        found = [run(task, tokens[which == task]) for task in range(tasks)]
        logits = found[0].new_empty(requests, 1, VOCABULARY)
        for task in range(tasks):
            logits[which == task] = found[task]
        return {"logits": logits}

    def hyper_alone(task: int, own: Tensor) -> Tensor:
        with hk.context(z[task]):
            return hyper(own, logits_to_keep=1).logits

    def dense_alone(task: int, own: Tensor) -> Tensor:
        return separate[task](own, logits_to_keep=1).logits

    def exact(task: int, own: Tensor) -> Tensor:
        return copy.deepcopy(separate[task]).double()(own, logits_to_keep=1).logits

    return Case(
        f"forward, {requests} requests of {tasks} tasks, {T} tokens each, {title(layers)}" + unusual(hyper.dtype),
        {
            "hyper, task by task": lambda: by_task(hyper_alone),
            "dense, a model for each task": lambda: by_task(dense_alone),
            OURS: mixed,
        },
        lambda: by_task(exact),
        "dense, a model for each task",
        values={"B": requests * T, "contexts": tasks},
    )
