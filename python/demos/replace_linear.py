"""A language model whose linear layers are replaced: trained dense and hyperized, at equal steps, on the same batches.

The model is built from a Hugging Face config (nothing is downloaded) and learns, byte by byte, the source of Python's
standard library, which every interpreter ships. `hyperize_` then swaps every linear layer of its blocks; its output
head and embeddings stay. Both models take a step in turn, so that whatever else the machine does hits both.

  small   4 blocks of 384 features; a few minutes on two cores
  gpt2    the shape of GPT-2, 124M parameters with its usual vocabulary, 86M of bytes
"""

from __future__ import annotations

import argparse
import sysconfig
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
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

import hyperkernels as hk

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BYTES = 256
STYLES = {"dense": ("0.45", "--"), "hyperized": ("#0072b2", "-")}
SMALL = {"n_embd": 384, "n_layer": 4, "n_head": 6}


@dataclass(frozen=True)
class Preset:
    config: dict[str, Any]  # of GPT2Config
    steps: int
    batch: int
    length: int


PRESETS = {"small": Preset(SMALL, 150, 8, 128), "gpt2": Preset({}, 300, 4, 256)}


def standard_library(held_out: int = 1 << 16) -> tuple[Tensor, Tensor]:
    """The source of its modules one after another, and the end of it to test on, as bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return data[:-held_out], data[-held_out:]


@dataclass
class Run:
    """A model in training, and what it has shown so far."""

    name: str
    model: Any
    rate: float
    steps: int
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    tested: float = float("nan")

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.rate)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, self.rate, self.steps, pct_start=0.1)

    def loss(self, tokens: Tensor) -> Tensor:
        logits = self.model(tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def step(self, tokens: Tensor) -> None:
        start = time.perf_counter()
        loss = self.loss(tokens)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.step_ms.append(1e3 * (time.perf_counter() - start))

    @torch.no_grad()
    def test(self, batches: list[Tensor]) -> None:
        self.model.eval()
        self.tested = sum(self.loss(tokens).item() for tokens in batches) / len(batches)
        self.model.train()

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def optimizer_mib(self) -> float:
        states = self.optimizer.state.values()
        held = sum(v.nbytes for state in states for v in state.values() if isinstance(v, Tensor))
        return held / 2**20

    @property
    def p50_ms(self) -> float:
        return sorted(self.step_ms)[len(self.step_ms) // 2]


def build(config: Any, seed: int, width: int, rates: tuple[float, float], steps: int) -> tuple[list[Run], Any]:
    """Both from the same start, but for the layers that are swapped."""
    models = []
    for _ in STYLES:
        torch.manual_seed(seed)
        models.append(AutoModelForCausalLM.from_config(config).train())
    report = hk.hyperize_(models[1], hk.HyperConfig(width=width))
    return [Run(name, model, rate, steps) for name, model, rate in zip(STYLES, models, rates)], report


def train(runs: list[Run], data: Tensor, preset: Preset, generator: torch.Generator, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=preset.steps)
        for step in range(preset.steps):
            starts = torch.randint(len(data) - preset.length - 1, (preset.batch,), generator=generator)
            tokens = torch.stack([data[start : start + preset.length + 1] for start in starts.tolist()]).long()
            for run in runs:
                run.step(tokens)
            latest = ", ".join(f"{run.name} {run.losses[-1]:.2f}" for run in runs)
            progress.update(task, advance=1, description=latest)
            if not console.is_terminal and (step + 1) % 25 == 0:
                console.print(f"step {step + 1} of {preset.steps}: {latest} nats a byte", highlight=False)


def table(runs: list[Run], tokens: int, title: str) -> Table:
    shown = Table(title=title)
    shown.add_column("", no_wrap=True)
    for column in ("parameters", "optimizer MiB", "test loss, nats a byte", "step p50", "bytes a second"):
        shown.add_column(column, justify="right")
    for run in runs:
        speed = f"{1e3 * tokens / run.p50_ms:,.0f}"
        cells = (f"{run.parameters:,}", f"{run.optimizer_mib:.1f}", f"{run.tested:.3f}", f"{run.p50_ms:.0f} ms", speed)
        shown.add_row(run.name, *cells)
    return shown


def draw(runs: list[Run], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for run in runs:
        color, line = STYLES[run.name]
        smooth = torch.tensor(run.losses).unfold(0, 5, 1).mean(1) if len(run.losses) > 5 else torch.tensor(run.losses)
        steps = torch.arange(len(run.losses) - len(smooth) + 1, len(run.losses) + 1)
        for axis, x in zip(axes, (steps, steps * run.p50_ms / 1e3)):
            axis.plot(x, smooth, color=color, linestyle=line, label=run.name)
    axes[0].set(xlabel="steps", ylabel="training loss, nats a byte")
    axes[1].set(xlabel="training time (steps x median step), s")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def find_config(name: str) -> tuple[Any, Preset]:
    """Of a preset, or of a folder or file with a `config.json`; of bytes."""
    if name in PRESETS:
        preset = PRESETS[name]
        config = GPT2Config(vocab_size=BYTES, bos_token_id=0, eos_token_id=0, **preset.config)
        return config, preset
    config = AutoConfig.from_pretrained(name, local_files_only=True)
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = BYTES, 0, 0, None
    return config, PRESETS["gpt2"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python python/demos/replace_linear.py --model small\n"
        "  python python/demos/replace_linear.py --width 64 --steps 1000\n"
        "  python python/demos/replace_linear.py --model path/to/config.json --batch 2 --length 128",
    )
    parser.add_argument("--model", default="gpt2", help="small, gpt2, or a folder or file with a config.json")
    parser.add_argument("--width", type=int, default=32, help="of the hypernetwork's last layer (default 32)")
    parser.add_argument("--steps", type=int, help="of training (default 150 for small, else 300)")
    parser.add_argument("--batch", type=int, help="sequences in a step (default 8 for small, else 4)")
    parser.add_argument("--length", type=int, help="bytes in a sequence (default 128 for small, else 256)")
    parser.add_argument("--rate", type=float, default=6e-4, help="largest learning rate, dense (default 6e-4)")
    parser.add_argument("--hyper-rate", type=float, default=3e-3, help="and hyperized (default 3e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default 0)")
    parser.add_argument("--output", type=Path, default=Path("out/replace_linear.png"), help="where the picture goes")
    given = parser.parse_args()
    for name in ("width", "steps", "batch", "length"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name}: got {getattr(given, name)}, wanted at least 1")
    try:
        config, preset = find_config(given.model)
    except (OSError, ValueError) as error:
        parser.error(f"--model: got {given.model!r}, wanted small, gpt2, or where a config.json is ({error})")
    chosen = {name: getattr(given, name) or getattr(preset, name) for name in ("steps", "batch", "length")}
    preset = Preset(preset.config, **chosen)
    console = Console()
    data, held_out = standard_library()
    runs, report = build(config, given.seed, given.width, (given.rate, given.hyper_rate), preset.steps)
    console.print(str(report), highlight=False, soft_wrap=True)
    train(runs, data, preset, torch.Generator().manual_seed(given.seed), console)
    tests = [row.long() for row in held_out.unfold(0, preset.length + 1, preset.length + 1)[:32].split(preset.batch)]
    for run in runs:
        run.test(tests)
    draw(runs, given.output)
    title = f"{type(runs[0].model).__name__} on the source of Python's standard library, {preset.steps} steps"
    console.print(table(runs, preset.batch * preset.length, title))
    console.print(f"picture: {given.output}", highlight=False, soft_wrap=True)
    dense, hyper = runs
    console.print(
        f"Shown: {len(report.swapped)} linear layers replaced in a model that knows nothing of it; "
        f"{dense.parameters / hyper.parameters:.1f} times fewer parameters, {dense.p50_ms / hyper.p50_ms:.2f} times "
        f"the dense model's speed, and a test loss {hyper.tested - dense.tested:+.3f} nats a byte beside it.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
