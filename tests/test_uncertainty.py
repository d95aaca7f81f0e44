"""An ensemble in one call."""

import math

import pytest
import torch
import torch.nn.functional as F

import hyperkernels as hk
from hyperkernels.uncertainty import members, of_classes, of_values
from hyperkernels.weight import form


def test_an_ensemble_from_noise_is_its_members_one_by_one():
    net = hk.HyperNet({"weight": (3, 6)}, context_features=4, encoder=hk.nn.Noise(4)).double()
    x, z = torch.randn(5, 6).double(), torch.randn(16, 4).double()
    weight = net(z)["weight"]
    got = of_classes(F.linear(members(x, 16), weight))
    p = torch.stack([(x @ w.T).softmax(-1) for w in form(weight)])
    torch.testing.assert_close(got.mean, p.mean(0))
    torch.testing.assert_close(got.variance, p.var(0, correction=0))
    entropy = -(p.mean(0) * p.mean(0).log()).sum(-1)
    torch.testing.assert_close(got.entropy, entropy)
    torch.testing.assert_close(got.disagreement, entropy + (p * p.log()).sum(-1).mean(0))


def test_dropout_makes_members_too():
    trunk = hk.nn.MLPTrunk((16,), 8, context_features=4, dropout=0.5)
    net = hk.HyperNet({"weight": (3, 6)}, context_features=4, width=16, embedding_features=8, trunk=trunk)
    y = F.linear(members(torch.randn(5, 6), 12), net(torch.randn(4).expand(12, 4))["weight"])
    assert of_values(y).variance.min() > 0
    still = F.linear(members(torch.randn(5, 6), 12), net.eval()(torch.ones(12, 4))["weight"])
    assert of_values(still).variance.max() < 1e-6


def test_members_of_a_static_hypernetwork_have_masks_of_their_own():
    trunk = hk.nn.MLPTrunk((16,), 8, dropout=0.5)
    for layout in ({}, {"layout": "flat", "chunk": 5}):
        net = hk.HyperNet({"weight": (3, 6)}, width=16, embedding_features=8, trunk=trunk, **layout).train()
        y = F.linear(members(torch.randn(5, 6), 12), net(members=12)["weight"])
        assert of_values(y).variance.min() > 0
        with pytest.raises(ValueError, match="members: got 12 all alike, wanted a trunk with dropout"):
            net.eval()(members=12)
        net.trunk.train()
        model = hk.HyperModel(torch.nn.Linear(6, 3), net)
        assert of_values(model(members(torch.randn(5, 6), 12), members=12)).variance.min() > 0
    with pytest.raises(ValueError, match="members: got 0"):
        net(members=0)
    with pytest.raises(ValueError, match="members: got a number, wanted a context for each"):
        hk.HyperNet({"weight": (3, 6)}, context_features=4)(torch.randn(4), members=2)


def test_members_that_agree_and_members_that_do_not():
    sure = torch.tensor([[9.0, -9.0], [9.0, -9.0]])[:, None]
    torn = torch.tensor([[99.0, -99.0], [-99.0, 99.0]])[:, None]
    assert of_classes(sure).disagreement.item() == pytest.approx(0, abs=1e-6)
    assert of_classes(torn).entropy.item() == pytest.approx(math.log(2))
    assert of_classes(torn).disagreement.item() == pytest.approx(math.log(2))


def test_a_class_that_cannot_be_adds_nothing():
    logits = torch.randn(4, 5, 3).double().requires_grad_()
    with_one_more = torch.cat([logits, torch.full((4, 5, 1), -math.inf)], -1)
    one_member = torch.cat(
        [logits[..., :2], torch.where(torch.arange(4) == 0, -math.inf, logits[..., 2].mT).mT[..., None]], -1
    )
    for got, wanted in zip(of_classes(with_one_more)[2:], of_classes(logits)[2:]):
        torch.testing.assert_close(got, wanted)
    for given in (with_one_more, one_member):
        found = of_classes(given)
        assert all(value.isfinite().all() for value in found)
        assert torch.autograd.grad((found.entropy + found.disagreement).sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize(
    "run",
    [lambda: of_classes(torch.ones(3)), lambda: of_values(torch.ones(0, 3)), lambda: members(torch.ones(3), 0)],
)
def test_no_members_are_refused(run):
    with pytest.raises(ValueError, match="wanted"):
        run()


@pytest.mark.parametrize("given", [[1.0], torch.ones(3, 2, dtype=torch.int64)], ids=["list", "integers"])
def test_what_is_no_floating_tensor_is_refused(given):
    for function in (of_classes, of_values):
        with pytest.raises(TypeError, match="wanted a floating tensor"):
            function(given)


def test_members_are_of_a_tensor_and_as_many_as_a_number_says():
    with pytest.raises(TypeError, match="x: got list, wanted a tensor"):
        members([1.0], 3)
    with pytest.raises(ValueError, match="count: got True"):
        members(torch.randn(3), True)
