"""`HyperNet` and `HyperModel`: strategies, heads and layouts, and what models do with what is generated."""

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
    for n, ((name, target), stretch) in enumerate(zip(net.targets.items(), stretches)):
        torch.testing.assert_close(form(weights[name]), net.scales[n] * stretch.view(4, *target.shape))
    got = F.linear(F.linear(x, weights["a"], weights["a_bias"]).relu(), weights["b"])
    a, bias, b = (form(weight) for weight in weights.values())
    torch.testing.assert_close(got, (x @ a.mT + bias[:, None]).relu() @ b.mT)


def test_heads_are_shared_as_said():
    heads = {key: hyper_model(**SETTINGS[key]).hypernet.heads for key in ("shared", "shared_numbers", "shape", "layer")}
    assert [len(v) for v in heads.values()] == [1, 1, 4, 4]
    assert heads["shared_numbers"][0].shape[1] <= 64
    same = hk.HyperNet({"a": (8, 6), "b": (4, 6), "c": (8, 3)}, chunk=(4, 3), heads="shape")
    assert [tuple(head.shape) for head in same.heads] == [(32, 12)]


def test_tied_weights_are_one_target():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    net = hk.HyperNet(model, biases=True)
    assert list(net.targets) == ["0.weight", "0.bias", "1.bias"]
    hk.HyperModel(model, net)(torch.randn(3, 6)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    shared = nn.Sequential(layer := nn.Linear(6, 6), layer)
    assert list(hk.HyperNet(shared).targets) == ["0.weight"]


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
    chunk = (60, 50) if strategy == "multi_head" else None
    net = hk.HyperNet({"a": (600, 500), "b": (500, 600)}, context_features=3, width=8, strategy=strategy, chunk=chunk)
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
    "a flat chunk of nothing": ({"layout": "flat", "chunk": 0}, ValueError, "chunk: got 0, wanted a positive"),
    "a flat chunk below nothing": ({"layout": "flat", "chunk": -3}, ValueError, "chunk: got -3"),
    "a flat chunk of yes": ({"layout": "flat", "chunk": True}, ValueError, "chunk: got True"),
    "a chunk of yes": ({"chunk": True}, ValueError, "chunk: got True"),
    "a chunk of all": ({"strategy": "once", "chunk": (2, 2)}, ValueError, r"chunk: got \(2, 2\), wanted None"),
    "a chunk of a row": ({"strategy": "component", "chunk": 9}, ValueError, "chunk: got 9, wanted None"),
    "a component of chunks": ({"component": "layer"}, ValueError, "component: got 'layer'"),
    "heads of chunks": ({"strategy": "multi_head", "heads": "shared"}, ValueError, "heads: got 'shared', wanted None"),
    "descriptors of heads": ({"strategy": "multi_head", "descriptors": True}, ValueError, "descriptors: got True"),
    "a trunk of two": ({"trunk": nn.GRU(8, 8)}, TypeError, "trunk: got tuple, wanted hidden as a tensor"),
    "encoder": ({"encoder": hk.nn.Tasks(3, 4)}, ValueError, "encoder"),
    "an encoder that is none": ({"encoder": 3, "context_features": 3}, TypeError, "encoder"),
    "no targets": ({"targets": {}}, ValueError, "targets"),
    "no shape": ({"targets": {"a": (3, 0)}}, ValueError, "'a'"),
    "six dimensions": ({"targets": {"a": (2,) * 6}}, ValueError, "'a'"),
    "a filter that is none": ({"filter_fn": "linear"}, TypeError, "filter_fn: got str, wanted a function"),
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


def test_settings_that_a_flat_vector_has_no_use_for_are_refused():
    for name, value in (("order", "generate"), ("backend", "torch")):
        net = hk.HyperNet({"weight": (8, 6)}, layout="flat", chunk=7)
        setattr(net, name, value)
        with pytest.raises(ValueError, match=f"{name}: got '{value}', wanted None"):
            net()


def test_a_context_of_another_dtype_is_refused():
    net = hk.HyperNet({"weight": (8, 6)}, context_features=3)
    with pytest.raises(TypeError, match=r"context: got torch.float64, wanted the hypernetwork's dtype torch.float32"):
        net(torch.randn(2, 3).double())


@pytest.mark.parametrize("layout", [{"chunk": (4, 4)}, {"layout": "flat", "chunk": 16}], ids=["tiles", "flat"])
def test_a_state_is_all_that_is_generated(layout):
    def make():
        return hk.HyperNet({"a": (8, 6), "b": (12, 8), "b_bias": (12,)}, width=4, **layout)

    one, other = make(), make()
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(form(w), form(v)) for w, v in zip(one().values(), other().values()))


def test_a_state_that_does_not_fit_is_refused_before_any_of_it_is_loaded():
    net = hk.HyperNet({"a": (8, 6), "b": (6, 8)}, context_features=3, width=4, chunk=(2, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    other = {name: value + 1 for name, value in before.items()}
    damaged = {
        r"embedding of shape \[23, 4\], wanted \[24, 4\]": other | {"embedding": other["embedding"][1:]},
        "no embedding": {name: value for name, value in other.items() if name != "embedding"},
        "colour, which is none here": other | {"colour": torch.ones(2)},
    }
    for match, state in damaged.items():
        with pytest.raises(RuntimeError, match=match):
            net.load_state_dict(state)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.load_state_dict({"scales": other["scales"]}, strict=False).missing_keys
    net.load_state_dict(other)
    assert torch.equal(net.embedding, other["embedding"])
    with pytest.raises(TypeError, match="state_dict: got int, wanted tensors by name"):
        net.load_state_dict(3)
    with pytest.raises(TypeError, match="state_dict: got embedding of int, wanted a tensor"):
        net.load_state_dict(other | {"embedding": 3})


@pytest.mark.parametrize(
    "build",
    [
        lambda: hk.HyperModel(net := nn.Sequential(nn.Linear(6, 8)), hk.HyperNet(net, context_features=4)),
        lambda: hk.nn.HyperRNNCell(4, 6),
        lambda: hk.nn.HyperLSTMCell(4, 6, generates="rows"),
    ],
    ids=["model", "rnn", "lstm"],
)
def test_what_has_a_hypernetwork_loads_all_of_a_state_or_nothing(build):
    module = build()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    other = {name: value + 1 for name, value in before.items()}
    last = list(other)[-1]
    with pytest.raises(RuntimeError, match=f"state_dict: got no {last}"):
        module.load_state_dict({name: value for name, value in other.items() if name != last})
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.load_state_dict(other)
    assert all(torch.equal(value, other[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("encoder", [hk.nn.Noise(4), hk.nn.Tasks(7, 4), hk.nn.Tasks(7, 3, beside=1)], ids=str)
def test_an_encoder_of_another_size_is_refused(encoder):
    with pytest.raises(ValueError, match="encoder: got one of 4 features, wanted context_features=5"):
        hk.HyperNet({"a": (8, 6)}, context_features=5, encoder=encoder)
    hk.HyperNet({"a": (8, 6)}, context_features=4, encoder=encoder)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(nn.ConvTranspose1d, {}), (nn.ConvTranspose3d, {}), (nn.ConvTranspose2d, {"layout": "flat", "chunk": 9})],
    ids=["1d", "3d", "flat"],
)
def test_layers_that_would_have_their_weight_formed_are_no_targets(kind, layout):
    model = nn.Sequential(nn.Linear(4, 4), kind(4, 4, 3))
    with pytest.raises(ValueError, match=f"targets: got {kind.__name__} '1' in the layout"):
        hk.HyperNet(model, **layout)
    assert len(hk.HyperNet(model, filter_fn=lambda _layer, name: name == "0", **layout).targets) == 1
