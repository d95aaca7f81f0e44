"""`HyperLinear`: initial variance, contexts, bias, saving and copying."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hyperkernels as hk
from hyperkernels.chunking import Grid

KINDS = {
    "static": {},
    "generated_bias": {"bias": "generated"},
    "no_bias": {"bias": False},
    "conditional": {"context_features": 5},
    "conditional_generated_bias": {"context_features": 5, "bias": "generated"},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def make(kind, **keywords):
    layer = hk.HyperLinear(30, 20, width=4, **kind, **keywords)
    z = torch.randn(7, 5) if layer.context_features else None
    return layer, torch.randn(7, 3, 30), z


@kinds
def test_is_the_linear_layer_it_generates(kind):
    layer, x, z = make(kind)
    linears = [layer.to_dense(None if z is None else z[g]) for g in range(7)]
    wanted = torch.stack([linear(x[g]) for g, linear in enumerate(linears)])
    torch.testing.assert_close(layer(x, z), wanted)


@pytest.mark.parametrize("context_features", [None, 16])
@pytest.mark.parametrize("bias", [True, "generated"])
@pytest.mark.parametrize("shape", [(512, 256), (256, 1024)], ids=str)
def test_initial_weights_have_the_variance_of_nn_linear(shape, bias, context_features):
    K, N = shape
    default = nn.Linear(K, N)
    layers = [hk.HyperLinear(K, N, bias, context_features=context_features) for _ in range(16)]
    zs = [None] if context_features is None else torch.randn(4, context_features)
    linears = [layer.to_dense(z) for layer in layers for z in zs]
    ratio = torch.stack([v.weight.var() for v in linears]).mean() / default.weight.var()
    assert 0.9 < ratio < 1.1
    bias_ratio = torch.stack([v.bias.square().mean() for v in linears]).mean() * 3 * K  # a few numbers share a mean
    assert 0.75 < bias_ratio < 1.3
    assert linears[0].weight.mean().abs() < 0.1 * default.weight.std()


def test_every_parameter_gets_a_gradient():
    layer, x, z = make(KINDS["conditional_generated_bias"])
    layer(x, z).square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_where_the_context_comes_from():
    layer, x, z = make(KINDS["conditional"])
    other = torch.randn(7, 5)
    wanted = layer(x, z)
    with hk.context(other):
        assert torch.equal(layer(x, z), wanted)  # the argument counts first
        with hk.context(z):
            assert torch.equal(layer(x), wanted)  # then the innermost ambient one
        assert torch.equal(layer(x), layer(x, other))
    with pytest.raises(ValueError, match="context: got none"):
        layer(x)


def test_the_ambient_context_is_left_after_an_error():
    layer, x, z = make(KINDS["conditional"])
    with pytest.raises(RuntimeError, match="inside"), hk.context(z):
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="context: got none"):
        layer(x)


def test_a_static_layer_ignores_the_ambient_context():
    layer, x, _ = make(KINDS["static"])
    with hk.context(torch.randn(7, 5)):
        assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("kind", ["conditional", "conditional_generated_bias"])
def test_context_ids(kind):
    layer, _, z = make(KINDS[kind])
    x, ids = torch.randn(9, 2, 30), torch.tensor([6, 0, 0, 1, 6, 6, 3, 3, 3])
    wanted = torch.stack([layer.to_dense(z[g])(x[n]) for n, g in enumerate(ids)])
    torch.testing.assert_close(layer(x, z, ids), wanted)
    with hk.context(z, ids):
        torch.testing.assert_close(layer(x), wanted)


@kinds
def test_empty_batches(kind):
    layer, _, z = make(kind)
    y = layer(torch.randn(7, 0, 30), z)
    y.sum().backward()
    assert y.shape == (7, 0, 20)
    if z is not None:
        assert layer(torch.randn(0, 30), z[:0]).shape == (0, 20)


def test_a_meta_layer_can_be_called():
    for kind in KINDS.values():
        layer, x, z = make(kind, device="meta")
        y = layer(x.to("meta"), None if z is None else z.to("meta"))
        assert (y.shape, y.device.type) == ((7, 3, 20), "meta")


def test_a_hypernetwork_that_returns_zeros_gives_finite_heads():
    class Zeros(nn.Module):
        def forward(self, z):
            return torch.zeros(3, 2, 4)

    layer = hk.HyperLinear(10, 9, chunk=(3, 5), width=4, hypernet=Zeros())
    assert layer.head.isfinite().all()


def test_one_context_for_all():
    layer, x, z = make(KINDS["conditional_generated_bias"])
    torch.testing.assert_close(layer(x, z[0]), layer(x, z[:1].expand(7, 5)))


@kinds
def test_state_dict_deepcopy_pickle_and_save(kind):
    layer, x, z = make(kind)
    wanted = layer(x, z)
    fresh, _, _ = make(kind)
    assert not torch.equal(fresh(x, z), wanted)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False))
    for other in copies:
        assert torch.equal(other(x, z), wanted)


@kinds
def test_meta_device_then_reset_parameters(kind):
    layer, x, z = make(kind, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    layer.reset_parameters()
    assert layer(x, z).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(dtype):
    layer, x, z = make(KINDS["conditional_generated_bias"], dtype=dtype)
    assert layer(x.to(dtype), z.to(dtype)).dtype == dtype
    assert layer.float()(x, z).dtype == torch.float32


def test_autocast():
    layer, x, z = make(KINDS["conditional_generated_bias"])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, z)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x, z), atol=0.05, rtol=0.05)


def test_a_hypernetwork_of_ones_own():
    class Own(nn.Module):
        def __init__(self, grid: Grid) -> None:
            super().__init__()
            self.layer = nn.Linear(5, grid.I * grid.J * 4)
            self.shape = (grid.I, grid.J, 4)

        def forward(self, z):
            return self.layer(z).tanh().unflatten(-1, self.shape)

    grid = Grid(20, 30, 4, 10)
    layer = hk.HyperLinear(30, 20, context_features=5, chunk=(4, 10), width=4, hypernet=Own(grid))
    x, z = torch.randn(7, 3, 30), torch.randn(7, 5)
    wanted = torch.stack([layer.to_dense(z[g])(x[g]) for g in range(7)])
    torch.testing.assert_close(layer(x, z), wanted)
    before = [p.clone() for p in layer.hypernet.parameters()]
    layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.hypernet.parameters()))


def test_repr_says_what_it_is():
    text = repr(hk.HyperLinear(64, 32, context_features=3, width=8))
    for words in ("in_features=64", "out_features=32", "context_features=3", "width=8", "parameters for 2,048 weights"):
        assert words in text


def test_trains():
    """A static layer fits a linear map whose weight is a sum of a few Kronecker products."""
    target = hk.HyperLinear(32, 32, width=2, chunk=(4, 8), bias=False).requires_grad_(False)
    layer = hk.HyperLinear(32, 32, width=4, chunk=(4, 8), bias=False)
    x = torch.randn(256, 32)
    wanted = target(x)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(300):
        loss = (layer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02 * wanted.square().mean()


def test_flops_of_a_static_layer_are_counted_in_inference_mode():
    layer = hk.HyperLinear(16, 8, width=4)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        layer(torch.randn(3, 16))
    assert counter.get_total_flops() > 0
