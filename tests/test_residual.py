"""Changes of frozen layers: `HyperConfig(mode="residual")`."""

import copy

import pytest
import torch
from conftest import Tied, mlp
from torch import nn

import hyperkernels as hk


@pytest.mark.parametrize("rank", [None, 2])
def test_a_change_of_a_frozen_layer(rank):
    model, x, z = mlp(), torch.randn(5, 16), torch.randn(5, 3)
    dense = model(x)
    report = hk.hyperize_(model, hk.HyperConfig(width=4, mode="residual", rank=rank, context_features=3))
    with hk.context(z):
        assert torch.equal(model(x), dense)
    parts = [part for layer in report.swaps for part in layer.new.change]
    assert len(parts) == 3 * (1 if rank is None else 2)
    assert {p for p in model.parameters() if p.requires_grad} == {p for part in parts for p in part.parameters()}
    assert report.swapped[0].parameters == sum(p.numel() for p in model[0].change.parameters())
    for part in parts:
        nn.init.normal_(part.head, std=0.1)
    with hk.context(z[0]):
        changed = model(x)
        read = torch.nn.functional.linear(x, model[0].weight, model[0].bias)
        torch.testing.assert_close(read, model[0](x))
    assert not torch.allclose(changed, dense, atol=1e-2)
    torch.testing.assert_close(hk.merge_(copy.deepcopy(model), z[0])(x), changed)
    assert "0.base" not in hk.hyperize_(model, hk.HyperConfig(width=4)).skipped


def test_a_change_of_a_convolution():
    model, x = (
        nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Conv2d(6, 6, 3, groups=2)),
        torch.randn(2, 4, 9, 9),
    )
    hk.hyperize_(model, {"0": hk.HyperConfig(width=4, mode="residual", rank=2), "1": hk.HyperConfig(mode="residual")})
    for part in (*model[0].change, *model[1].change):
        nn.init.normal_(part.head, std=0.1)
    wanted = model(x)
    torch.testing.assert_close(hk.merge_(model)(x), wanted)
    with pytest.raises(ValueError, match="rank: got 2, wanted None for a transposed convolution, or one in groups"):
        hk.hyperize_(model, hk.HyperConfig(mode="residual", rank=2))


def test_the_change_of_a_layer_whose_weight_is_anothers_too_freezes_a_copy():
    model, ids = Tied(), torch.randint(12, (5,))
    dense = model(ids)
    report = hk.hyperize_(model, {"out": hk.HyperConfig(width=4, mode="residual", output_head=True)})
    assert torch.equal(model(ids), dense)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["out.base.weight"]
    model(ids).sum().backward()
    assert model.embedding.weight.grad is not None
    report.restore()
    assert model.out.weight is model.embedding.weight
    assert model.out.weight.requires_grad


def test_changes_have_no_biases():
    with pytest.raises(ValueError, match="change: got"):
        hk.nn.HyperResidual(nn.Linear(4, 4), [hk.HyperLinear(4, 4)])


@pytest.mark.parametrize("training", [False, True])
def test_a_change_is_in_the_mode_of_its_layer(training):
    model = mlp().train(training)
    hk.hyperize_(model, hk.HyperConfig(width=2, mode="residual"))
    assert {module.training for module in model.modules()} == {training}
