"""`hyperize_` and `merge_` on models that know nothing of them."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Tied, mlp
from torch import nn

import hyperkernels as hk


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


OTHERS = {1: "Bilinear", 2: "RNNCell"}


def test_other_layers_with_matrices_are_named_and_growth_is_said():
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4), nn.RNNCell(4, 4))
    model.add_module("conv", nn.Conv1d(4, 4, 1))
    assert model[1].weight.dim() == 3
    report = hk.hyperize_(model, hk.HyperConfig(width=8))
    assert report.skipped == {f"{n}": f"it is a {kind}, neither nn.Linear nor nn.Conv" for n, kind in OTHERS.items()}
    assert ", more than before" in str(report)


def test_what_is_left_alone_and_why():
    model = nn.ModuleDict(
        {
            "tied": Tied(),
            "attention": nn.MultiheadAttention(8, 2),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "hooked": nn.Linear(8, 8),
            "saving": nn.Linear(8, 8),
            "watched": nn.Linear(8, 8),
            "moved": nn.Linear(8, 8),
            "hyper": hk.HyperLinear(8, 8, width=2, context_features=3),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    model["saving"].register_state_dict_post_hook(lambda *_: None)
    model["watched"].weight.register_hook(lambda _: None)
    model["moved"].forward = model["moved"].forward
    report = hk.hyperize_(model, hk.HyperConfig(width=2))
    assert [layer.name for layer in report.swapped] == ["tied.body", "encoder.linear1", "encoder.linear2"]
    reasons = report.skipped
    assert reasons["tied.out"] == "its weight is shared with tied.embedding.weight"
    assert "NonDynamicallyQuantizableLinear" in reasons["attention.out_proj"]
    assert reasons["attention"] == "it is a MultiheadAttention, neither nn.Linear nor nn.Conv"
    assert "normed" in reasons
    assert reasons["hooked"] == reasons["saving"] == "it has hooks"
    assert reasons["watched"] == "its weight has hooks"
    assert reasons["moved"] == "it has a forward of its own"
    assert not any(name.startswith("hyper") for name in reasons)


@pytest.mark.parametrize("mode", ["replace", "fit"])
def test_a_bias_that_is_shared_stays_so(mode):
    """As a language model's head has it: else its other owner would keep a parameter that nothing reads."""
    model = nn.Module()
    model.decoder = nn.Linear(8, 6)
    model.bias, tied = model.decoder.bias, model.decoder.bias
    hk.hyperize_(model, hk.HyperConfig(width=4, mode=mode, output_head=True))
    assert isinstance(model.decoder, hk.HyperLinear)
    assert model.decoder.bias is model.bias is tied
    hk.merge_(model)
    assert isinstance(model.decoder, nn.Linear)
    assert model.decoder.bias is model.bias is tied


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


def test_a_context_for_a_model_that_takes_none_is_refused():
    model = mlp()
    hk.hyperize_(model, hk.HyperConfig(width=4))
    for static in (model, mlp(), model[0]):
        with pytest.raises(ValueError, match="context: got one, wanted None: no layer of the model is conditional"):
            hk.merge_(static, torch.randn(3))
    assert isinstance(model[0], hk.HyperLinear)
    model.append(hk.nn.HyperResidual(nn.Linear(4, 4), [hk.HyperLinear(4, 4, False, context_features=3)]))
    hk.merge_(model, torch.randn(3))  # static layers ignore it beside others


@pytest.mark.parametrize("mode", ["replace", "fit", "residual"])
def test_a_chunk_is_cropped_to_a_layer_that_is_smaller(mode):
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4), nn.Conv2d(3, 5, 3))
    report = hk.hyperize_(model, hk.HyperConfig(width=4, chunk=(8, 24), mode=mode))
    assert [layer.chunk for layer in report.swapped] == [(8, 16), (4, 24), (5, 3)]
    assert "chunks of 4x24, cropped from 8x24, " in str(report)
    assert "cropped" not in str(hk.hyperize_(mlp(), hk.HyperConfig(width=4, chunk=(4, 16), mode=mode)))


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
    model.append(nn.ConvTranspose2d(4, 4, 2))
    before.append(model[-1])
    with pytest.raises(ValueError, match="config: does not fit '4': bias: got 'generated', wanted True or False"):
        hk.hyperize_(model, hk.HyperConfig(bias="generated"))
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
    with pytest.raises(TypeError, match="filter_fn: got str, wanted a function"):
        hk.hyperize_(model, filter_fn="linear")
    assert list(model.modules()) == before


class Refusing(nn.Module):
    """It will not have its second layer replaced."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def __setattr__(self, name, value):
        if name == "b" and "b" in self._modules:
            raise RuntimeError("b stays")
        super().__setattr__(name, value)


@pytest.mark.parametrize("mode", ["replace", "residual"])
def test_a_place_that_refuses_leaves_all_as_they_were(mode):
    model = Refusing()
    before = list(model.modules())
    with pytest.raises(RuntimeError, match="b stays"):
        hk.hyperize_(model, hk.HyperConfig(width=2, mode=mode))
    assert list(model.modules()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    model._modules |= {name: hk.HyperLinear(8, 8, width=2) for name in "ab"}
    before = list(model.modules())
    with pytest.raises(RuntimeError, match="b stays"):
        hk.merge_(model)
    assert list(model.modules()) == before
    assert list(model.modules()) == before


@pytest.mark.parametrize("mode", ["replace", "fit", "residual"])
def test_a_dry_run_reports_and_changes_nothing(mode):
    model = mlp()
    before = [(name, type(layer)) for name, layer in model.named_modules()]
    config = hk.HyperConfig(width=4, mode=mode)
    planned = hk.hyperize_(model, config, dry_run=True)
    assert [(name, type(layer)) for name, layer in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "layers would be swapped: 3" in str(planned)
    done = hk.hyperize_(model, config)
    assert [(p.name, p.chunk, p.parameters) for p in planned.swapped] == [
        (d.name, d.chunk, d.parameters) for d in done.swapped
    ]


@pytest.mark.parametrize("mode", ["replace", "fit", "residual"])
def test_restored(mode):
    model, x = mlp(), torch.randn(5, 16)
    model[3].bias.requires_grad_(False)
    wanted, layers = model(x), list(model.modules())
    report = hk.hyperize_(model, hk.HyperConfig(width=4, mode=mode))
    report.restore()
    assert list(model.modules()) == layers
    assert torch.equal(model(x), wanted)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["3.bias"]
    report = hk.hyperize_(model, hk.HyperConfig(width=4))
    model[3] = nn.Identity()
    with pytest.raises(ValueError, match="'3' is no longer the layer that was put there"):
        report.restore()
    assert isinstance(model[0], hk.HyperLinear)


def test_a_fit_says_its_error():
    model, x = mlp(), torch.randn(5, 16)
    dense, weight = model(x), model[0].weight.detach().clone()
    report = hk.hyperize_(model, hk.HyperConfig(width=4, chunk=(4, 4), mode="fit"))
    formed = hk.merge_(copy.deepcopy(model))[0].weight
    assert report.swapped[0].error == pytest.approx(((weight - formed).norm() / weight.norm()).item(), abs=1e-5)
    assert f"relative error {report.swapped[0].error:.3g}" in str(report)
    assert not torch.allclose(model(x), dense, atol=1e-3)


@pytest.mark.parametrize("keywords", [{}, {"context_features": 3}, {"mode": "residual", "rank": 2}])
def test_nobody_looks_into_layers_that_are_swapped_already(keywords):
    model = mlp()
    hk.hyperize_(model, {".*0": hk.HyperConfig(width=4, **keywords)})
    report = hk.hyperize_(model, hk.HyperConfig(width=4))
    assert [layer.name for layer in report.swapped] == ["3"]
    assert report.skipped == {}


def test_one_head_for_layers_that_are_alike():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 4))
    hk.hyperize_(model, hk.HyperConfig(width=4, chunk=(4, 8), share_head=True))
    assert len({layer.head for layer in model}) == 1
    before = sum(
        p.numel()
        for p in nn.Sequential(
            *(hk.HyperLinear(16, 16, width=4, chunk=(4, 8)) for _ in range(3)),
            hk.HyperLinear(16, 4, width=4, chunk=(4, 8)),
        ).parameters()
    )
    assert sum(p.numel() for p in model.parameters()) == before - 3 * 4 * 4 * 8
    model(torch.randn(2, 16)).sum().backward()
    assert model[0].head.grad.any()


@pytest.mark.parametrize("mode", ["replace", "fit", "residual"])
def test_on_no_device(mode):
    with torch.device("meta"):
        model = mlp()
    hk.hyperize_(model, hk.HyperConfig(width=4, mode=mode))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(torch.randn(5, 16, device="meta")).shape == (5, 4)
    state = mlp()
    hk.hyperize_(state, hk.HyperConfig(width=4, mode=mode))
    model.load_state_dict(state.state_dict(), assign=True)
    x = torch.randn(5, 16)
    assert torch.equal(model(x), state(x))


def test_the_encoders_fast_path_reads_no_weight_that_is_not_there():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    report = hk.hyperize_(model := nn.TransformerEncoder(layer, 2), hk.HyperConfig(width=4, mode="fit", chunk=(2, 2)))
    assert len(report.swapped) == 4
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        fast = model.eval()(x)
        torch.testing.assert_close(fast, hk.merge_(copy.deepcopy(model))(x))
        report.restore()
        torch.testing.assert_close(model(x), fast, rtol=1e-3, atol=1e-4)


def test_a_layers_weight_is_there_for_who_reads_it():
    layer, x = hk.HyperLinear(12, 8, width=4, context_features=3), torch.randn(5, 12)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device, weight.requires_grad) == ((8, 12), torch.float32, x.device, True)
    with pytest.raises(ValueError, match="context: got none"):
        x @ weight.T
    with hk.context(torch.randn(3)):
        torch.testing.assert_close(x @ weight.T + layer.bias, layer(x))
        assert isinstance(weight.T, hk.GeneratedWeight)
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        nn.init.zeros_(weight)


def test_a_layer_swapped_without_its_bias_merges_to_one_of_zeros():
    """transformers' Conv1D always has a bias, and its memory is anything at first."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(8, 16), nn.Linear(8, 4))
    hk.hyperize_(model, hk.HyperConfig(bias=False, width=4))
    x = torch.randn(3, 16)
    y = model(x)
    hk.merge_(model)
    assert torch.equal(model[0].bias, torch.zeros(8))
    assert model[1].bias is None
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(12, 12, 3, groups=2),
        nn.ConvTranspose2d(8, 8, 3, groups=2),
        nn.Conv1d(6, 6, 3, groups=3),
    ],
    ids=str,
)
def test_a_chunk_is_cropped_to_a_group(layer):
    model = nn.Sequential(layer)
    x = torch.randn(2, layer.in_channels, *[7] * len(layer.kernel_size))
    wanted = model(x).shape
    hk.hyperize_(model, hk.HyperConfig(chunk=(8, 24), width=2))
    assert model(x).shape == wanted
