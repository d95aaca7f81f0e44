"""The closed-form fit of a dense weight, against the singular values that it cuts off."""

import pytest
import torch
from torch import nn

import hyperkernels as hk
from hyperkernels import fitting


def singular_values(weight, rows, cols):
    N, K = weight.shape[:2]
    blocks = weight.reshape(N // rows, rows, K // cols, cols, -1).transpose(1, 2).flatten(2)
    return torch.linalg.svdvals(blocks.flatten(0, 1))


@pytest.mark.parametrize("shape", [(24, 30), (24, 30, 3, 2)], ids=["matrix", "kernel"])
@pytest.mark.parametrize("width", [1, 5, 16])
def test_no_fit_is_better(shape, width):
    weight = torch.randn(shape, dtype=torch.float64)
    hidden, head, error = hk.fit(weight, (4, 6), width)
    values = singular_values(weight, 4, 6)
    best = (values[width:].square().sum() / values.square().sum()).sqrt()
    assert error == pytest.approx(best.item(), abs=1e-12)
    formed = hk.generate_weight(hidden, head, shape)
    assert error == pytest.approx(((weight - formed).norm() / weight.norm()).item(), abs=1e-12)


@pytest.mark.parametrize("shape", [(23, 31), (23, 31, 2)])
def test_cropped_edges(shape):
    weight = torch.randn(shape)
    hidden, head, error = hk.fit(weight, (4, 6), 100)
    assert hidden.shape[:2] == (6, 6)
    torch.testing.assert_close(hk.generate_weight(hidden, head, shape), weight)
    assert error < 1e-5
    error = hk.fit(weight, (4, 6), 3)[2]
    assert 0.3 < error < 1
    assert hk.fit(torch.zeros(5, 7), (2, 3), 2)[2] == 0.0


def test_large_ones_at_random_are_as_good_and_the_same_again(monkeypatch):
    """A spectrum that falls off, as that of trained weights does."""
    left, right = torch.randn(600, 40), torch.randn(40, 600) / torch.arange(1, 41)[:, None]
    weight = (left @ right).reshape(20, 30, 20, 30).transpose(1, 2).reshape(600, 600)
    state = torch.get_rng_state()
    hidden, _, error = hk.fit(weight, (20, 30), 10)
    again = hk.fit(weight, (20, 30), 10)
    assert torch.equal(hidden, again[0])
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(fitting, "EXACT", 10**9)
    exact = hk.fit(weight, (20, 30), 10)[2]
    assert error == pytest.approx(exact, rel=1e-3)
    monkeypatch.setattr(fitting, "EXACT", 0)
    assert hk.fit(weight, (20, 30), 10)[2] == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(
    ("dense", "kind", "x"),
    [
        (nn.Linear(12, 8), hk.HyperLinear, torch.randn(5, 12)),
        (nn.Linear(12, 8, bias=False, dtype=torch.float64), hk.HyperLinear, torch.randn(5, 12, dtype=torch.float64)),
        (nn.Conv1d(6, 8, 3, padding="same"), hk.HyperConv1d, torch.randn(2, 6, 9)),
        (
            nn.Conv2d(6, 8, 3, stride=2, groups=2, padding_mode="reflect", padding=1),
            hk.HyperConv2d,
            torch.randn(2, 6, 9, 9),
        ),
        (nn.Conv3d(2, 4, 2, dilation=2), hk.HyperConv3d, torch.randn(2, 2, 5, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), hk.HyperConvTranspose2d, torch.randn(2, 4, 5, 5)),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_layers_fitted_in_full_are_the_dense_ones(dense, kind, x):
    dense.eval()
    layer = kind.from_dense(dense, chunk=(2, 2), width=60)
    assert layer.fit_error < 1e-5
    assert not layer.training
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)
    back = layer.to_dense()
    assert type(back) is type(dense)
    torch.testing.assert_close(back.weight, dense.weight, rtol=1e-4, atol=1e-5)
    conditional = kind.from_dense(dense, chunk=(2, 2), width=60, context_features=3)
    z = torch.randn(len(x), 3, dtype=x.dtype)
    torch.testing.assert_close(conditional(x, z), dense(x), rtol=1e-4, atol=1e-5)
    conditional(x, z).square().sum().backward()
    assert conditional.hypernet.context_layer.weight.grad.any()


def test_in_bfloat16_the_error_is_of_what_is_kept():
    linear = nn.Linear(32, 32, dtype=torch.bfloat16)
    layer = hk.HyperLinear.from_linear(linear, chunk=(4, 4), width=16)
    weight = hk.generate_weight(layer.hypernet.chunks.float(), layer.head.float(), (32, 32))
    wanted = ((linear.weight.float() - weight).norm() / linear.weight.float().norm()).item()
    assert layer.head.dtype == torch.bfloat16
    assert layer.fit_error == pytest.approx(wanted, abs=5e-3)
    assert layer.fit_error < 0.01


@pytest.mark.parametrize(
    ("run", "error", "match"),
    [
        (lambda: hk.fit(torch.ones(4), (2, 2), 1), ValueError, r"weight: got shape \[4\]"),
        (lambda: hk.fit(torch.ones(4, 4, dtype=torch.int64), (2, 2), 1), TypeError, "weight: got torch.int64"),
        (lambda: hk.fit([[1.0]], (1, 1), 1), TypeError, "weight: got list"),
        (lambda: hk.fit(torch.ones(4, 4), (0, 2), 1), ValueError, r"chunk: got \(0, 2\)"),
        (lambda: hk.fit(torch.ones(4, 4), (2, 2), 0), ValueError, "width: got 0"),
        (lambda: hk.fit(torch.full((4, 4), torch.nan), (2, 2), 1), ValueError, "weight: got numbers that are not"),
        (lambda: hk.HyperLinear.from_linear(nn.Conv2d(3, 3, 3)), TypeError, "dense: got Conv2d, wanted a Linear"),
        (lambda: hk.HyperConv2d.from_dense(nn.Linear(3, 3)), TypeError, "dense: got Linear, wanted a Conv2d"),
        (lambda: hk.HyperLinear.from_linear("x"), TypeError, "dense: got str"),
        (lambda: hk.nn.HyperResidual(nn.ReLU(), [hk.HyperLinear(4, 4, False)]), TypeError, "base: got ReLU"),
        (lambda: hk.hyperize_(nn.Sequential(), {"(": hk.HyperConfig()}), ValueError, "config: got '\\('"),
    ],
)
def test_what_does_not_fit_is_refused(run, error, match):
    with pytest.raises(error, match=match):
        run()
