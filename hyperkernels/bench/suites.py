"""The suites: which cases each is made of, quick and whole, for the shapes and settings that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hyperkernels.bench.case import Case, NotHere
from hyperkernels.bench.contexts import contexts, many_contexts, whole_weights
from hyperkernels.bench.conv import convolution, resnet50_step
from hyperkernels.bench.growth import layer
from hyperkernels.bench.linear import AS_PLANNED, Ours, linear
from hyperkernels.bench.models import decode, only_linears, serving, step
from hyperkernels.planner import default_chunk

SUITES = {
    "linear": "one context, a layer's forward over batch sizes",
    "contexts": "a context per sample, per sequence, and requests of mixed tasks",
    "conv": "convolutions, one context and one per image",
    "train-step": "forward and backward of linear layers and convolutions",
    "decode": "one row at a time through the layers of language models",
    "memory": "what a call holds against how many weights its contexts have",
    "scaling": "forward and backward against how many weights a layer has",
    "models": "GPT-2 with its linear layers swapped, and a ResNet-50's step",
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}
WIDTH = 32
LAYERS = {"gpt2": (2304, 768), "gpt2 mlp": (3072, 768), "llama": (4096, 4096), "llama mlp": (11008, 4096)}


@dataclass(frozen=True)
class Wanted:
    """What was asked for; an empty `shapes` is the suite's own."""

    quick: bool = False
    shapes: tuple[tuple[int, int], ...] = ()
    dtype: str = "fp32"
    device: str = "cpu"
    ours: Ours = AS_PLANNED

    def of(self, quick: list[tuple[int, int]], whole: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return list(self.shapes) or (quick if self.quick else whole)

    @property
    def common(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": DTYPES[self.dtype], "ours": self.ours}


Make = Callable[[], Case]


def cases(suite: str, wanted: Wanted) -> list[Make]:
    """Each builds its case when it is called, or raises NotHere. So does this, where the suite has none of them."""
    return list(_SUITES[suite](wanted))


def _chunk(shape: tuple[int, int]) -> tuple[int, int]:
    return default_chunk(*shape, WIDTH)


def _not_here(name: str, why: str) -> Case:
    raise NotHere(name, why)


def _linear(wanted: Wanted) -> Iterator[Make]:
    for shape in wanted.of([(1024, 1024)], [(1024, 1024), (4096, 4096)]):
        for B in (1, 16, 256) if wanted.quick else (1, 4, 16, 64, 256, 1024):
            more = not wanted.quick or B == 16
            yield partial(linear, shape, _chunk(shape), WIDTH, B, more=more, **wanted.common)


def _contexts(wanted: Wanted) -> Iterator[Make]:
    theirs = "hypnettorch's and hyperlight's are set up in fp32 on a CPU"
    if wanted.dtype != "fp32" or wanted.device != "cpu":
        yield partial(_not_here, "a context per sample", theirs)
    else:
        for N, K in wanted.of([(512, 512)], [(1024, 1024)]):
            for G in (16,) if wanted.quick else (16, 64, 256):
                yield partial(contexts, G, "relu", N, K, *_chunk((N, K)), ours=wanted.ours)
        if not wanted.shapes:  # whose head is as wide as m layers
            yield partial(whole_weights, 32, 256, 256, 16, ours=wanted.ours)
    for shape in wanted.of([(512, 512)], [(1024, 1024)]):
        for T in (16,) if wanted.quick else (16, 128):
            yield partial(many_contexts, shape, _chunk(shape), WIDTH, 16, T, **wanted.common)
        yield partial(many_contexts, shape, _chunk(shape), WIDTH, 8, 8, entries=32, **wanted.common)


def _conv(wanted: Wanted) -> Iterator[Make]:
    B = 8 if wanted.quick else 32
    own = [((64, 64), 28)] if wanted.quick else [((64, 64), 56), ((256, 256), 14)]
    for shape, size in [(shape, 14) for shape in wanted.shapes] or own:
        for per_image in (False, True):
            yield partial(convolution, shape, size, (4, shape[1]), 16, B, per_image=per_image, **wanted.common)


def _train_step(wanted: Wanted) -> Iterator[Make]:
    for shape in wanted.of([(1024, 1024)], [(1024, 1024), (4096, 4096)]):
        for B in (64,) if wanted.quick else (64, 256, 1024):
            yield partial(linear, shape, _chunk(shape), WIDTH, B, train=True, **wanted.common)
    if not wanted.shapes:
        channels, size, B = (64, 28, 8) if wanted.quick else (256, 14, 32)
        shape, chunk = (channels, channels), (4, channels)
        yield partial(convolution, shape, size, chunk, 16, B, train=True, **wanted.common)


def _decode(wanted: Wanted) -> Iterator[Make]:
    for shape in wanted.of([LAYERS["gpt2"]], list(LAYERS.values())):
        for B in (1,) if wanted.quick else (1, 4, 16):
            yield partial(linear, shape, _chunk(shape), WIDTH, B, **wanted.common)


def _memory(wanted: Wanted) -> Iterator[Make]:
    for shape in wanted.of([(512, 512)], [(1024, 1024)]):
        for G in (1, 4, 16) if wanted.quick else (1, 4, 16, 64, 256):
            yield partial(many_contexts, shape, _chunk(shape), WIDTH, G, 4, **wanted.common)


def _scaling(wanted: Wanted) -> Iterator[Make]:
    if wanted.shapes:
        raise NotHere("scaling", "its layers grow from case to case: leave out --shape")
    for half in range(10, 14 if wanted.quick else 21):
        yield partial(layer, 10 ** (half / 2), **wanted.common)


def _models(wanted: Wanted) -> Iterator[Make]:
    if wanted.shapes or wanted.ours != AS_PLANNED:
        raise NotHere("models", "they have their own shapes, and the planner's orders: leave out --shape and the like")
    like = {"device": wanted.device, "dtype": DTYPES[wanted.dtype]}
    given = like | ({"layers": 2} if wanted.quick else {})
    yield partial(decode, **given)
    yield partial(only_linears, 1, **given)
    yield partial(serving, 8, 4, 8, **given)
    if not wanted.quick:
        yield partial(only_linears, 16, **like)
        yield partial(step, 4, 256, **like)
        yield partial(resnet50_step, 8, per_image=False, **like)
        yield partial(resnet50_step, 8, per_image=True, **like)


_SUITES: dict[str, Callable[[Wanted], Iterator[Make]]] = {
    "linear": _linear,
    "contexts": _contexts,
    "conv": _conv,
    "train-step": _train_step,
    "decode": _decode,
    "memory": _memory,
    "scaling": _scaling,
    "models": _models,
}
