"""`HyperConfig`: what is built, and where."""

import pytest
from conftest import mlp
from torch import nn

import hyperkernels as hk


def test_patterns_say_what_is_built_where():
    model = mlp()
    configs = {r"2\..*": hk.HyperConfig(width=3), "3": None, r"0": hk.HyperConfig(width=5, mode="fit", chunk=(4, 4))}
    report = hk.hyperize_(model, configs)
    assert [(layer.name, layer.mode) for layer in report.swapped] == [("0", "fit"), ("2.0", "replace")]
    assert (model[0].width, model[2][0].width) == (5, 3)
    assert report.skipped == {"3": "config leaves '3'"}
    assert hk.hyperize_(mlp(), {"0": hk.HyperConfig()}).skipped["3"] == "no pattern of config matches it"
    with pytest.raises(ValueError, match=r"config: 'nothing' matches no layer: .*; the model has '0', '2\.0', '3'$"):
        hk.hyperize_(mlp(), {"nothing": hk.HyperConfig(), ".*": None})
    with pytest.raises(ValueError, match=r"'2' matches no layer: .*'\.\*\(\?:2\)\.\*' would match '2\.0'$"):
        hk.hyperize_(mlp(), {"2": hk.HyperConfig()})
    with pytest.raises(ValueError, match="the model has none"):
        hk.hyperize_(nn.ReLU(), {"2": hk.HyperConfig()})


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"mode": "fast"}, "mode: got 'fast', wanted one of replace, fit, residual"),
        ({"mode": "fit", "bias": True}, "bias: got True, wanted None"),
        ({"rank": 3}, "rank: got 3, wanted None"),
        ({"rank": 0, "mode": "residual"}, "rank: got 0, wanted a positive integer"),
        ({"mode": "fit", "share_head": True}, "share_head"),
        ({"mode": "residual", "rank": 2, "chunk": (4, 4)}, r"chunk: got \(4, 4\), wanted None"),
        ({"width": -1}, "width: got -1, wanted a positive integer"),
        ({"width": "8"}, "width: got '8', wanted a positive integer"),
        ({"width": None}, "width: got None, wanted a positive integer"),
        ({"width": True}, "width: got True, wanted a positive integer"),
        ({"context_features": 2.0}, r"context_features: got 2\.0, wanted a positive integer"),
        ({"chunk": 5}, r"chunk: got 5, wanted \(rows, cols\)"),
        ({"chunk": (0, 1)}, r"chunk: got \(0, 1\), wanted \(rows, cols\)"),
        ({"share_head": "yes"}, "share_head: got 'yes', wanted True or False"),
        ({"output_head": 1}, "output_head: got 1, wanted True or False"),
        ({"bias": "made"}, "bias: got 'made', wanted None, True"),
    ],
)
def test_settings_that_are_none_or_do_not_go_together(keywords, match):
    with pytest.raises(ValueError, match=match):
        hk.HyperConfig(**keywords)


def test_a_key_that_is_no_pattern_is_named():
    with pytest.raises(TypeError, match="config: got the key 0, wanted a regular expression"):
        hk.hyperize_(nn.Sequential(nn.Linear(8, 8)), {0: hk.HyperConfig()})
