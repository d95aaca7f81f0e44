"""`advise`: proposals that hold what they promise, and plain words where a plain layer does better."""

import pytest
import torch

import hyperkernels as hk
from hyperkernels.advising import advise
from hyperkernels.weight import form


@pytest.mark.parametrize(("shape", "contexts", "tokens"), [((512, 256), 1, 64), ((300, 200), 8, 32), ((64, 900), 1, 1)])
def test_proposals_are_what_they_say(shape, contexts, tokens):
    advice = advise(shape, contexts=contexts, tokens=tokens, budget=10**9)
    assert {p.strategy for p in advice.proposals} == {"chunk", "component", "once"}
    for p in advice.proposals:
        settings = {"chunk": {"chunk": p.chunk}, "component": {"strategy": "component"}, "once": {"strategy": "once"}}
        net = hk.HyperNet({"weight": shape}, width=p.width, context_features=3, **settings[p.strategy])
        assert net.targets["weight"].chunk == p.chunk
        trunk = net.trunk.chunk_layer.parameters() if contexts > 1 else ()
        assert sum(v.numel() for v in (net.embedding, *net.heads, *trunk)) == p.parameters
        weight = net(torch.randn(1, 3))["weight"]
        assert torch.linalg.matrix_rank(form(weight).detach().double(), rtol=1e-5) <= p.rank
    assert advice.best is advice.proposals[0]
    assert all(p.strategy in str(advice) for p in advice.proposals)


def test_where_flops_decide_the_speed_is_theirs():
    for p in advise((2048, 2048), tokens=8192).proposals:
        assert 0.3 < p.speed * p.flops < 3


def test_contexts_that_do_not_divide_the_tokens_cost_as_those_that_do():
    uneven, even = (advise((512, 512), contexts=8, tokens=tokens).proposals for tokens in (17, 24))
    assert uneven == even


def test_a_plan_for_a_cuda_device_needs_none():
    assert advise((4096, 4096), device="cuda").best.rank == 4096


def test_a_budget_is_kept():
    advice = advise((512, 512), budget=9000)
    assert advice.proposals
    assert all(p.parameters <= 9000 for p in advice.proposals)
    assert advise((512, 512), budget=5).best is None
    assert "raise the budget" in advise((512, 512), budget=5).words


def test_it_says_when_a_plain_layer_does_better():
    assert "A plain layer is the better choice" in advise((8, 4)).words
    assert "Plain layers are the faster choice" in advise((64, 64)).words
    assert advise((4096, 4096), contexts=32, tokens=32).words.startswith("Take chunk")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"shape": (3,)}, "shape"),
        ({"shape": 64}, "shape: got 64, wanted"),
        ({"shape": "64x64"}, "shape: got '64x64'"),
        ({"shape": (3, 0)}, "K"),
        ({"shape": (3, 4), "tokens": 0}, "tokens"),
    ],
)
def test_what_cannot_be_advised_is_refused(given, match):
    with pytest.raises(ValueError, match=match):
        advise(**given)


def test_a_device_that_is_not_priced_is_refused():
    with pytest.raises(ValueError, match="device: got 'mps', wanted one of cpu, cuda"):
        advise((64, 64), device="mps")
