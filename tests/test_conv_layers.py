"""`HyperConv1d`, `2d` and `3d`: the layers that they stand for, with nn.ConvNd's settings and its errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hyperkernels as hk

SETTINGS = {
    "plain": {"padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "grouped": {"groups": 3},
    "depthwise": {"groups": 6, "padding": 1},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular_same": {"padding": "same", "padding_mode": "circular"},
    "no_bias": {"bias": False},
    "generated_bias": {"bias": "generated"},
}
LAYERS = {1: (hk.HyperConv1d, nn.Conv1d), 2: (hk.HyperConv2d, nn.Conv2d), 3: (hk.HyperConv3d, nn.Conv3d)}


@pytest.mark.parametrize("context_features", [None, 5], ids=["static", "conditional"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("n", LAYERS)
def test_is_the_dense_layer_it_generates(n, settings, context_features):
    kind, dense = LAYERS[n]
    layer = kind(6, 12, (3, 2, 4)[:n], width=4, context_features=context_features, **settings)
    x, z = torch.randn(3, 6, 8, 7, 9)[(..., *[0] * (3 - n))], torch.randn(3, 5)
    merged = [layer.to_dense(None if context_features is None else z[g]) for g in range(3)]
    assert all(type(one) is dense for one in merged)
    y = layer(x) if context_features is None else layer(x, z)
    torch.testing.assert_close(y, torch.stack([one(x[g]) for g, one in enumerate(merged)]), rtol=1e-4, atol=1e-5)
    wanted = dense(6, 12, (3, 2, 4)[:n], **{**settings, "bias": settings.get("bias") is not False})
    assert str(merged[0]) == str(wanted)


TRANSPOSED = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1, "output_padding": 1},
    "uneven": {"stride": (3, 2), "padding": (0, 1), "output_padding": (2, 0), "dilation": (1, 2), "bias": False},
    "grouped": {"groups": 3, "stride": 2},
}


@pytest.mark.parametrize("context_features", [None, 5], ids=["static", "conditional"])
@pytest.mark.parametrize("settings", TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed_is_the_dense_layer_it_generates(settings, context_features):
    layer = hk.HyperConvTranspose2d(6, 12, (3, 2), width=4, context_features=context_features, **settings)
    x, z = torch.randn(3, 6, 5, 7, requires_grad=True), torch.randn(3, 5)
    merged = [layer.to_dense(None if context_features is None else z[g]) for g in range(3)]
    assert str(merged[0]) == str(nn.ConvTranspose2d(6, 12, (3, 2), **settings))
    y, wanted = layer(x, None if context_features is None else z), torch.stack([m(x[g]) for g, m in enumerate(merged)])
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, x, dy), torch.autograd.grad(wanted, x, dy)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    layer(x, None if context_features is None else z).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("groups", [1, 4])
def test_initial_kernels_have_the_variance_of_nn_conv(groups):
    layer, default = (kind(64, 128, 3, groups=groups) for kind in (hk.HyperConv2d, nn.Conv2d))
    draws = []
    for _ in range(8):
        layer.reset_parameters()
        draws.append(layer.to_dense().weight.var())
    assert 0.85 < torch.stack(draws).mean() / default.weight.var() < 1.15


def test_the_default_chunk_needs_fewer_flops_and_fits_the_groups():
    layer = hk.HyperConv2d(256, 256, 3, padding=1)
    x = torch.randn(2, 256, 8, 8)
    plan = hk.explain(layer, x).forward
    assert plan.flops < 0.5 * 2 * 2 * 64 * 256 * 256 * 9
    assert hk.HyperConv2d(48, 36, 3, groups=6).grid.rows in (1, 2, 3, 6)


def test_ids_and_the_ambient_context():
    layer = hk.HyperConv2d(6, 8, 3, width=4, context_features=5)
    x, z, ids = torch.randn(4, 6, 8, 8), torch.randn(2, 5), torch.tensor([1, 0, 0, 1])
    y = layer(x, z, ids)
    torch.testing.assert_close(y, layer(x, z[ids]))
    with hk.context(z, ids):
        assert torch.equal(layer(x), y)
    with pytest.raises(ValueError, match="context: got none"):
        layer(x)


def test_channels_last_and_one_image():
    layer = hk.HyperConv2d(6, 8, 3, width=4)
    x = torch.randn(4, 6, 8, 8)
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x[0]), y[0])


def test_hyperize_and_merge_a_network_of_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3, padding=1, groups=4, padding_mode="circular"),
        nn.ConvTranspose2d(16, 4, 2),
        nn.Flatten(2),
        nn.ConvTranspose1d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 5 * 5, 10),
    ).eval()
    report = hk.hyperize_(model, hk.HyperConfig(width=4, context_features=3))
    assert [layer.name for layer in report.swapped] == ["0", "2", "3", "7"]
    assert "0: 16x3x3x3 in chunks of" in str(report)
    assert report.skipped == {"5": "it is a ConvTranspose1d, neither nn.Linear nor nn.Conv"}
    assert (model[0].bias, model[2].groups, model[2].padding_mode) == (None, 4, "circular")
    x, z = torch.randn(2, 3, 8, 8), torch.randn(3)
    with hk.context(z):
        y = model(x)
    y.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    merged = hk.merge_(model, z)
    assert type(merged[0]) is nn.Conv2d
    torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-5)


def test_export_with_a_batch_of_any_size():
    layer = hk.HyperConv2d(6, 8, 3, width=4, context_features=5)
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "context": {0: batch}}
    program = torch.export.export(layer, (torch.randn(4, 6, 8, 8), torch.randn(4, 5)), dynamic_shapes=shapes)
    others = torch.randn(7, 6, 8, 8), torch.randn(7, 5)
    torch.testing.assert_close(program.module()(*others), layer(*others))


def test_explain_a_convolution(capsys):
    hk.explain(hk.hyper_conv2d, torch.randn(2, 6, 9, 9), torch.randn(2, 2, 5), torch.randn(5, 4, 3, 3, 3), stride=2)
    out = capsys.readouterr().out
    assert "hyper_conv2d: 2 x 6x9x9 -> 2 x 8x4x4, 1 context, 2x2 chunks of 4x3x3x3" in out
    assert "not cpu: it has no convolutions" in out


BAD = {
    "channels": (ValueError, r"x: got shape \[2, 7, 8, 8\], wanted \[B, 6, H, W\] or \[6, H, W\]", {}, (2, 7, 8, 8)),
    "x_of_two": (ValueError, r"x: got shape \[6, 8\]", {}, (6, 8)),
    "in_channels": (ValueError, r"in_channels: got 0", {"in_channels": 0}, (2, 6, 8, 8)),
    "kernel_of_three": (ValueError, r"kernel_size: got \(3, 3, 3\), wanted", {"kernel_size": (3, 3, 3)}, (2, 6, 8, 8)),
    "no_kernel": (ValueError, r"kernel_size: got 0, wanted a positive", {"kernel_size": 0}, (2, 6, 8, 8)),
    "groups": (ValueError, r"in_channels must be divisible by groups", {"groups": 4}, (2, 6, 8, 8)),
    "padding_mode": (ValueError, r"padding_mode must be one of", {"padding_mode": "mirror"}, (2, 6, 8, 8)),
    "same": (ValueError, r"'same' is not supported for strided", {"padding": "same", "stride": 2}, (2, 6, 8, 8)),
    "chunk_and_groups": (ValueError, r"chunk: got 3 rows, wanted a divisor of 12 out_channels / 6 groups",
                         {"groups": 6, "chunk": (3, 1)}, (2, 6, 8, 8)),
    "chunk": (ValueError, r"chunk: got \(3,\)", {"chunk": (3,)}, (2, 6, 8, 8)),
    "width": (ValueError, r"width: got 0", {"width": 0}, (2, 6, 8, 8)),
}  # fmt: skip


TRANSPOSED_BAD = {
    "output_padding": (r"output_padding: got \(1, 1\), wanted less than stride or dilation", {"output_padding": 1}),
    "padding": (r"padding: got \(9, 9\), which leaves images of", {"padding": 9}),
    "generated_bias": (r"bias: got 'generated', wanted True or False", {"bias": "generated"}),
    "chunk_and_groups": (r"chunk: got 2 rows, wanted a divisor of 6 in_channels / 6", {"groups": 6, "chunk": (2, 1)}),
}


@pytest.mark.parametrize(("message", "given"), TRANSPOSED_BAD.values(), ids=TRANSPOSED_BAD)
def test_bad_arguments_of_a_transposed_layer(message, given):
    with pytest.raises(ValueError, match=message):
        hk.HyperConvTranspose2d(6, 12, 3, **given)(torch.randn(2, 6, 8, 8))


@pytest.mark.parametrize(("error", "message", "given", "shape"), BAD.values(), ids=BAD)
def test_bad_arguments(error, message, given, shape):
    def call():
        layer = hk.HyperConv2d(**{"in_channels": 6, "out_channels": 12, "kernel_size": 3} | given)
        layer(torch.randn(shape))

    with pytest.raises(error, match=message):
        call()
