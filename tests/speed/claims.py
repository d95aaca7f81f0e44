"""What the repository claims of the suite's cases: by what factors ours should beat which baseline."""

from __future__ import annotations

from collections.abc import Callable

from cases import fitted, generated_weight, regularizer

from hyperkernels.bench.case import Case, claim
from hyperkernels.bench.contexts import contexts
from hyperkernels.bench.conv import convolution, resnet50_step
from hyperkernels.bench.linear import linear
from hyperkernels.bench.models import decode, only_linears, serving, step
from hyperkernels.planner import default_chunk

LARGE, SMALL = ((4096, 4096), (16, 256), 32), ((1024, 1024), (16, 64), 32)
CPU_CASES: dict[str, Callable[[], Case]] = {
    "decode": claim(linear, *LARGE, B=1, faster={"dense": 8}),
    "forward_16": claim(linear, *LARGE, B=16, faster={"dense": 12}),
    "forward_256": claim(linear, *LARGE, B=256, faster={"dense": 10, "dense-tuned": 3}, of_peak=0.8),
    "forward_2048": claim(linear, *LARGE, B=2048, faster={"dense": 9, "dense-tuned": 3}, of_peak=0.8),
    "train_256": claim(linear, *LARGE, B=256, train=True, faster={"dense": 7}),
    "small_256": claim(linear, *SMALL, B=256, faster={"dense": 2}),
    "small_2048": claim(linear, *SMALL, B=2048, faster={"dense": 2}),
    "small_default_chunk_256": claim(linear, (1024, 1024), default_chunk(1024, 1024, 32), 32, B=256),
    "contexts_64": claim(contexts, 64, faster={"hypnettorch": 150}, smaller={"hypnettorch": 100}),
    "contexts_256": claim(contexts, 256, faster={"torch backend": 3}, smaller={"hypnettorch": 100}),
    "contexts_256_tanh": claim(contexts, 256, "tanh", smaller={"hypnettorch": 100}),
}
BLOCK = ((256, 256), 14)  # channels and size of ResNet's third stage
CONV_CASES: dict[str, Callable[[], Case]] = {
    "conv": claim(convolution, *BLOCK, (4, 256), 16, 32, unfolded=True, faster={"dense": 3}),
    "conv_train": claim(convolution, *BLOCK, (4, 256), 16, 32, train=True, unfolded=True),
    "conv_fine_chunks": claim(convolution, *BLOCK, (16, 16), 64, 32, unfolded=True, faster={"dense": 1 / 1.1}),
    "conv_contexts": claim(
        *(convolution, *BLOCK, (4, 256), 16, 32),
        **{"per_image": True, "unfolded": True, "faster": {"grouped-conv": 30}, "smaller": {"grouped-conv": 20}},
    ),
    "conv_resnet50": claim(resnet50_step, 8, per_image=False, faster={"dense": 1, "dense, channels_last": 1}),
    "conv_resnet50_contexts": claim(
        resnet50_step, 8, per_image=True, faster={"dense": 1 / 1.3, "dense, channels_last": 1 / 1.3}
    ),
}
ALGEBRA_CASES: dict[str, Callable[[], Case]] = {
    "algebra_regularizer": claim(regularizer, 10, 4, 512, 16, faster={"materialise": 20}),
    "algebra_regularizer_wide": claim(regularizer, 10, 4, 512, 32, faster={"materialise": 20}),
    "algebra_regularizer_default_chunk": claim(
        regularizer, 10, 4, 512, 32, default_chunk(512, 512, 32), faster={"materialise": 12}
    ),
    "algebra_regularizer_flat": claim(regularizer, 10, 4, 512, 32, 42_000),
}
MODEL_CASES: dict[str, Callable[[], Case]] = {
    "model_decode": claim(decode, faster={"dense": 1.5}),
    "model_linears": claim(only_linears, 1, faster={"dense": 5}),
    "model_linears_16": claim(only_linears, 16, faster={"dense": 5}),
    "model_step": claim(step, 4, 256, faster={"dense": 1.8}),
    "model_serving": claim(serving, 16, 8, 16, faster={"hyper, task by task": 1}),
    "model_generated_weight": claim(generated_weight),
    "model_fit": claim(fitted, 4096, (16, 256), 64),
}
CASES = CPU_CASES | CONV_CASES | ALGEBRA_CASES | MODEL_CASES
