"""The suites: which cases each is made of, quick and whole, for the shapes and settings that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from hyperkernels.bench.case import Case
from hyperkernels.bench.conv import convolution, resnet50_step
from hyperkernels.bench.growth import layer
from hyperkernels.bench.linear import Ours, contexts, linear, many_contexts, whole_weights
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
    ours: Ours = field(default_factory=Ours)

    def of(self, quick: list[tuple[int, int]], whole: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return list(self.shapes) or (quick if self.quick else whole)

    @property
    def plain(self) -> bool:
        """fp32 on a CPU, in the suite's own shapes: what cases that have no such settings are made for."""
        return self.dtype == "fp32" and self.device == "cpu" and not self.shapes


Make = Callable[[], Case]


def cases(suite: str, wanted: Wanted) -> list[Make]:
    """Each builds its case when it is called."""
    return list(_SUITES[suite](wanted))


def _common(wanted: Wanted) -> dict[str, Any]:
    return {"device": wanted.device, "dtype": DTYPES[wanted.dtype], "ours": wanted.ours}


def _chunk(shape: tuple[int, int]) -> tuple[int, int]:
    """The planner's, halved until it divides the layer."""
    rows, cols = default_chunk(*shape, WIDTH)
    while shape[0] % rows:
        rows //= 2
    while shape[1] % cols:
        cols //= 2
    return rows, cols


def _linear(wanted: Wanted) -> Iterator[Make]:
    for shape in wanted.of([(1024, 1024)], [(1024, 1024), (4096, 4096)]):
        for B in (1, 16, 256) if wanted.quick else (1, 4, 16, 64, 256, 1024):
            more = not wanted.quick or B == 16
            yield partial(linear, shape, _chunk(shape), WIDTH, B, more=more, **_common(wanted))


def _contexts(wanted: Wanted) -> Iterator[Make]:
    for N, K in wanted.of([(512, 512)], [(1024, 1024)]) if wanted.dtype == "fp32" and wanted.device == "cpu" else []:
        for G in (16,) if wanted.quick else (16, 64, 256):
            yield partial(contexts, G, "relu", N, K, *_chunk((N, K)), ours=wanted.ours)
    if wanted.plain:
        yield partial(whole_weights, 32, 256, 256, 16, ours=wanted.ours)
    for shape in wanted.of([(512, 512)], [(1024, 1024)]):
        common = _common(wanted)
        for T in (16,) if wanted.quick else (16, 128):
            yield partial(many_contexts, shape, _chunk(shape), WIDTH, 16, T, **common)
        yield partial(many_contexts, shape, _chunk(shape), WIDTH, 8, 8, entries=32, **common)


def _conv(wanted: Wanted) -> Iterator[Make]:
    common, B = _common(wanted), 8 if wanted.quick else 32
    for channels, size in [(64, 28)] if wanted.quick else [(64, 56), (256, 14)]:
        if not wanted.shapes:
            yield partial(convolution, channels, size, (4, channels), 16, B, **common)
            yield partial(convolution, channels, size, (4, channels), 16, B, per_image=True, **common)
    for N, K in wanted.shapes:
        if N != K:
            raise ValueError(f"shape: got {N}x{K}, wanted as many channels in as out for the suite conv")
        yield partial(convolution, N, 14, (4, K), 16, B, **common)


def _train_step(wanted: Wanted) -> Iterator[Make]:
    for shape in wanted.of([(1024, 1024)], [(1024, 1024), (4096, 4096)]):
        for B in (64,) if wanted.quick else (64, 256, 1024):
            yield partial(linear, shape, _chunk(shape), WIDTH, B, train=True, **_common(wanted))
    if not wanted.shapes:
        channels, size, B = (64, 28, 8) if wanted.quick else (256, 14, 32)
        yield partial(convolution, channels, size, (4, channels), 16, B, train=True, **_common(wanted))


def _decode(wanted: Wanted) -> Iterator[Make]:
    for shape in wanted.of([LAYERS["gpt2"]], list(LAYERS.values())):
        for B in (1,) if wanted.quick else (1, 4, 16):
            yield partial(linear, shape, _chunk(shape), WIDTH, B, **_common(wanted))


def _memory(wanted: Wanted) -> Iterator[Make]:
    for shape in wanted.of([(512, 512)], [(1024, 1024)]):
        for G in (1, 4, 16) if wanted.quick else (1, 4, 16, 64, 256):
            yield partial(many_contexts, shape, _chunk(shape), WIDTH, G, 4, **_common(wanted))


def _scaling(wanted: Wanted) -> Iterator[Make]:
    if wanted.plain:
        for half in range(10, 14 if wanted.quick else 21):
            yield partial(layer, 10 ** (half / 2), ours=wanted.ours)


def _models(wanted: Wanted) -> Iterator[Make]:
    if not wanted.plain or wanted.ours != Ours():
        return
    given = {"layers": 2} if wanted.quick else {}
    yield partial(decode, **given)
    yield partial(only_linears, 1, **given)
    yield partial(serving, 8, 4, 8, **given)
    if not wanted.quick:
        yield partial(only_linears, 16)
        yield partial(step, 4, 256)
        yield partial(resnet50_step, 8, per_image=False)
        yield partial(resnet50_step, 8, per_image=True)


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
