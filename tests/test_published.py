"""Hypernetworks as they were published: their numbers of parameters."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperkernels as hk
from hyperkernels.weight import form


def parameters(module):
    return sum(p.numel() for p in module.parameters())


class WideResNet(nn.Module):
    """WRN depth-1 of Zagoruyko and Komodakis 2016 for 32x32 images in ten classes."""

    def __init__(self, depth=40, widths=(16, 32, 64)):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks, channels = [], 16
        for stage, width in enumerate(widths):
            for block in range((depth - 4) // 6):
                blocks.append(Block(channels, width, 2 if stage and not block else 1))
                channels = width
        self.blocks, self.norm, self.out = nn.Sequential(*blocks), nn.BatchNorm2d(channels), nn.Linear(channels, 10)

    def forward(self, x):
        return self.out(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if channels != width else None

    def forward(self, x):
        out = F.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(out)
        return kept + self.conv2(F.relu(self.norm2(self.conv1(out))))


def ha_net(targets, *, columns=16, width=64, **settings):
    """Kernels in chunks of 16 x 16, each from one z, as Ha et al. generate them."""
    trunk = hk.nn.ColumnTrunk(columns, width, width)
    return hk.HyperNet(targets, chunk=(16, 1), width=width, head_bias=True, trunk=trunk, **settings)


def test_the_published_wide_resnet_counts():
    """Ha et al. 2016, table 4: WRN 40-1 with 0.563M parameters, and 0.097M of which 75,920 are the generator's."""
    model = WideResNet()
    assert parameters(model) // 1000 == 563
    net = ha_net(model, filter_fn=lambda _layer, name: "conv" in name)
    assert parameters(net.trunk) == 16 * (64 * 64 + 64)
    assert parameters(net.heads) + parameters(net.head_biases) == 64 * 144 + 144
    assert parameters(net) - net.embedding.numel() == 75_920
    hyper = hk.HyperModel(model, net)
    assert parameters(hyper) // 1000 == 97
    y = hyper(torch.randn(2, 3, 32, 32))
    y.sum().backward()
    assert net.embedding.grad.abs().sum() > 0


def test_the_published_mnist_kernel_counts():
    """Ha et al. 2016, appendix A.1: a kernel of 7x7x16x16, 12,544 weights, from 4,240 parameters and a z of 4."""
    net = ha_net({"kernel": (16, 16, 7, 7)}, width=4)
    kernel = net()["kernel"]
    assert kernel.numel() == 12_544
    assert net.embedding.shape == (1, 4)
    assert parameters(net) - 4 == 4_240
    z, trunk = net.embedding[0], net.trunk
    a = torch.stack([z @ trunk.weight[q] + trunk.bias[q] for q in range(16)])  # as the paper writes it
    by_hand = (a @ net.heads[0] + net.head_biases[0]).view(16, 16, 7, 7).transpose(0, 1)
    torch.testing.assert_close(form(kernel), by_hand)


VON_OSWALD = {
    "split MNIST": ((784, 400, 400, 10), (10, 10), 96, 96, 42_000, 5, 12, 465_672),
    "permuted MNIST": ((1024, 1000, 1000, 100), (25, 25), 24, 8, 78_000, 10, 28, 2_029_939),
}


@pytest.mark.parametrize(("widths", "layers", "task", "chunk", "size", "tasks", "chunks", "count"), VON_OSWALD.values())
def test_the_published_chunked_counts(widths, layers, task, chunk, size, tasks, chunks, count):
    """von Oswald et al. 2020, chunked: biases generated too, one vector cut wherever it falls."""
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    check_von_oswald(model, layers, task, chunk, size, tasks, chunks, count)


def test_the_published_count_of_three_million_weights():
    check_von_oswald({"weights": (3_027_000,)}, (200, 250, 350), 128, 12, 7_500, 100, 404, 2_816_448)


def check_von_oswald(targets, layers, task, chunk, size, tasks, chunks, count):
    net = hk.HyperNet(
        targets,
        biases=isinstance(targets, nn.Module),
        layout="flat",
        chunk=size,
        width=layers[-1],
        head_bias=True,
        context_features=task,
        encoder=hk.nn.Tasks(tasks, task),
        embedding_features=chunk,
        trunk=hk.nn.MLPTrunk(layers, chunk, context_features=task),
    )
    assert net.embedding.shape == (chunks, chunk)
    assert parameters(net) == count
    if isinstance(targets, nn.Module):
        assert sum(target.numbers for target in net.targets.values()) == parameters(targets)
        x = torch.randn(2, 3, targets[0].in_features)
        y = torch.func.functional_call(targets, net(torch.tensor([0, tasks - 1])), x)
        y.sum().backward()
        assert net.encoder.weight.grad[tasks - 1].abs().sum() > 0
