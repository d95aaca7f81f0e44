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
from hyperkernels.bench.case import OURS, Case, Contestants, assert_right
from hyperkernels.nn.layer import weight_of

VOCABULARY = 50_257
LAYERS = 12  # GPT-2's, of 124M


def title(layers: int) -> str:
    size = "of 124M" if layers == LAYERS else f"of {layers} layers"
    return f"GPT-2 {size}, every linear of its blocks hyperized, m=32"


def gpt2(context_features: int | None = None, layers: int = LAYERS) -> tuple[Any, Any]:
    """The dense model and the same one swapped; without contexts dense has the weights that the other generates."""
    transformers: Any = import_module("transformers")
    dense = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers)).eval()
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


def run_linears(model: nn.Module, *lead: int, train: bool = False) -> Callable[[], Any]:
    layers = linears(model)
    inputs = [torch.randn(*lead, features, requires_grad=train) for _, features in layers]

    def run() -> None:
        with torch.set_grad_enabled(train):
            for (layer, _), x in zip(layers, inputs):
                if train:
                    layer.zero_grad()
                y = layer(x)
                if train:
                    y.backward(y.detach())

    return run


def run_attention(B: int, tokens: int, past: int, layers: int, *, train: bool = False) -> Callable[[], None]:
    """Of every layer, its 12 heads of 64: what a block does beside its linear layers, but for norms and activations."""
    shapes = (B, 12, tokens, 64), (B, 12, past + tokens, 64), (B, 12, past + tokens, 64)
    q, k, v = (torch.randn(shape, requires_grad=train) for shape in shapes)

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


def decode(layers: int = LAYERS, past: int = 256) -> Case:
    """One token of one request, some tokens after the first; beside it what its parts take. What they leave is norms,
    activations and torch's own calls."""
    dense, hyper = gpt2(layers=layers)
    tokens = torch.randint(VOCABULARY, (1, past + 1))

    def after_prompt(model: Any) -> Callable[[], dict[str, Tensor]]:
        name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
        with torch.inference_mode():
            cache = model(tokens[:, :-1], use_cache=True).past_key_values

        def run() -> dict[str, Tensor]:
            with torch.inference_mode():
                logits = model(tokens[:, -1:], **{name: cache}, use_cache=True).logits[:, -1]
                cache.crop(-1)
            return {"logits": logits}

        return run

    def head() -> None:
        with torch.inference_mode():
            dense.lm_head(torch.ones(1, 1, 768))

    contestants: Contestants = {
        "dense": after_prompt(dense),
        "of it the linears, dense": run_linears(dense, 1, 1),
        "of ours the linears": run_linears(hyper, 1, 1),
        "of both the attention": run_attention(1, 1, past, layers),
        "of both the output head": head,
        OURS: after_prompt(hyper),
    }
    name = f"decode a token, {title(layers)}"
    return Case(name, contestants, exact_logits(dense, tokens), "dense", values={"B": 1, "past": past})


def only_linears(B: int, *, train: bool = False, layers: int = LAYERS) -> Case:
    dense, hyper = gpt2(layers=layers)
    found = linears(dense)
    inputs = [torch.randn(1, B, features) for _, features in found]

    def outputs(model: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            dtype = next(model.parameters()).dtype
            pairs = enumerate(zip(linears(model), inputs))
            return {str(n): layer(x.to(dtype)) for n, ((layer, _), x) in pairs}

    contestants: Contestants = {
        "dense": run_linears(dense, 1, B, train=train),
        OURS: run_linears(hyper, 1, B, train=train),
    }
    what = "forward and backward" if train else "forward"
    name = f"{what} of the hyperized linears alone, {B} token{'s' * (B > 1)}, {title(layers)}"

    def check() -> None:
        exact = outputs(copy.deepcopy(dense).double())
        judged = Case("", {"dense": lambda: outputs(dense), OURS: lambda: outputs(hyper)}, lambda: exact, "dense")
        assert_right(judged)

    return Case(name, contestants, check=check, values={"B": B, "train": train})


def step(B: int, T: int, layers: int = LAYERS) -> Case:
    dense, hyper = gpt2(layers=layers)
    tokens, labels = torch.randint(VOCABULARY, (B, T)), torch.randint(VOCABULARY, (B * T,))
    activations, head = torch.randn(B * T, 768, requires_grad=True), nn.Linear(768, VOCABULARY, bias=False)

    def train(model: Any) -> None:
        model.train()
        model.zero_grad()
        F.cross_entropy(model(tokens).logits.flatten(0, 1), labels).backward()

    def train_head() -> None:
        head.zero_grad()
        F.cross_entropy(head(activations), labels).backward()

    contestants: Contestants = {
        "dense": lambda: train(dense),
        "of it the linears, dense": run_linears(dense, B, T, train=True),
        "of ours the linears": run_linears(hyper, B, T, train=True),
        "of both the attention": run_attention(B, T, 0, layers, train=True),
        "of both the output head and the loss": train_head,
        OURS: lambda: train(hyper),
    }

    def check() -> None:
        few = tokens[:1, :16]

        def logits(model: Any) -> Callable[[], dict[str, Tensor]]:
            def run() -> dict[str, Tensor]:
                with torch.no_grad():
                    return {"logits": model.eval()(few).logits[:, -1]}

            return run

        assert_right(Case("", {"dense": logits(dense), OURS: logits(hyper)}, exact_logits(dense, few), "dense"))

    name = f"forward and backward, batch {B} x {T}, {title(layers)}"
    return Case(name, contestants, check=check, values={"B": B * T, "train": True})


def serving(requests: int, tasks: int, T: int, layers: int = LAYERS) -> Case:
    """Requests of many tasks in one batch, each with its task's weights: against the same model task by task, and a
    dense model for each task."""
    _, hyper = gpt2(context_features=16, layers=layers)
    z, which = torch.randn(tasks, 16), torch.arange(requests) % tasks
    tokens = torch.randint(VOCABULARY, (requests, T))
    separate = [hk.merge_(copy.deepcopy(hyper), own) for own in z]

    @torch.no_grad()
    def mixed() -> Tensor:
        with hk.context(z, context_ids=which):
            return hyper(tokens, logits_to_keep=1).logits

    @torch.no_grad()
    def by_task(run: Callable[[int, Tensor], Tensor]) -> Tensor:
        logits = torch.empty(requests, 1, VOCABULARY)
        for task in range(tasks):
            logits[which == task] = run(task, tokens[which == task])
        return logits

    def hyper_alone(task: int, own: Tensor) -> Tensor:
        with hk.context(z[task]):
            return hyper(own, logits_to_keep=1).logits

    contestants: Contestants = {
        "hyper, task by task": lambda: by_task(hyper_alone),
        "dense, a model for each task": lambda: by_task(lambda task, own: separate[task](own, logits_to_keep=1).logits),
        OURS: mixed,
    }

    def check() -> None:
        one_by_one = contestants["dense, a model for each task"]()
        assert torch.equal(mixed().argmax(-1), one_by_one.argmax(-1))
        torch.testing.assert_close(mixed(), one_by_one, rtol=1e-3, atol=1e-3)

    name = f"forward, {requests} requests of {tasks} tasks, {T} tokens each, {title(layers)}"
    return Case(name, contestants, check=check, values={"B": requests * T, "contexts": tasks})


def generated_weight() -> Case:
    """What `F.linear` of a `GeneratedWeight` costs beside `hyper_linear` of what it is made of."""
    hidden, head, x = torch.randn(8, 8, 16), torch.randn(16, 8, 8), torch.randn(1, 64)
    weight = hk.GeneratedWeight(hidden, head, (64, 64))

    def many(call: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for _ in range(1000):
                    call()

        return run

    def check() -> None:
        assert torch.equal(F.linear(x, weight), hk.hyper_linear(x, hidden, head))

    contestants: Contestants = {
        "hyper_linear": many(lambda: hk.hyper_linear(x, hidden, head)),
        OURS: many(lambda: F.linear(x, weight)),
    }
    return Case("1000 calls of F.linear with a GeneratedWeight, 64x64", contestants, check=check)


def fitted(size: int, chunk: tuple[int, int], m: int) -> Case:
    """The closed-form fit, and the least of it: the singular vectors of W as its chunks lie."""
    weight = torch.randn(size, size) @ torch.diag(torch.arange(1, size + 1) ** -0.5)

    def check() -> None:
        hidden, head, error = hk.fit(weight, chunk, m)
        found = (weight - hk.generate_weight(hidden, head, weight.shape)).double().norm() / weight.double().norm()
        assert abs(error - found.item()) < 1e-6

    contestants: Contestants = {
        "torch.svd_lowrank": lambda: torch.svd_lowrank(weight, m + 32, 6),
        OURS: lambda: hk.fit(weight, chunk, m),
    }
    return Case(f"fit a {size}x{size} layer, chunks {chunk[0]}x{chunk[1]}, m={m}", contestants, check=check)
