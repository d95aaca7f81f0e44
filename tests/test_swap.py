"""`hyperize_` and `merge_` on models that know nothing of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hyperkernels as hk


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.again = self.body
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids):
        return self.out(self.again(self.body(self.embedding(ids)).relu()))


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 32, bias=False)), nn.Linear(32, 4))


def test_swaps_every_linear_and_merges_back():
    model, x = mlp(), torch.randn(5, 16)
    report = hk.hyperize_(model, hk.HyperConfig(width=4))
    assert [layer.name for layer in report.swapped] == ["0", "2.0", "3"]
    assert model[2][0].bias is None
    assert not any(type(m) is nn.Linear for n, m in model.named_modules() if "hypernet" not in n)
    wanted = model(x)
    wanted.sum().backward()
    assert hk.merge_(model) is model
    assert [type(model[n]) for n in (0, 3)] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x), wanted)


def test_the_filter_and_the_report():
    model = mlp()
    report = hk.hyperize_(model, hk.HyperConfig(width=4), lambda layer, name: name != "3")
    assert report.skipped == {"3": "filter_fn said no"}
    assert type(model[3]) is nn.Linear
    layer = report.swapped[0]
    assert (layer.name, layer.shape, layer.parameters_before) == ("0", (32, 16), 16 * 32 + 32)
    assert layer.parameters == sum(p.numel() for p in model[0].parameters())
    for words in ("layers swapped: 2", "0: 32x16 in chunks of", "3: filter_fn said no"):
        assert words in str(report)


def test_other_layers_with_matrices_are_named_and_growth_is_said():
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4), nn.RNNCell(4, 4))
    model.add_module("conv", nn.Conv1d(4, 4, 1))
    assert model[1].weight.dim() == 3
    report = hk.hyperize_(model, hk.HyperConfig(width=8))
    assert report.skipped == {"1": "it is a Bilinear, neither nn.Linear nor nn.Conv"}
    assert ", more than before" in str(report)


def test_what_is_left_alone_and_why():
    model = nn.ModuleDict(
        {
            "tied": Tied(),
            "attention": nn.MultiheadAttention(8, 2),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "hooked": nn.Linear(8, 8),
            "hyper": hk.HyperLinear(8, 8, width=2),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    report = hk.hyperize_(model, hk.HyperConfig(width=2))
    assert [layer.name for layer in report.swapped] == ["tied.body"]
    reasons = report.skipped
    assert reasons["tied.out"] == "its weight is shared with tied.embedding.weight"
    assert "NonDynamicallyQuantizableLinear" in reasons["attention.out_proj"]
    assert reasons["encoder.linear1"] == "its TransformerEncoderLayer reads its weight"
    assert "normed" in reasons
    assert reasons["hooked"] == "it has hooks"
    assert reasons["hyper.hypernet.layer.chunk_layer"] == "it is part of a hyper layer"
    model["encoder"].eval()(torch.randn(3, 2, 8))


def test_one_layer_under_two_names_stays_one():
    model = Tied()
    hk.hyperize_(model, hk.HyperConfig(width=2))
    assert isinstance(model.body, hk.HyperLinear)
    assert model.body is model.again
    hk.merge_(model)
    assert model.body is model.again
    assert type(model.body) is nn.Linear


def test_the_model_itself_is_not_swapped():
    model = nn.Linear(4, 4)
    report = hk.hyperize_(model)
    assert report.skipped == {"": "it is the model itself: build a hyper layer instead"}
    assert type(hk.merge_(hk.HyperLinear(4, 4, width=2))) is nn.Linear


def test_conditional_layers_and_merge_for_one_context():
    model, x, z = mlp(), torch.randn(5, 16), torch.randn(3)
    hk.hyperize_(model, hk.HyperConfig(width=4, context_features=3, bias="generated"))
    with hk.context(z):
        wanted = model(x)
    with pytest.raises(ValueError, match="context: got none"):
        hk.merge_(model)
    with pytest.raises(ValueError, match="context: got 2 contexts, wanted one"):
        hk.merge_(model, torch.randn(2, 3))
    assert isinstance(model[0], hk.HyperLinear)  # nothing was merged
    merged = hk.merge_(copy.deepcopy(model), z)
    torch.testing.assert_close(merged(x), wanted)


def test_keeps_dtype_mode_and_frozen_parameters():
    model = mlp().to(torch.bfloat16).eval()
    model[0].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    hk.hyperize_(model, hk.HyperConfig(width=4, backend="torch", order="head_first"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model[0].parameters())
    assert [n for n, p in model[3].named_parameters() if not p.requires_grad] == ["bias"]
    assert (model[0].backend, model[0].order) == ("torch", "head_first")


def test_nothing_changes_when_it_raises():
    model = mlp()
    before = list(model.modules())
    with pytest.raises(ValueError, match="config: does not fit '0': chunk"):
        hk.hyperize_(model, hk.HyperConfig(chunk=(0, 1)))
    with pytest.raises(TypeError, match="model: got list"):
        hk.hyperize_([model])
    for keywords in ({"order": "fast"}, {"backend": "gpu"}):
        with pytest.raises(ValueError, match=r"(order|backend): got"):
            hk.HyperConfig(**keywords)
    with pytest.raises(TypeError, match="model: got str"):
        hk.merge_("model")
    with pytest.raises(TypeError, match="config: got dict"):
        hk.hyperize_(model, {"width": 4})

    def failing(layer, name):
        if name == "3":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        hk.hyperize_(model, filter_fn=failing)
    assert list(model.modules()) == before
