"""How a `HyperNet` starts: the variances of what it generates, and of activations through layers of it."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperkernels as hk
from hyperkernels.nn.start import STRICT, Moments, draw_head_, moments
from hyperkernels.testing import peak_bytes
from hyperkernels.weight import form


@pytest.mark.parametrize("init", ["fan_in", "fan_out"])
def test_each_target_has_the_variance_of_its_own_fan(init):
    shapes = {"wide": (64, 256), "narrow": (256, 64), "kernel": (64, 32, 3, 3)}
    nets = [hk.HyperNet(shapes, width=16, chunk=(16, 16), init=init) for _ in range(24)]
    for name, (N, K, *kernel) in shapes.items():
        fan = (K if init == "fan_in" else N) * (9 if kernel else 1)
        moments = [form(net()[name]).square().mean() for net in nets]
        assert 0.9 < torch.stack(moments).mean() * fan / 2 < 1.1, name


LAYERS = {
    "convolution": (lambda: nn.Conv2d(8, 32, 3), 8 * 9, 32 * 9),
    "grouped": (lambda: nn.Conv2d(8, 32, 3, groups=4), 2 * 9, 8 * 9),
    "transposed": (lambda: nn.ConvTranspose2d(8, 32, 3), 8 * 9, 32 * 9),
    "transposed_grouped": (lambda: nn.ConvTranspose2d(8, 32, 3, groups=4), 2 * 9, 8 * 9),
}


@pytest.mark.parametrize(("make", "fan_in", "fan_out"), LAYERS.values(), ids=LAYERS)
def test_fans_are_what_an_output_sums_and_an_input_reaches(make, fan_in, fan_out):
    for init, fan in (("fan_in", fan_in), ("fan_out", fan_out)):
        nets = [hk.HyperNet(make(), width=16, chunk=(2, 2), init=init) for _ in range(24)]
        moment = torch.stack([form(net()["weight"]).square().mean() for net in nets]).mean()
        assert 0.85 < moment * fan / 2 < 1.15


def second_moments(shapes, **settings):
    nets = [hk.HyperNet(shapes, **({"width": 16, "chunk": (16, 16)} | settings)) for _ in range(48)]
    made = [net() for net in nets]
    return {name: torch.stack([form(w[name]).square().mean() for w in made]).mean().item() for name in shapes}


def test_a_generated_bias_takes_its_half_of_the_variance():
    found = second_moments({"fc.weight": (128, 64), "fc.bias": (128,), "out.weight": (32, 128)})
    assert found == pytest.approx({"fc.weight": 1 / 64, "fc.bias": 1, "out.weight": 2 / 128}, rel=0.15)
    for nonlinearity, c in (("linear", 1), ("relu", 2)):
        found = second_moments({"fc.weight": (128, 64), "fc.bias": (128,)}, init="fan_out", nonlinearity=nonlinearity)
        assert found == pytest.approx({"fc.weight": c / 128, "fc.bias": c / 2}, rel=0.15)


class Deep(nn.Module):
    """Ten layers of different widths, and the second moment after each."""

    def __init__(self, widths=(256, 64, 512, 64, 256, 128, 512, 64, 128, 512, 256)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths))

    def forward(self, x):
        moments = []
        for layer in self.layers:
            x = F.relu(layer(x))
            moments.append(x.square().mean())
        return torch.stack(moments)


def test_activations_keep_their_size_through_ten_layers_as_they_do_not_by_torchs_start():
    x, found = torch.randn(64, 256), {"ours": [], "torch's": []}
    for _ in range(16):
        hyper = hk.HyperModel(Deep(), hk.HyperNet(Deep(), width=32))
        found["ours"].append(hyper(x).detach())
        for parameter in [*hyper.hypernet.heads, hyper.hypernet.embedding]:  # as nn.Linear and nn.Embedding start
            bound = len(parameter) ** -0.5
            nn.init.uniform_(parameter, -bound, bound) if parameter.shape[0] == 32 else nn.init.normal_(parameter)
        nn.init.ones_(hyper.hypernet.scales)
        found["torch's"].append(hyper(x).detach())
    ours, torchs = (torch.stack(moments).mean(0) for moments in found.values())
    assert ours.min() > 0.3
    assert ours.max() < 3
    assert torchs[-1] > 1e6 or torchs[-1] < 1e-6


class Both(nn.Module):
    """A trunk of two layers on `[embedding, z]`."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32 + 16, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, embedding, z):
        every = (len(z), len(embedding), -1)
        return self.layers(torch.cat([embedding.expand(every), z[:, None].expand(every)], -1))


Z = {"context_features": 16}
CONDITIONAL = {
    "planned": {},
    "chunks": {"chunk": (16, 16)},
    "wide": {"width": 128},
    "many_features": {"context_features": 64, "chunk": (16, 16)},
    "wide_and_many": {"width": 256, "context_features": 128, "chunk": (16, 16)},
    "layer": {"heads": "layer"},
    "rows": {"strategy": "component"},
    "flat": {"layout": "flat", "chunk": 200},
    "relu_trunk": {"chunk": (16, 16), "trunk": partial(hk.nn.TrunkLayer, 32, 32, **Z, activation="relu")},
    "two_layers": {"chunk": (16, 16), "trunk": Both},
    "descriptors": {"chunk": (16, 16), "descriptors": True},
    "attention": {"chunk": (16, 16), "trunk": partial(hk.nn.AttentionTrunk, 32, 32, **Z)},
}


@pytest.mark.parametrize(("name", "settings"), CONDITIONAL.items(), ids=CONDITIONAL)
def test_activations_of_a_conditional_net_keep_their_size_too(name, settings):
    """What all chunks of a context have in common repeats over a weight: 16 chunks in a row would have it grow up to 16
    times a layer, 3e5 in six."""
    found, x = [], torch.randn(32, 256)
    for _ in range(8):
        own = Z | settings | ({"trunk": settings["trunk"]()} if "trunk" in settings else {})
        target = Deep([256] * 7)
        z = torch.randn(1, own["context_features"])
        found.append(hk.HyperModel(target, hk.HyperNet(target, **own))(x, context=z).detach())
    growth = torch.stack(found).mean(0)[-1]
    assert 0.1 < growth < (100 if name == "two_layers" else 10)  # which leaves less room


@pytest.mark.parametrize(("built", "called"), [((64, 1), (64, 12)), ((128, 12), (256, 12))])
def test_layers_that_were_not_there_at_the_start_keep_activations_too(built, called):
    """Computed embeddings: layer after layer is another matrix (they were alike by 0.9), and none explodes."""

    def targets(size, depth):
        return {f"{n}.weight": (size, size) for n in range(depth)}

    for _ in range(12):
        net, y = hk.HyperNet(targets(*built), descriptors=True), torch.randn(64, called[0])
        with torch.no_grad():
            weights = [weight.materialize() for weight in net(targets=targets(*called)).values()]
        alike = torch.corrcoef(torch.stack(weights).flatten(1)).diagonal(1).mean()
        for weight in weights:
            y = F.relu(F.linear(y, weight))
        assert abs(alike) < 0.4
        assert y.square().mean() < 200  # 4e4 and 6e7 before


def test_layers_of_their_own_hypernetworks_keep_activations_too():
    z, x = torch.randn(1, 16), torch.randn(32, 256)
    moments = []
    for _ in range(8):
        y = x
        for _ in range(6):  # nn.Linear's own start is a sixth of He's variance
            layer = hk.HyperLinear(256, 256, bias=False, context_features=16, chunk=(16, 16))
            y = 6**0.5 * F.relu(layer(y, z))
        moments.append(y.square().mean().item())
    assert 0.1 < sum(moments) / len(moments) < 10


def test_a_head_is_drawn_small_along_what_repeats_and_along_no_more():
    """Of hidden's directions one repeats along rows, one along columns, the others are each chunk's own."""
    I, J = 8, 16

    def hidden(z):
        found = torch.randn(len(z), I, J, 4)
        found[..., 0] = torch.randn(len(z), I, 1)
        found[..., 1] = torch.randn(len(z), 1, J)
        return found

    (own,) = moments(hidden, torch.randn(512, 3), [(slice(None), J)])
    wanted = torch.diag(torch.tensor([float(J), float(I), 0.0, 0.0]))
    torch.testing.assert_close(own.repeated, wanted, rtol=0.1, atol=0.5)
    torch.testing.assert_close(own.hidden, torch.eye(4), rtol=0.1, atol=0.1)
    assert own.chance == pytest.approx((4 * 4 / (512 * I) + 4 * 4 / (512 * J)) ** 0.5)
    head = torch.empty(4, 20000)
    draw_head_(head, [Moments(torch.eye(4), wanted, 1.0)])
    sizes = [1 / (1 + STRICT * (J - 1)), 1 / (1 + STRICT * (I - 1)), 1.0, 1.0]
    assert head.square().mean(1).sqrt().tolist() == pytest.approx(sizes, rel=0.05)
    assert STRICT == 16, "what is left adds a 64th to a layer's gain"


def test_heads_have_no_bias_at_first():
    net = hk.HyperNet({"w": (8, 6)}, width=4, head_bias=True)
    nn.init.ones_(net.head_biases[0])
    net.reset_parameters()
    assert not net.head_biases[0].any()


def test_a_hyper_layers_own_hypernetwork_is_measured_as_in_evaluation():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.dropout = nn.Parameter(torch.randn(4, 4, 8)), nn.Dropout(0.9)

        def forward(self, z=None):
            return self.dropout(self.embedding)

    layer = hk.HyperLinear(64, 64, width=8, chunk=(16, 16), hypernet=Own())
    assert layer.hypernet.training
    assert layer.hypernet.dropout.training
    variance = layer.eval().to_dense().weight.var() * 3 * 64
    assert 0.5 < variance < 2


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_trunk_that_is_yet_to_be_filled_can_be_built_in(value):
    class Own(nn.Module):
        def forward(self, embedding, z=None):
            return embedding * value

    assert hk.HyperNet({"w": (8, 6)}, width=4, chunk=(4, 3), trunk=Own()).heads[0].shape == (4, 12)
    with pytest.raises(ValueError, match="context: got none, wanted one at least"):
        hk.HyperNet({"w": (8, 6)}, context_features=3).reset_parameters(torch.empty(0, 3))


def test_contexts_still_differ():
    net = hk.HyperNet({"w": (256, 256)}, context_features=16, chunk=(16, 16))
    found = hk.algebra.gram(net(torch.randn(8, 16))["w"])
    cosines = found / found.diag().outer(found.diag()).sqrt()
    assert (cosines - torch.eye(8)).max() < 0.97


def test_what_fan_out_starts_at_zero_can_learn():
    net = hk.HyperNet({"fc.weight": (4, 16), "fc.bias": (4,)}, init="fan_out", width=4, chunk=(4, 4))
    bias = form(net()["fc.bias"])
    assert 0 < bias.abs().max() < 0.1
    bias.sum().backward()
    assert net.heads[net.head_of["fc.bias"]].grad.abs().max() > 0


class Growing(nn.Module):
    """A trunk whose output grows from chunk to chunk, and with z."""

    def forward(self, embedding, context=None):
        hidden = embedding * torch.arange(1.0, len(embedding) + 1)[:, None]
        return hidden if context is None else hidden * context.norm(dim=1)[:, None, None]


@pytest.mark.parametrize("heads", ["shared", "layer"])
@pytest.mark.parametrize("layout", [{"chunk": (16, 16)}, {"layout": "flat", "chunk": 256}], ids=["tiles", "flat"])
def test_a_target_has_its_variance_whatever_the_trunk_makes_of_its_chunks(heads, layout):
    shapes = {"first": (64, 128), "last": (128, 64)}
    if "layout" in layout and heads == "layer":
        layout = layout | {"chunk": 250}  # chunks straddle the two
        heads = None
    found = second_moments(shapes, trunk=Growing(), heads=heads, **layout)
    assert found == pytest.approx({"first": 2 / 128, "last": 2 / 64}, rel=0.15)


def test_the_trunks_output_is_measured_by_what_it_sees():
    """Tasks' own embeddings, and what an encoder makes of data, however small."""
    tasks = hk.nn.Tasks(9, 4)
    nn.init.normal_(tasks.weight, std=0.01)
    data = nn.Linear(6, 4, bias=False)
    nn.init.normal_(data.weight, std=0.01)
    batch, moments = torch.randn(12, 6), {"tasks": [], "data": []}
    for _ in range(16):
        given = {"context_features": 4, "width": 16, "trunk": Growing(), "chunk": (16, 16)}
        by_task = hk.HyperNet({"w": (64, 64)}, encoder=tasks, **given)
        by_data = hk.HyperNet({"w": (64, 64)}, encoder=data, **given)
        by_data.reset_parameters(batch)
        moments["tasks"].append(form(by_task(torch.arange(9))["w"]).square().mean())
        moments["data"].append(form(by_data(batch)["w"]).square().mean())
    for name, found in moments.items():
        assert 0.85 < torch.stack(found).mean() * 64 / 2 < 1.15, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_another_default_dtype_is_no_matter(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for settings in ({}, {"strategy": "multi_head"}, {"descriptors": True, "chunk": (4, 4)}):
            for own in (dtype, torch.float32):
                hk.HyperNet({"w": (16, 12)}, context_features=3, width=8, dtype=own, **settings)
        hk.HyperLinear(16, 12, context_features=3, width=8, dtype=torch.float32)
    finally:
        torch.set_default_dtype(before)


def test_the_start_of_many_targets_holds_no_moments_of_each_context():
    net = hk.HyperNet({str(n): (128, 128) for n in range(40)}, context_features=16, width=64, chunk=(32, 32))
    of_every_context = 40 * 128 * 2 * 64 * 64 * 4
    assert peak_bytes(net.reset_parameters) < of_every_context / 4


def test_a_net_without_memory_at_first_starts_as_any_other():
    for settings in ({}, {"descriptors": True}):
        net = hk.HyperNet({"w": (64, 64)}, context_features=3, width=8, chunk=(8, 8), device="meta", **settings)
        net.to_empty(device="cpu")
        with torch.no_grad():
            for value in (*net.parameters(), *net.buffers()):
                value.fill_(torch.nan)
        net.reset_parameters()
        variance = torch.cat([form(net(torch.randn(8, 3))["w"]).flatten()]).var()
        assert 0.3 < variance * 64 / 2 < 3


def test_the_start_is_measured_as_in_evaluation():
    trunk = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.9))

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = trunk

        def forward(self, embedding, z):
            return self.inner(embedding)

    net = hk.HyperNet({"w": (64, 64)}, width=8, chunk=(64, 64), trunk=Own())
    assert trunk.training
    assert trunk[1].num_batches_tracked == 0
    assert 0.2 < form(net.eval()()["w"]).var() * 64 / 2 < 5


@pytest.mark.parametrize("kind", [hk.HyperConv1d, hk.HyperConv2d, hk.HyperConvTranspose2d])
def test_a_change_of_memory_format_leaves_heads_as_they_are(kind):
    layer = kind(8, 8, 3, width=2, chunk=(4, 4))
    x = torch.randn(2, 8, *[6] * (1 if kind is hk.HyperConv1d else 2))
    before = layer(x)
    layer.to(memory_format=torch.channels_last)
    assert layer.head.is_contiguous()
    torch.testing.assert_close(layer(x), before)
    assert layer.double()(x.double()).dtype == layer.head.dtype == torch.float64
    layer.reset_parameters()
    assert not torch.allclose(layer(x.double()), before.double())


def test_a_trunk_that_does_not_look_at_its_context_starts_as_well():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, embedding, z):
            return self.layer(embedding)

    net = hk.HyperNet({"w": (60, 50)}, context_features=3, width=8, chunk=(10, 10), trunk=Own())
    assert 0.2 < form(net(torch.randn(1, 3))["w"]).var() * 50 / 2 < 5
