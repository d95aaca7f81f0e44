"""A ResNet whose every convolution is generated: one hypernetwork, one head, kernels chunk by chunk.

Two things with Hugging Face's ResNet, built from a config (nothing is downloaded):

  training  a ResNet-18 learns scikit-learn's handwritten digits, enlarged to 32x32. Its convolutions are not there:
            one HyperNet generates them, in chunks of 16x16x3x3 and the like, all through one shared head.
  memory    ResNet-50, 101 and 152 at 224x224, forward and backward, every image with a context and so with a network of
            its own: peak memory beside the dense network's, and beside that of the same hypernetwork with its weights
            formed.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import hyperkernels as hk
from hyperkernels.testing import peak_bytes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DEPTHS: dict[int, tuple[str, list[int]]] = {
    18: ("basic", [2, 2, 2, 2]),
    34: ("basic", [3, 4, 6, 3]),
    50: ("bottleneck", [3, 4, 6, 3]),
    101: ("bottleneck", [3, 4, 23, 3]),
    152: ("bottleneck", [3, 8, 36, 3]),
}
BATCH = 64
CONTEXT = 8
STYLES = {"dense": ("0.45", ":"), "materialised": ("#d55e00", "--"), "hyperkernels": ("#0072b2", "-")}


def resnet(depth: int, channels: int) -> ResNetForImageClassification:
    kind, depths = DEPTHS[depth]
    sizes = [64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048]
    config: Any = ResNetConfig(num_channels=channels, layer_type=kind, depths=depths, hidden_sizes=sizes)
    config.num_labels = 10
    return ResNetForImageClassification(config)


def hyper(model: nn.Module, context_features: int | None = None, **settings: Any) -> hk.HyperModel:
    """The model, with every convolution generated."""
    convolutions = {"filter_fn": lambda layer, _name: isinstance(layer, nn.Conv2d)}
    return hk.HyperModel(model, hk.HyperNet(model, context_features=context_features, **convolutions, **settings))


def generated(model: hk.HyperModel) -> int:
    return sum(prod(target.shape) for target in model.hypernet.targets.values())


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def backward(network: nn.Module, x: Tensor, label: Tensor, **context: Tensor) -> None:
    F.cross_entropy(network(x, **context).logits, label).backward()


@dataclass
class Digits:
    """Images `[n, 1, 32, 32]` in [-1, 1] and labels."""

    x: Tensor
    label: Tensor
    test_x: Tensor
    test_label: Tensor

    @classmethod
    def load(cls, generator: torch.Generator) -> Digits:
        digits: Any = load_digits()
        x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        x = F.interpolate(x, size=(32, 32), mode="bilinear")
        label = torch.tensor(digits.target)
        train, test = torch.randperm(len(x), generator=generator).split([1400, len(x) - 1400])
        return cls(x[train], label[train], x[test], label[test])

    def batches(self, generator: torch.Generator):
        """One epoch of (images, labels), each batch moved by up to three pixels."""
        for index in torch.randperm(len(self.x), generator=generator).split(BATCH):
            moved = torch.randint(-3, 4, (2,), generator=generator).tolist()
            yield torch.roll(self.x[index], moved, (2, 3)), self.label[index]


@dataclass
class Run:
    model: hk.HyperModel
    accuracy: list[tuple[float, float]] = field(default_factory=list)  # seconds of training, percent
    peak_mib: float = 0.0

    @property
    def seconds(self) -> float:
        return self.accuracy[-1][0]


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    model.eval()
    picked = torch.cat([model(x).logits.argmax(1) for x in digits.test_x.split(BATCH)])
    model.train()
    return 100 * (picked == digits.test_label).float().mean().item()


def train(digits: Digits, depth: int, epochs: int, generator: torch.Generator, console: Console) -> Run:
    run = Run(hyper(resnet(depth, 1), width=64, chunk=(16, 16)))
    steps, seconds = epochs * -(-len(digits.x) // BATCH), 0.0
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.2)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"ResNet-{depth}", total=steps)
        for epoch in range(epochs):
            start = time.perf_counter()
            for batch in digits.batches(generator):
                optimizer.zero_grad()
                backward(run.model, *batch)
                optimizer.step()
                schedule.step()
                progress.update(task, advance=1)
            seconds += time.perf_counter() - start
            run.accuracy.append((seconds, accuracy(run.model, digits)))
            latest = f"ResNet-{depth}, test accuracy {run.accuracy[-1][1]:.1f} %"
            progress.update(task, description=latest)
            if not console.is_terminal:
                console.print(f"epoch {epoch + 1} of {epochs}: {latest}, {seconds:.0f} s", highlight=False)
    run.peak_mib = peak_bytes(partial(backward, run.model, *batch)) / 2**20
    return run


def measure_memory(depth: int, batches: list[int], console: Console) -> dict[str, list[float]]:
    """Peak MiB of a forward and backward, beyond parameters and gradients: for each contestant one per batch size."""
    dense, model = resnet(depth, 3), hyper(resnet(depth, 3), CONTEXT, width=16)
    found: dict[str, list[float]] = {name: [] for name in STYLES}
    for B in batches:
        x = torch.randn(B, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        label, z = torch.randint(10, (B,)), torch.randn(B, CONTEXT)
        for name, peaks in found.items():
            model.hypernet.backend = "reference" if name == "materialised" else None
            network, given = (dense, {}) if name == "dense" else (model, {"context": z})

            step = partial(backward, network, x, label, **given)
            if batches[0] == B:
                step()  # the gradients are there from now on
            peaks.append(peak_bytes(step) / 2**20)
        told = ", ".join(f"{name} {peaks[-1]:.0f}" for name, peaks in found.items())
        console.print(f"ResNet-{depth}, {B} networks for {B} images, MiB: {told}", highlight=False)
    return found


def training_table(run: Run, depth: int) -> Table:
    shown = Table(title=f"ResNet-{depth} on digits, every convolution generated through one head")
    shown.add_column("", no_wrap=True)
    shown.add_column("", justify="right")
    made = generated(run.model)
    rest = parameters(run.model.model)
    for name, value in (
        ("generated weights", f"{made:,}"),
        ("parameters of the hypernetwork", f"{parameters(run.model.hypernet):,}"),
        ("parameters beside (norms, classifier)", f"{rest:,}"),
        ("parameters of the dense network", f"{made + rest:,}"),
        ("test accuracy", f"{run.accuracy[-1][1]:.1f} %"),
        ("training", f"{run.seconds:.0f} s"),
        ("peak of a step", f"{run.peak_mib:.0f} MiB"),
    ):
        shown.add_row(name, value)
    return shown


def memory_table(memory: dict[int, dict[str, list[float]]], batches: list[int]) -> Table:
    shown = Table(title="a network of its own for each image, 224x224: peak MiB of a forward and backward")
    for column in ("", "images", "dense", "formed", "hyperkernels", "formed beyond dense", "ours beyond dense"):
        shown.add_column(column, justify="right", no_wrap=column == "hyperkernels")
    for depth, found in memory.items():
        for B, dense, formed, ours in zip(batches, *found.values()):
            cells = [f"{mib:.0f}" for mib in (dense, formed, ours, formed - dense, ours - dense)]
            shown.add_row(f"ResNet-{depth}", str(B), *cells)
    return shown


def draw(run: Run | None, memory: dict[int, dict[str, list[float]]], batches: list[int], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    if run:
        seconds, percent = zip(*run.accuracy)
        left.plot(seconds, percent, color=STYLES["hyperkernels"][0], marker=".")
    left.set(xlabel="training time, s", ylabel="test accuracy, %", ylim=(0, 100), title="trained: the hypernetwork")
    left.grid(alpha=0.3)
    for depth, marker in zip(memory, "os^vD"):
        for name, peaks in memory[depth].items():
            color, line = STYLES[name]
            right.plot(batches, peaks, color=color, linestyle=line, marker=marker, label=f"{name}, {depth}")
    right.set(xlabel="images, each with its own network", ylabel="peak of a step, MiB", title="memory")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(batches, map(str, batches))
    if memory:
        right.legend(fontsize=7, ncols=2)
    right.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python python/demos/hyper_resnet.py\n"
        "  python python/demos/hyper_resnet.py --epochs 0 --memory 50 --batches 1 2 4 8\n"
        "  python python/demos/hyper_resnet.py --depth 34 --memory",
    )
    parser.add_argument("--depth", type=int, default=18, choices=DEPTHS, help="of the ResNet that learns (default 18)")
    parser.add_argument("--epochs", type=int, default=12, help="of 1,400 images; 0 trains nothing (default 12)")
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[50, 101, 152], choices=DEPTHS, help="depths to measure the memory of"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], help="images (default 1 2 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the split and the batches (default 0)")
    parser.add_argument("--output", type=Path, default=Path("out/hyper_resnet.png"), help="where the picture goes")
    arguments = parser.parse_args()
    if arguments.epochs < 0:
        parser.error(f"--epochs: got {arguments.epochs}, wanted 0 or more")
    if min(arguments.batches) < 1:
        parser.error(f"--batches: got {arguments.batches}, wanted positive numbers")
    console = Console()
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    run = None
    if arguments.epochs:
        run = train(Digits.load(generator), arguments.depth, arguments.epochs, generator, console)
        console.print(training_table(run, arguments.depth))
    memory = {depth: measure_memory(depth, arguments.batches, console) for depth in arguments.memory}
    if memory:
        console.print(memory_table(memory, arguments.batches))
    draw(run, memory, arguments.batches, arguments.output)
    console.print(f"picture: {arguments.output}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
