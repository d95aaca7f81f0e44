"""A vision transformer whose every weight is generated: trained dense, materialised, and by hyperkernels.

A Hugging Face ViT (built from a config, nothing is downloaded) learns scikit-learn's handwritten digits, each turned
by 0, 90, 180 or 270 degrees; the context z says by how much. Three models train on the same batches in one process,
a step of each in turn, so that whatever else the machine does hits all three:

  dense         the ViT as it is, told z by a learned embedding added to its tokens
  materialised  every nn.Linear of its blocks generated from z, each image's weights written out, then multiplied
  hyperkernels  the same hypernetwork from the same start, no weight ever formed
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
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
from transformers import ViTConfig, ViTForImageClassification

import hyperkernels as hk
from hyperkernels.testing import peak_bytes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROTATIONS = 4
BATCH = 64
AGREE_STEPS = 25
STYLES = {"dense": ("0.45", ":"), "materialised": ("#d55e00", "--"), "hyperkernels": ("#0072b2", "-")}


@dataclass
class Digits:
    """Images `[n, 1, 8, 8]` in [-1, 1] and labels: a training split, and a test split in all four rotations."""

    x: Tensor
    label: Tensor
    test_x: Tensor
    test_label: Tensor
    test_rotation: Tensor

    @classmethod
    def load(cls, generator: torch.Generator) -> Digits:
        digits: Any = load_digits()
        x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        label = torch.tensor(digits.target)
        train, test = torch.randperm(len(x), generator=generator).split([1400, len(x) - 1400])
        turned = torch.cat([torch.rot90(x[test], k, (2, 3)) for k in range(ROTATIONS)])
        rotation = torch.arange(ROTATIONS).repeat_interleave(len(test))
        return cls(x[train], label[train], turned, label[test].repeat(ROTATIONS), rotation)

    def batches(self, generator: torch.Generator):
        """One epoch of (images, rotations, labels), every image turned anew."""
        for index in torch.randperm(len(self.x), generator=generator).split(BATCH):
            rotation = torch.randint(ROTATIONS, (len(index),), generator=generator)
            turned = [torch.rot90(image, int(k), (1, 2)) for image, k in zip(self.x[index], rotation)]
            yield torch.stack(turned), rotation, self.label[index]


class Dense(nn.Module):
    """The ViT, with the rotation's embedding added to every token."""

    def __init__(self, vit: ViTForImageClassification) -> None:
        super().__init__()
        self.vit = vit
        self.rotation = nn.Embedding(ROTATIONS, vit.config.hidden_size)
        nn.init.normal_(self.rotation.weight, std=vit.config.initializer_range)
        vit.vit.embeddings.register_forward_hook(lambda _module, _args, tokens: tokens + self.told)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        self.told = self.rotation(rotation)[:, None]
        return self.vit(x).logits


class Hyper(nn.Module):
    """The ViT with every linear of its blocks generated; each image brings its own context."""

    def __init__(self, vit: ViTForImageClassification, backend: str | None) -> None:
        super().__init__()
        self.vit = vit
        config = hk.HyperConfig(width=8, context_features=ROTATIONS, backend=backend)
        self.report = hk.hyperize_(vit, config, lambda _layer, name: ".layers." in name)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        with hk.context(F.one_hot(rotation, ROTATIONS).float()):
            return self.vit(x).logits


@dataclass
class Run:
    """One model in training, and what it has shown so far."""

    name: str
    model: nn.Module
    steps: int
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    peak_mib: float = 0.0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-3, self.steps, pct_start=0.1)

    def step(self, x: Tensor, rotation: Tensor, label: Tensor) -> None:
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(x, rotation), label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.step_ms.append(1e3 * (time.perf_counter() - start))

    @torch.no_grad()
    def evaluate(self, digits: Digits) -> None:
        parts = zip(digits.test_x.split(BATCH), digits.test_rotation.split(BATCH))
        picked = torch.cat([self.model(x, rotation).argmax(1) for x, rotation in parts])
        right = (picked == digits.test_label).float().mean().item()
        self.accuracy.append((len(self.losses), 100 * right))

    def measure_peak(self, x: Tensor, rotation: Tensor, label: Tensor) -> None:
        """Peak of one forward and backward, beyond parameters, gradients and optimizer state."""

        def step() -> None:
            F.cross_entropy(self.model(x, rotation), label).backward()

        step()
        self.peak_mib = peak_bytes(step) / 2**20

    @property
    def p50_ms(self) -> float:
        return sorted(self.step_ms)[len(self.step_ms) // 2]


def build(seed: int, steps: int) -> list[Run]:
    """Three runs; the two hypernetworks start from the same numbers."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

    config.num_labels = 10

    def vit() -> ViTForImageClassification:
        torch.manual_seed(seed)
        return ViTForImageClassification(config)

    models = (Dense(vit()), Hyper(vit(), "reference"), Hyper(vit(), None))
    return [Run(name, model, steps) for name, model in zip(STYLES, models)]


def train(runs: list[Run], digits: Digits, epochs: int, generator: torch.Generator, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=runs[0].steps)
        for epoch in range(epochs):
            for batch in digits.batches(generator):
                for run in runs:
                    run.step(*batch)
                progress.update(task, advance=1)
            if epoch % 3 == 2 or epoch == epochs - 1:
                for run in runs:
                    run.evaluate(digits)
                latest = ", ".join(f"{run.name} {run.accuracy[-1][1]:.1f}%" for run in runs)
                progress.update(task, description=latest)
                if not console.is_terminal:
                    console.print(f"epoch {epoch + 1} of {epochs}: {latest}", highlight=False)
    for run in runs:
        run.measure_peak(*batch)


def table(runs: list[Run]) -> Table:
    shown = Table(title="ViT on digits in four rotations, the context says which")
    shown.add_column("", no_wrap=True)
    for column in ("trainable parameters", "generated weights", "test accuracy", "step p50", "peak MiB"):
        shown.add_column(column, justify="right")
    for run in runs:
        layers = [m for m in run.model.modules() if isinstance(m, hk.HyperLinear)]
        generated = BATCH * sum(layer.in_features * layer.out_features for layer in layers)
        shown.add_row(
            run.name,
            f"{sum(p.numel() for p in run.model.parameters()):,}",
            f"{generated:,}" if layers else "none",
            f"{run.accuracy[-1][1]:.1f} %",
            f"{run.p50_ms:.1f} ms",
            f"{run.peak_mib:.0f}",
        )
    return shown


def draw(runs: list[Run], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run in runs:
        color, line = STYLES[run.name]
        steps, percent = zip(*run.accuracy)
        seconds = [step * run.p50_ms / 1e3 for step in steps]
        left.plot(seconds, percent, color=color, linestyle=line, marker=".", label=run.name)
    left.set(xlabel="training time (steps x median step), s", ylabel="test accuracy, %", ylim=(0, 100))
    left.legend()
    left.grid(alpha=0.3)
    bars = right.bar([run.name for run in runs], [run.peak_mib for run in runs])
    for bar, run in zip(bars, runs):
        bar.set_color(STYLES[run.name][0])
    right.bar_label(bars, fmt="%.0f")
    right.set(ylabel="peak memory of a step, MiB")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def difference(runs: list[Run], steps: slice) -> float:
    """Largest difference of the two hypernetworks' losses."""
    return max(abs(a - b) for a, b in zip(runs[1].losses[steps], runs[2].losses[steps]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python python/demos/vit_rotations.py\n"
        "  python python/demos/vit_rotations.py --epochs 6 --output out/short.png",
    )
    parser.add_argument("--epochs", type=int, default=24, help="passes over the 1,400 training images (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the split and the batches (default 0)")
    parser.add_argument("--output", type=Path, default=Path("out/vit_rotations.png"), help="where the picture goes")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs: got {arguments.epochs}, wanted at least 1")
    console = Console()
    generator = torch.Generator().manual_seed(arguments.seed)
    digits = Digits.load(generator)
    runs = build(arguments.seed, arguments.epochs * -(-len(digits.x) // BATCH))
    console.print(str(runs[2].model.report), highlight=False, soft_wrap=True)
    train(runs, digits, arguments.epochs, generator, console)
    draw(runs, arguments.output)
    console.print(table(runs))
    console.print(f"picture: {arguments.output}", highlight=False, soft_wrap=True)
    _, materialised, ours = runs
    console.print(
        f"Shown: one hypernetwork gave every image its own transformer. The materialised run and hyperkernels agree "
        f"(losses within {difference(runs, slice(0, AGREE_STEPS)):.0e} over the first {AGREE_STEPS} steps, "
        f"{difference(runs, slice(None)):.0e} over all {len(ours.losses)}); hyperkernels' step is "
        f"{materialised.p50_ms / ours.p50_ms:.1f} times faster in {materialised.peak_mib / ours.peak_mib:.1f} times "
        "less memory.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
