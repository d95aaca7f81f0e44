"""What of `algebra` depends on how numbers are rounded: half precision, autocast, weights that nearly agree."""

import pytest
import torch
from test_algebra import make

import hyperkernels as hk
from hyperkernels import algebra


def test_near_weights_lose_no_digits():
    """In fp32, where a difference of squares would leave nothing of 1e-5."""
    a = make((40, 50), "contexts")
    hidden, head = a.hidden.float(), a.head.float()
    moved = [v + 1e-5 * torch.randn_like(v) for v in (hidden, head)]
    got = algebra.distance(hk.GeneratedWeight(*moved, (40, 50)), hk.GeneratedWeight(hidden, head, (40, 50)))
    w, v = (hk.generate_weight(*(v.double() for v in pair), (40, 50)) for pair in (moved, (hidden, head)))
    torch.testing.assert_close(got.double(), (w - v).flatten(1).norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", ["contexts", "additive", "head_bias"])
@pytest.mark.parametrize("kind", ["tiles", "flat"])
def test_autocast_rounds_nothing(kind, form):
    def draw(scale=1.0):
        torch.manual_seed(1)
        weight = make((11, 13), form)
        hidden, head, bias = weight.hidden.to(torch.float32), scale * weight.head.float(), weight.settings["head_bias"]
        bias = None if bias is None else bias.float()
        if kind == "tiles":
            return hk.GeneratedWeight(hidden, head, (11, 13), head_bias=bias)
        hidden = hidden.with_chunks(hidden.chunks.reshape(-1, 1, 3)) if form == "additive" else hidden.flatten(1, 2)
        return hk.FlatWeight(hidden, head.flatten(1), (11, 13), head_bias=None if bias is None else bias.flatten())

    def run(a, b):
        single = (algebra.norm(a), algebra.spectral_norm(a), algebra.gram(a, b), algebra.total_norm({"w": a}))
        return (*single, algebra.distance(a, b), algebra.cosine(a, b), algebra.output_regularizer({"w": a}, {"w": b}))

    pair = draw(), draw(1.0001)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(*pair)
    for one, other in zip(got, run(*pair)):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)
    a = pair[0].head.detach().requires_grad_()
    grads = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = algebra.squared_distance(*(kind_of(pair[0], head) for head in (a, a.detach() + 1))).sum()
            grads.append(torch.autograd.grad(loss, a)[0])
    torch.testing.assert_close(*grads)


def kind_of(weight, head):
    """The weight with another head, as it is under autocast."""
    with torch.autocast("cpu", enabled=False):
        return type(weight)(weight.hidden, head, weight.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_half_precision_sums_are_single_precision(dtype):
    hidden, head = 40 * torch.randn(2, 8, 8, 4), 40 * torch.randn(4, 8, 8)
    hidden, head = hidden.to(dtype), head.to(dtype)
    weight = hk.GeneratedWeight(hidden, head, (64, 64))
    wanted = hk.generate_weight(hidden.float(), head.float(), (64, 64))
    found = (
        algebra.norm(weight),
        algebra.chunk_norms(weight).square().sum((1, 2)).sqrt(),
        algebra.total_norm({"w": weight}),
    )
    for got in found:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted.flatten(1).norm(dim=1))
    torch.testing.assert_close(algebra.spectral_norm(weight), torch.linalg.matrix_norm(wanted, 2), rtol=1e-3, atol=0)
    torch.testing.assert_close(algebra.cosine(weight, weight), torch.ones(2))


def test_spectral_norms_are_as_near_as_said():
    """Of square random weights, whose largest singular values lie close."""
    for seed in range(8):
        torch.manual_seed(seed)
        weight = hk.GeneratedWeight(torch.randn(4, 12, 12, 16), torch.randn(16, 8, 8), (96, 96))
        wanted = torch.linalg.matrix_norm(hk.generate_weight(weight.hidden, weight.head, (96, 96)), 2)
        assert ((wanted - algebra.spectral_norm(weight)) / wanted).max() < 2e-4


def test_centred_grams_of_near_contexts_lose_no_digits():
    a = make((40, 50), "contexts", contexts=6)
    hidden, head = (a.hidden[:1] + 1e-5 * a.hidden).float(), a.head.float()
    got = algebra.gram(hk.GeneratedWeight(hidden, head, (40, 50)), centred=True)
    w = hk.generate_weight(hidden.double(), head.double(), (40, 50)).flatten(1)
    torch.testing.assert_close(got.double(), (w - w.mean(0)) @ (w - w.mean(0)).T, rtol=1e-2, atol=1e-9)


def test_where_nothing_differs_gradients_are_zero():
    hidden = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = hk.GeneratedWeight(hidden, torch.randn(2, 4, 5, dtype=torch.float64), (11, 13))
    algebra.distance(weight, weight).sum().backward()
    assert not hidden.grad.any()
