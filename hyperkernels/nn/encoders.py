"""What a hypernetwork is conditioned on: tasks by number, noise, and what layers are, made into z and embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hyperkernels.chunking import check_sizes
from hyperkernels.nn.start import CONTEXTS
from hyperkernels.nn.targets import Target
from hyperkernels.watched import transformed


class Tasks(nn.Embedding):
    """`z[g] = embedding[task[g]]`: a learned context for each of `count` tasks, as a `HyperNet`'s encoder.

    Args:
        count: how many tasks.
        features: size of a task's embedding.
        beside: of numbers that come with the task, and before its embedding in z: `tasks(beside [G, n], task [G])`.

    Raises:
        TypeError, ValueError: a size below 1; ids that are no integers, or of no task.

    Example:
        >>> import torch, hyperkernels as hk
        >>> net = hk.HyperNet({"weight": (8, 6)}, context_features=4, encoder=hk.nn.Tasks(10, 4))
        >>> net(torch.tensor([3, 3, 7]))["weight"].contexts
        3
    """

    def __init__(self, count: int, features: int, *, beside: int = 0, **factory) -> None:
        check_sizes(count=count, features=features)
        if not isinstance(beside, int) or beside < 0:
            raise ValueError(f"beside: got {beside!r}, wanted 0 or more")
        super().__init__(count, features, **factory)
        self.beside, self.features = beside, features + beside

    def forward(self, *given: Tensor) -> Tensor:  # type: ignore[override]
        *beside, input = given
        if not isinstance(input, Tensor) or input.is_floating_point() or input.dtype == torch.bool:
            got = input.dtype if isinstance(input, Tensor) else type(input).__name__
            raise TypeError(f"task: got {got}, wanted an integer tensor")
        shapes = [list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in beside]
        if shapes != [[*input.shape, self.beside]] * (self.beside > 0):
            wanted = f"numbers [G, {self.beside}] and tasks [G]" if self.beside else "tasks [G] alone"
            raise ValueError(f"context: got {shapes} beside tasks {list(input.shape)}, wanted {wanted}")
        readable = input.numel() and not transformed()
        if readable and not (int(input.min()) >= 0 and int(input.max()) < self.num_embeddings):
            raise ValueError(f"task: got {input.tolist()}, wanted 0 to {self.num_embeddings - 1}")
        return torch.cat([*beside, super().forward(input)], -1)

    def examples(self) -> Tensor:
        """z of some of the tasks, by which a hypernetwork starts; what comes beside them is standard normal."""
        z = self.weight[torch.randperm(len(self.weight), device=self.weight.device)[: 4 * CONTEXTS]]
        return torch.cat([z.new_empty(len(z), self.beside).normal_(), z], 1)


class Noise(nn.Module):
    """`z[g] ~ N(0, 1)`: with `net(count)`, as many sets of weights in one call, an ensemble.

    Args:
        features: size of z.

    Call:
        `noise(count)`, or `noise(sample)` for one of your own, `[G, features]`.

    Raises:
        ValueError: a count below 1, or a sample of another width.

    Example:
        >>> import torch, hyperkernels as hk
        >>> net = hk.HyperNet({"weight": (8, 6)}, context_features=4, encoder=hk.nn.Noise(4))
        >>> x = torch.randn(5, 6)
        >>> torch.nn.functional.linear(x.expand(16, 5, 6), net(16)["weight"]).shape  # 16 members
        torch.Size([16, 5, 8])
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        check_sizes(features=features)
        self.features = features
        self.register_buffer("_where", torch.empty(0), persistent=False)  # dtype and device, which `to` moves

    def forward(self, sample: int | Tensor) -> Tensor:
        if isinstance(sample, Tensor):
            if sample.dim() != 2 or sample.shape[1] != self.features:
                raise ValueError(f"sample: got shape {list(sample.shape)}, wanted [G, {self.features}]")
            return sample
        check_sizes(count=sample)
        where: Tensor = self._where  # type: ignore[assignment]
        return torch.randn(sample, self.features, dtype=where.dtype, device=where.device)

    def extra_repr(self) -> str:
        return f"features={self.features}"


class Descriptors(nn.Module):
    """`embedding[c] = A f(c)`, of the layer of a chunk, where in it the chunk lies, by place and by a step that no two
    share, and of what size it is: computed, so that one hypernetwork serves targets of any depth and width.

    Args:
        features: size of an embedding.

    Call:
        `descriptors(targets)`: `[C, features]`, for all chunks of all targets.
    """

    FREQUENCIES = 4
    STEPS = 5**0.5 / 2 - 0.5, 2**0.5 - 1, 3**0.5 - 1  # irrational, of rows, columns and layers

    def __init__(
        self, features: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_sizes(features=features)
        self.layer = nn.Linear(2 * self.FREQUENCIES * 8, features, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings of unit variance, seven eighths of it of the step, by which chunks of a row or column, and layers,
        differ most: what they have in common would repeat all along it, and from layer to layer."""
        one = 2 * self.FREQUENCIES
        nn.init.normal_(self.layer.weight, std=(4 * 7 * one) ** -0.5)
        nn.init.normal_(self.layer.weight[:, -one:], std=(4 / 7 * one) ** -0.5)
        nn.init.zeros_(self.layer.bias)

    def forward(self, targets: Iterable[Target]) -> Tensor:
        weight, rows = self.layer.weight, []
        targets = list(targets)
        for number, target in enumerate(targets):
            grid, positions = target.grid, math.prod(target.kernel)
            sizes = [math.log2(n) / 8 for n in (grid.out_features, grid.in_features, positions)]
            place = [number / 8, number / len(targets)]
            i, j = torch.meshgrid(torch.arange(grid.I) / grid.I, torch.arange(grid.J) / grid.J, indexing="ij")
            fixed = torch.tensor(place + sizes).expand(grid.I * grid.J, -1)
            step = self.STEPS[0] * grid.I * i + self.STEPS[1] * grid.J * j + self.STEPS[2] * number
            rows.append(torch.cat([fixed, *(v.reshape(-1, 1) for v in (i, j, step % 2))], 1))
        frequencies = math.pi * 2.0 ** torch.arange(self.FREQUENCIES, device=weight.device)
        told = torch.cat(rows).to(weight.device)[..., None] * frequencies
        return self.layer(torch.cat([told.sin(), told.cos()], -1).flatten(1).to(weight.dtype))
