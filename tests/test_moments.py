"""Second moments of hidden layers: by the native engine, block by block, equal to those of layers that are formed."""

from __future__ import annotations

import pytest
import torch
from conftest import running_with
from torch._subclasses.fake_tensor import FakeTensorMode

import hyperkernels as hk
from hyperkernels.backends import native_cpu, native_moments
from hyperkernels.hidden import ACTIVATIONS, AdditiveHidden
from hyperkernels.moments import Layer, gram, moments, side_by_side
from hyperkernels.testing import assert_no_worse_than_eager, peak_bytes

INSTRUCTION_SETS = native_cpu._cpu.instruction_sets() if native_cpu._cpu else []
NAMES = ("context", "chunks", "other context", "other chunks")


def drawn(layers, G=3, C=150, m=19, dtype=torch.float32, scales=True):
    """Chunks that fill two blocks and part of a third, a width that fills part of a vector."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).to(dtype) for shape in [(G, m), (C, 1, m)] * layers]
    return leaves, [torch.rand(C, 1, generator=generator).to(dtype) if scales else None] * layers


def layers_of(leaves, scales, activation):
    return [Layer(AdditiveHidden(*leaves[2 * n : 2 * n + 2], activation), scale) for n, scale in enumerate(scales)]


def formed(*layers):
    return gram(side_by_side(*layers).mT)


def with_gradients(run, leaves, scales, activation, dtype):
    leaves = [v.detach().to(dtype).requires_grad_() for v in leaves]
    found = run(*layers_of(leaves, [s if s is None else s.to(dtype) for s in scales], activation))
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [found.detach(), *torch.autograd.grad((found * weights).sum(), leaves)]


@pytest.mark.parametrize("scales", [True, False], ids=["scales", "plain"])
@pytest.mark.parametrize("layers", [1, 2], ids=["of_one", "of_two"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set(name, dtype, activation, layers, scales, monkeypatch):
    monkeypatch.setattr(native_cpu, "INSTRUCTIONS", name)
    leaves, scaling = drawn(layers, dtype=dtype, scales=scales)
    ours = with_gradients(moments, leaves, scaling, activation, dtype)
    eager = with_gradients(formed, leaves, scaling, activation, dtype)
    exact = with_gradients(formed, leaves, scaling, activation, torch.float64)
    for output, *values in zip(("moments", *NAMES), ours, eager, exact):
        assert_no_worse_than_eager(output, *values)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("contexts", [1, 2, 5])
def test_any_number_of_threads_and_the_same_bits_again(contexts, threads):
    leaves, scaling = drawn(2, contexts, 400)
    wanted = with_gradients(formed, leaves, scaling, "tanh", torch.float64)
    with running_with(threads, 64):
        first = with_gradients(moments, leaves, scaling, "tanh", torch.float32)
        again = with_gradients(moments, leaves, scaling, "tanh", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for got, want in zip(first, wanted):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learns", [(0,), (1,), (2,), (3,), (0, 1), (2, 3)])
def test_only_what_learns_has_a_gradient(learns):
    leaves, scaling = drawn(2, dtype=torch.float64)
    wanted = with_gradients(formed, leaves, scaling, "gelu", torch.float64)[1:]
    weights = torch.randn(3, 38, 38, generator=torch.Generator().manual_seed(1)).double()
    for n in learns:
        leaves[n].requires_grad_()
    (moments(*layers_of(leaves, scaling, "gelu")) * weights).sum().backward()
    for n, leaf in enumerate(leaves):
        if n in learns:
            torch.testing.assert_close(leaf.grad, wanted[n])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("layers", [1, 2], ids=["of_one", "of_two"])
def test_derivatives_of_any_order(layers):
    leaves, scaling = drawn(layers, 2, 3, 2, torch.float64)

    def run(*leaves):
        return moments(*layers_of(leaves, scaling, "tanh"))

    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("shared", ["context", "chunks", "both"])
def test_what_both_layers_share_gets_the_gradients_of_both(shared):
    leaves, scaling = drawn(2, 2, 3, 2, torch.float64)
    (context, chunks, *others), scaling = leaves, [scaling[0], 2 * scaling[0]]
    own = {"context": [context, others[1]], "chunks": [others[0], chunks], "both": [context, chunks]}[shared]

    def run(context, chunks):
        first = {id(leaves[0]): context, id(leaves[1]): chunks}
        return moments(*layers_of([context, chunks, *[first.get(id(v), v) for v in own]], scaling, "tanh"))

    given = context.requires_grad_(), chunks.requires_grad_()
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)
    plain = torch.autograd.grad(run(*given).square().sum(), given)
    again = torch.autograd.grad(run(*given).square().sum(), given, create_graph=True)
    for got, want in zip(again, plain):
        torch.testing.assert_close(got, want)


def test_the_engine_takes_what_it_can_and_no_more(monkeypatch):
    taken = []
    run = native_moments.Run.moments
    monkeypatch.setattr(native_moments.Run, "moments", lambda self: (taken.append(1), run(self))[1])
    (context, chunks), _ = drawn(1)
    additive, scale = AdditiveHidden(context, chunks, "relu"), torch.rand(len(chunks), 1)
    plain = Layer(additive, None)
    moments(plain), moments(plain, plain), moments(Layer(additive, scale))
    assert len(taken) == 3
    learning = Layer(additive, torch.rand(len(chunks), 1, requires_grad=True))
    of_one = Layer(additive.of_contexts(slice(0, 1)), None)
    half = Layer(additive.to(torch.bfloat16), None)
    nothing = Layer(additive.with_chunks(chunks[:0]), None)
    other = Layer(AdditiveHidden(context, chunks, "tanh"), None)
    for layers in ([learning], [plain, of_one], [half], [nothing], [plain, other], [Layer(plain.formed(), None)]):
        assert moments(*layers).shape == (3, *[19 * len(layers)] * 2)
    moments(Layer(additive.to("meta"), None))
    negated = Layer(AdditiveHidden(torch._neg_view(context), chunks, "relu"), None)
    torch.testing.assert_close(moments(negated), gram(side_by_side(negated).mT))
    with FakeTensorMode(allow_non_fake_inputs=True):
        moments(plain)
    assert len(taken) == 3
    learning_scale = learning.scale
    assert learning_scale is not None
    moments(learning).sum().backward()
    assert learning_scale.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", [{}, {"layout": "flat", "chunk": 600}], ids=["tiles", "flat"])
def test_neither_hidden_nor_a_weight_is_formed(layout, dtype):
    """10 contexts, a million weights: 40 MB of them, and some 2.6 MB of hidden in fp32, now and earlier."""
    nets = [
        hk.HyperNet({str(n): (512, 512) for n in range(4)}, context_features=8, dtype=dtype, **layout) for _ in range(2)
    ]
    weights, earlier = (net(torch.randn(10, 8, dtype=dtype)) for net in nets)
    hidden = 10 * len(nets[0].embedding) * 32 * 4

    def run():
        with torch.set_grad_enabled(not layout):  # of a vector each weight's part has gradients for all chunks
            found = hk.algebra.output_regularizer(weights, earlier)
        if not layout:
            found.backward(retain_graph=True)

    run()
    assert peak_bytes(run) < 0.9 * hidden
    assert peak_bytes(lambda: hk.algebra.weight_decay(weights)) < hidden / 2
