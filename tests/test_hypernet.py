"""`HyperNet`, `HyperModel`, and the counts that were published."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hyperkernels as hk
from hyperkernels.nn.targets import Found
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
    "once": {"strategy": "once"},
    "multi_head": {"strategy": "multi_head", "chunk": (4, 4), "head_bias": True},
    "neuron": {"strategy": "component"},
    "input_channel": {"strategy": "component", "component": "column"},
    "whole_layer": {"strategy": "component", "component": "layer", "head_bias": True},
    "biases": {"biases": True, "chunk": (6, 8)},
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


def test_a_flat_vector_is_cut_where_it_falls():
    """Chunks straddle rows and tensors, and the tail of the last is left."""
    shapes = {"a": (5, 6), "a_bias": (5,), "b": (4, 5)}
    net = hk.HyperNet(shapes, width=3, layout="flat", chunk=7, head_bias=True, context_features=2).double()
    nn.init.normal_(net.head_biases[0])
    assert net.embedding.shape == (8, 3)  # 55 weights
    z, x = torch.randn(4, 2).double(), torch.randn(4, 9, 6).double()
    weights = net(z)
    hidden = net.trunk(net.embedding, z).materialize()[:, :, 0]
    vector = (hidden @ net.heads[0] + net.head_biases[0]).flatten(1)
    stretches = vector[:, :55].split([30, 5, 20], 1)
    for (name, target), stretch in zip(net.targets.items(), stretches):
        torch.testing.assert_close(form(weights[name]), target.scale * stretch.view(4, *target.shape))
    got = F.linear(F.linear(x, weights["a"], weights["a_bias"]).relu(), weights["b"])
    a, bias, b = (form(weight) for weight in weights.values())
    torch.testing.assert_close(got, (x @ a.mT + bias[:, None]).relu() @ b.mT)


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


def test_tied_weights_are_one_target():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    net = hk.HyperNet(model, biases=True)
    assert list(net.targets) == ["0.weight", "0.bias", "1.bias"]
    hk.HyperModel(model, net)(torch.randn(3, 6)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    shared = nn.Sequential(layer := nn.Linear(6, 6), layer)
    assert list(hk.HyperNet(shared).targets) == ["0.weight"]


def second_moments(shapes, **settings):
    nets = [hk.HyperNet(shapes, width=16, chunk=(16, 16), **settings) for _ in range(48)]
    made = [net() for net in nets]
    return {name: torch.stack([form(w[name]).square().mean() for w in made]).mean().item() for name in shapes}


def test_a_generated_bias_takes_its_half_of_the_variance():
    found = second_moments({"fc.weight": (128, 64), "fc.bias": (128,), "out.weight": (32, 128)})
    assert found == pytest.approx({"fc.weight": 1 / 64, "fc.bias": 1, "out.weight": 2 / 128}, rel=0.15)
    found = second_moments({"fc.weight": (128, 64), "fc.bias": (128,)}, init="fan_out", nonlinearity="linear")
    assert found == pytest.approx({"fc.weight": 1 / 128, "fc.bias": 0.5}, rel=0.15)


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
        hyper.hypernet.targets = {n: t._replace(scale=1.0) for n, t in hyper.hypernet.targets.items()}
        found["torch's"].append(hyper(x).detach())
    ours, torchs = (torch.stack(moments).mean(0) for moments in found.values())
    assert ours.min() > 0.3
    assert ours.max() < 3
    assert torchs[-1] > 1e6 or torchs[-1] < 1e-6


class Attention(nn.Module):
    """A trunk in which chunks see each other, and the context."""

    def __init__(self, features, context_features):
        super().__init__()
        self.context = nn.Linear(context_features, features)
        self.layer = nn.TransformerEncoderLayer(features, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, embedding, context):
        return self.layer(embedding + self.context(context)[:, None])


TRUNKS = {
    "mlp": hk.nn.MLPTrunk((16, 8), 8, context_features=5, dropout=0.1),
    "cnn": hk.nn.CNNTrunk(8, 8, context_features=5),
    "rnn": hk.nn.RNNTrunk(8, 8, context_features=5),
    "attention": hk.nn.AttentionTrunk(8, 8, context_features=5),
    "the user's": Attention(8, 5),
}


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
def test_any_module_is_a_trunk(trunk):
    model = Model()
    net = hk.HyperNet(model, context_features=5, width=8, chunk=(8, 8), trunk=trunk)
    y = hk.HyperModel(model, net)(torch.randn(3, 3, 14, 14), context=torch.randn(3, 5))
    y.sum().backward()
    assert y.shape == (3, 7)
    assert all(p.grad is not None for p in net.trunk.parameters())


def test_a_trunk_without_context_is_static():
    for kind in (hk.nn.CNNTrunk, hk.nn.RNNTrunk, hk.nn.AttentionTrunk):
        net = hk.HyperNet({"weight": (12, 10)}, width=8, chunk=(4, 5), trunk=kind(8, 8))
        assert F.linear(torch.randn(3, 10), net()["weight"]).shape == (3, 12)


def test_tasks_data_and_noise_condition_it():
    shapes, x = {"weight": (6, 10)}, torch.randn(4, 3, 10)
    by_task = hk.HyperNet(shapes, context_features=5, encoder=hk.nn.Tasks(7, 5))
    one, two = (F.linear(x, by_task(torch.tensor(ids))["weight"]) for ids in ([3, 3, 0, 6], [3, 1, 2, 6]))
    torch.testing.assert_close(one[[0, 3]], two[[0, 3]])
    assert not torch.allclose(one[1], two[1])
    by_data = hk.HyperNet(shapes, context_features=5, encoder=nn.Sequential(nn.Flatten(), nn.Linear(30, 5)))
    F.linear(x, by_data(x)["weight"]).sum().backward()
    assert by_data.encoder[1].weight.grad.abs().sum() > 0
    by_noise = hk.HyperNet(shapes, context_features=5, encoder=hk.nn.Noise(5))
    members = F.linear(x[:1].expand(9, 3, 10), by_noise(9)["weight"])
    assert members.std(0).min() > 0
    sample = torch.randn(9, 5)
    assert torch.equal(form(by_noise(sample)["weight"]), form(by_noise(sample)["weight"]))


def test_targets_may_differ_from_call_to_call():
    shapes = {"0.weight": (12, 10), "2.weight": (5, 12)}
    net = hk.HyperNet(shapes, context_features=3, width=8, chunk=(4, 4), descriptors=True)
    z = torch.randn(2, 3)
    for widths in ((10, 12, 5), (10, 30, 7, 5), (6, 9, 9, 9, 2)):
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        model = nn.Sequential(*itertools.chain(*((layer, nn.ReLU()) for layer in layers)))
        weights = net(z, targets=model)
        assert [tuple(w.shape) for w in weights.values()] == [(b, a) for a, b in itertools.pairwise(widths)]
        y = torch.func.functional_call(model, weights, torch.randn(2, 7, widths[0]))
        y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    same = [form(w) for w in net(z, targets=shapes).values()]
    for got, wanted in zip(same, net(z).values()):
        torch.testing.assert_close(got, form(wanted))
    alike = net.descriptors(net._cut(dict.fromkeys("abc", Found((12, 10)))).values())
    assert len(alike.unique(dim=0)) == len(alike) == 3 * 9, "no two chunks look the same"
    with pytest.raises(ValueError, match="targets: got a chunk of 400 numbers in 'kernel'"):
        net(z, targets={"kernel": (4, 4, 5, 5)})
    with pytest.raises(ValueError, match="descriptors=True"):
        hk.HyperNet(shapes)(targets=shapes)


def test_a_bias_is_a_target_like_another():
    net = hk.HyperNet({"weight": (6, 10), "bias": (6,)}, context_features=3, width=4)
    x, z = torch.randn(5, 2, 10), torch.randn(5, 3)
    weights = net(z)
    wanted = torch.einsum("gnk,gtk->gtn", form(weights["weight"]), x) + form(weights["bias"])[:, None]
    torch.testing.assert_close(torch.func.functional_call(nn.Linear(10, 6), weights, x), wanted)


def test_a_weight_of_two_names_stays_one():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    hyper = hk.HyperModel(model, hk.HyperNet({"0.weight": (6, 6)}))
    assert [name for name, _ in hyper.model.named_parameters()] == ["0.bias", "2.bias"]
    x, weight = torch.randn(3, 6), form(hyper.hypernet()["0.weight"])
    wanted = F.linear(F.linear(x, weight, model[0].bias).relu(), weight, model[2].bias)
    torch.testing.assert_close(hyper(x), wanted)
    dense = hyper.to_dense()
    assert dense[0].weight is dense[2].weight


def test_under_autocast():
    hyper = hk.HyperModel(model := Model(), hk.HyperNet(model, context_features=5, width=6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = hyper(torch.randn(2, 3, 14, 14), context=torch.randn(2, 5))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16


def test_compiled_without_a_break():
    hyper = hyper_model()
    x, z = torch.randn(4, 3, 14, 14).double(), torch.randn(4, 5).double()
    compiled = torch.compile(hyper, fullgraph=True, backend="aot_eager")
    assert error(compiled(x, context=z), hyper(x, context=z).detach()).max < 1e-12


@pytest.mark.parametrize("strategy", ["once", "multi_head"])
def test_large_heads_are_read_where_they_lie(strategy):
    net = hk.HyperNet(
        {"a": (600, 500), "b": (500, 600)}, context_features=3, width=8, strategy=strategy, chunk=(60, 50)
    )
    x, z = torch.randn(2, 500), torch.randn(2, 3)

    def run():
        weights = net(z)
        return F.linear(F.linear(x, weights["a"]), weights["b"])

    hk.set_workspace_mib(1)
    try:
        with torch.no_grad():
            run()
            assert peak_bytes(run) < net.heads[0].numel() * 4 / 3
    finally:
        hk.set_workspace_mib(64)


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
    "strategy": ({"strategy": "all"}, ValueError, "strategy"),
    "component": ({"component": "filter"}, ValueError, "component"),
    "layout": ({"layout": "flat"}, ValueError, "layout"),
    "layout and strategy": ({"layout": "flat", "chunk": 4, "strategy": "once"}, ValueError, "layout"),
    "encoder": ({"encoder": hk.nn.Tasks(3, 4)}, ValueError, "encoder"),
    "an encoder that is none": ({"encoder": 3, "context_features": 3}, TypeError, "encoder"),
    "no targets": ({"targets": {}}, ValueError, "targets"),
    "no shape": ({"targets": {"a": (3, 0)}}, ValueError, "'a'"),
    "six dimensions": ({"targets": {"a": (2,) * 6}}, ValueError, "'a'"),
    "a filter without a module": ({"filter_fn": lambda _layer, _name: True}, ValueError, "filter_fn"),
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


def test_tasks_and_noise_that_are_none_are_refused():
    tasks, noise = hk.nn.Tasks(3, 4), hk.nn.Noise(4)
    for given, kind, match in (
        (torch.tensor([0, 3]), ValueError, r"task: got \[0, 3\], wanted 0 to 2"),
        (torch.tensor([-1]), ValueError, "task"),
        (torch.tensor([0.5]), TypeError, "task"),
        ("first", TypeError, "task"),
    ):
        with pytest.raises(kind, match=match):
            tasks(given)
    with pytest.raises(ValueError, match=r"sample: got shape \[2, 5\], wanted \[G, 4\]"):
        noise(torch.randn(2, 5))
    with pytest.raises(ValueError, match="count"):
        noise(0)


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


def test_what_fan_out_starts_at_zero_can_learn():
    net = hk.HyperNet({"fc.weight": (4, 16), "fc.bias": (4,)}, init="fan_out", width=4, chunk=(4, 4))
    bias = form(net()["fc.bias"])
    assert 0 < bias.abs().max() < 0.1
    bias.sum().backward()
    assert net.heads[net.head_of["fc.bias"]].grad.abs().max() > 0
