"""`HyperNet`, `HyperModel`, and the counts that were published."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hyperkernels as hk
from hyperkernels.testing import error, peak_bytes
from hyperkernels.weight import form


class Model(nn.Module):
    """A bit of everything: two kernels, groups, a stride, a linear, and a bias that stays."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, stride=2, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=2)
        self.pointwise = nn.Conv2d(24, 20, 1)
        self.out = nn.Linear(20, 7)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.pointwise(self.grouped(x).relu()).relu()
        return self.out(x.mean((2, 3)))


SETTINGS = {
    "shared": {},
    "shared_chunk": {"chunk": (4, 4)},
    "shared_numbers": {"chunk": 64},
    "shape": {"heads": "shape", "chunk": (4, 4), "head_bias": True},
    "layer": {"heads": "layer"},
}


def hyper_model(**settings):
    model = Model().double()
    net = hk.HyperNet(model, context_features=5, width=6, dtype=torch.float64, **settings)
    for bias in net.head_biases:
        nn.init.normal_(bias)
    return hk.HyperModel(model, net).eval()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_context_per_image_is_a_network_per_image(settings):
    hyper, x, z = hyper_model(**settings), torch.randn(4, 3, 14, 14).double(), torch.randn(4, 5).double()
    y = hyper(x, context=z)
    weights = {name: form(weight) for name, weight in hyper.hypernet(z).items()}
    wanted = [
        torch.func.functional_call(hyper.model, {name: w[g] for name, w in weights.items()}, x[g : g + 1])
        for g in range(4)
    ]
    assert error(y, torch.cat(wanted).detach()).max < 1e-12
    with hk.context(z[:2], torch.tensor([0, 1, 1, 0])):
        by_ids = hyper(x)
    assert error(by_ids[[0, 1]], torch.cat(wanted[:2]).detach()).max < 1e-12
    dense = hyper.to_dense(z[2])
    assert error(dense(x[2:3]), wanted[2].detach()).max < 1e-12
    assert all(isinstance(dense.get_parameter(name), nn.Parameter) for name in weights)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_parameter_of_a_hypernet_learns(settings):
    hyper = hyper_model(**settings)
    hyper(torch.randn(2, 3, 14, 14).double(), context=torch.randn(2, 5).double()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in hyper.named_parameters())


def test_heads_are_shared_as_said():
    heads = {key: hyper_model(**SETTINGS[key]).hypernet.heads for key in ("shared", "shared_numbers", "shape", "layer")}
    assert [len(v) for v in heads.values()] == [1, 1, 4, 4]
    assert heads["shared_numbers"][0].shape[1] <= 64
    same = hk.HyperNet({"a": (8, 6), "b": (4, 6), "c": (8, 3)}, chunk=(4, 3), heads="shape")
    assert [tuple(head.shape) for head in same.heads] == [(32, 12)]


@pytest.mark.parametrize("init", ["fan_in", "fan_out"])
def test_each_target_has_the_variance_of_its_own_fan(init):
    shapes = {"wide": (64, 256), "narrow": (256, 64), "kernel": (64, 32, 3, 3)}
    nets = [hk.HyperNet(shapes, width=16, chunk=(16, 16), init=init) for _ in range(24)]
    for name, (N, K, *kernel) in shapes.items():
        fan = (K if init == "fan_in" else N) * (9 if kernel else 1)
        moments = [form(net()[name]).square().mean() for net in nets]
        assert 0.9 < torch.stack(moments).mean() * fan / 2 < 1.1, name


class Attention(nn.Module):
    """A trunk in which chunks see each other, and the context."""

    def __init__(self, features, context_features):
        super().__init__()
        self.context = nn.Linear(context_features, features)
        self.layer = nn.TransformerEncoderLayer(features, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, embedding, context):
        return self.layer(embedding + self.context(context)[:, None])


def test_any_module_is_a_trunk():
    model = Model()
    net = hk.HyperNet(model, context_features=5, width=8, chunk=(8, 8), trunk=Attention(8, 5))
    y = hk.HyperModel(model, net)(torch.randn(3, 3, 14, 14), context=torch.randn(3, 5))
    y.sum().backward()
    assert y.shape == (3, 7)
    assert all(p.grad is not None for p in net.trunk.parameters())


def test_a_bias_is_a_target_like_another():
    net = hk.HyperNet({"weight": (6, 10), "bias": (6,)}, context_features=3, width=4)
    x, z = torch.randn(5, 2, 10), torch.randn(5, 3)
    weights = net(z)
    wanted = torch.einsum("gnk,gtk->gtn", form(weights["weight"]), x) + form(weights["bias"])[:, None]
    torch.testing.assert_close(torch.func.functional_call(nn.Linear(10, 6), weights, x), wanted)


def test_compiled_without_a_break():
    hyper = hyper_model()
    x, z = torch.randn(4, 3, 14, 14).double(), torch.randn(4, 5).double()
    compiled = torch.compile(hyper, fullgraph=True, backend="aot_eager")
    assert error(compiled(x, context=z), hyper(x, context=z).detach()).max < 1e-12


def test_no_weight_is_formed_for_any_context():
    hyper, x, z = hyper_model(chunk=(4, 4)), torch.randn(64, 3, 14, 14).double(), torch.randn(64, 5).double()
    one = sum(w.numel() for w in hyper.hypernet(z[:1]).values()) * 8
    peak = {n: peak_bytes(lambda n=n: hyper.hypernet(z[:n])) for n in (1, 64)}
    assert peak[64] - peak[1] < 64 * one / 20
    assert hyper(x, context=z).shape == (64, 7)


def test_flops_are_counted_through_a_model():
    hyper, x, z = hyper_model(), torch.randn(2, 3, 14, 14).double(), torch.randn(2, 5).double()
    with FlopCounterMode(display=False) as counter:
        hyper(x, context=z).sum().backward()
    assert counter.get_total_flops() > 0


BAD = {
    "no targets": ({"targets": {}}, ValueError, "targets"),
    "no shape": ({"targets": {"a": (3, 0)}}, ValueError, "'a'"),
    "six dimensions": ({"targets": {"a": (2,) * 6}}, ValueError, "'a'"),
    "a number": ({"targets": 3}, TypeError, "targets"),
    "heads": ({"heads": "each"}, ValueError, "heads"),
    "init": ({"init": "zero"}, ValueError, "init"),
    "nonlinearity": ({"nonlinearity": "tanh"}, ValueError, "nonlinearity"),
    "width": ({"width": 0}, ValueError, "width"),
    "chunk": ({"chunk": (0, 2)}, ValueError, "chunk"),
    "a chunk below a kernel": ({"targets": {"a": (4, 4, 3, 3)}, "chunk": 8}, ValueError, "'a'"),
    "trunk": ({"trunk": len}, TypeError, "trunk"),
    "a trunk of another width": ({"trunk": hk.nn.TrunkLayer(3, 8)}, ValueError, "trunk"),
    "columns": ({"trunk": hk.nn.ColumnTrunk(5, 8, 8), "chunk": (2, 1)}, ValueError, "'weight'"),
}


@pytest.mark.parametrize(("settings", "error", "match"), BAD.values(), ids=BAD)
def test_a_hypernet_that_cannot_be_is_refused(settings, error, match):
    with pytest.raises(error, match=match):
        hk.HyperNet(**({"targets": {"weight": (8, 6)}, "width": 8} | settings))


def test_a_model_that_does_not_fit_is_refused_and_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for targets in ({"0.weight": (3, 4), "1.weight": (2, 4)}, {"0.weight": (3, 4), "2.weight": (2, 3)}):
        with pytest.raises(ValueError, match="hypernet: wanted"):
            hk.HyperModel(model, hk.HyperNet(targets))
    assert sum(p.numel() for p in model.parameters()) == 23
    hyper = hk.HyperModel(model, hk.HyperNet(model, context_features=3))
    with pytest.raises(ValueError, match="context: got none"):
        hyper(torch.randn(2, 4))
    with pytest.raises(ValueError, match="one"):
        hyper.to_dense(torch.randn(2, 3))
    with pytest.raises(ValueError, match="context"):
        hk.HyperNet({"weight": (8, 6)})(torch.randn(2, 3))


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


def parameters(module):
    return sum(p.numel() for p in module.parameters())


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
    torch.testing.assert_close(form(kernel), by_hand * net.targets["kernel"].scale)
