"""Wrong arguments: an error at once that names the argument, what it was and what was wanted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import hyperkernels as hk

HIDDEN, HEAD = torch.randn(2, 3, 4), torch.randn(4, 5, 6)  # N = 10, K = 13 to 18
PER_CONTEXT = torch.randn(3, 2, 3, 4)
X = torch.randn(7, 18)


@dataclass
class Bad:
    """Arguments of `hyper_linear` and the error they must raise."""

    error: type[Exception]
    message: str
    x: Any = field(default_factory=lambda: X)
    hidden: Any = field(default_factory=lambda: HIDDEN)
    head: Any = field(default_factory=lambda: HEAD)
    keywords: dict[str, Any] = field(default_factory=dict)


def ids(*values, **keywords):
    return {"context_ids": torch.tensor(values, **keywords)}


BAD = {
    "x_too_narrow": Bad(ValueError, r"x: got last size 12, wanted 13 to 18", x=torch.randn(7, 12)),
    "x_too_wide": Bad(ValueError, r"x: got last size 19, wanted 13 to 18", x=torch.randn(7, 19)),
    "x_a_scalar": Bad(ValueError, r"x: got a scalar", x=torch.tensor(1.0)),
    "x_integer": Bad(TypeError, r"x: got torch.int64, wanted a floating", x=torch.ones(7, 18, dtype=torch.int64)),
    "x_a_list": Bad(TypeError, r"x: got list, wanted a tensor", x=[1.0]),
    "out_features_off_the_grid": Bad(
        ValueError,
        r"out_features: got 11, wanted 6 to 10: hidden has 2 chunks of 5 rows",
        keywords={"out_features": 11},
    ),
    "out_features_a_float": Bad(
        TypeError, r"out_features: got 8\.0, wanted an integer", keywords={"out_features": 8.0}
    ),
    "hidden_one_dimension": Bad(ValueError, r"hidden: got shape \[4\], wanted \[I, J, m\]", hidden=torch.randn(4)),
    "hidden_other_dtype": Bad(TypeError, r"hidden: got torch.float64, wanted x's dtype", hidden=HIDDEN.double()),
    "hidden_no_chunk": Bad(ValueError, r"at least one chunk", hidden=torch.randn(0, 3, 4)),
    "head_two_dimensions": Bad(
        ValueError, r"head: got shape \[4, 5\], wanted \[m, rows, cols\]", head=torch.randn(4, 5)
    ),
    "head_of_another_width": Bad(
        ValueError, r"head: got width 3 .* wanted hidden's width 4", head=torch.randn(3, 5, 6)
    ),
    "heads_for_other_chunks": Bad(ValueError, r"head: got 5 heads, wanted one or 6", head=torch.randn(5, 4, 5, 6)),
    "head_integer": Bad(TypeError, r"head: got torch.int64", head=torch.ones(4, 5, 6, dtype=torch.int64)),
    "head_other_device": Bad(ValueError, r"head: on meta, wanted x's device cpu", head=HEAD.to("meta")),
    "contexts_and_entries": Bad(ValueError, r"x: got shape \[7, 18\], wanted \[3, \*, 18\]", hidden=PER_CONTEXT),
    "additive_contexts_and_entries": Bad(
        ValueError, r"x: got shape .* each of hidden's 2", hidden=hk.AdditiveHidden(torch.randn(2, 4), HIDDEN, "relu")
    ),
    "ids_too_large": Bad(
        ValueError,
        r"context_ids: got values from 0 to 3, wanted 0 to 2",
        hidden=PER_CONTEXT,
        keywords=ids(0, 1, 2, 3, 0, 0, 0),
    ),
    "ids_negative": Bad(
        ValueError, r"context_ids: got values from -1 to 0", hidden=PER_CONTEXT, keywords=ids(0, 0, 0, -1, 0, 0, 0)
    ),
    "ids_float": Bad(
        TypeError,
        r"context_ids: got torch.float32, wanted an int32 or int64",
        hidden=PER_CONTEXT,
        keywords=ids(*[0.0] * 7),
    ),
    "ids_of_another_length": Bad(
        ValueError, r"context_ids: got shape \[2\], wanted leading", hidden=PER_CONTEXT, keywords=ids(0, 1)
    ),
    "ids_of_fewer_entries": Bad(
        ValueError,
        r"context_ids: got shape \[2\], .* x has 6 entries, 3 for each of 2, .* context_ids\.repeat_interleave\(3\)",
        x=torch.randn(6, 18),
        hidden=PER_CONTEXT,
        keywords=ids(0, 1),
    ),
    "fewer_contexts_than_entries": Bad(
        ValueError,
        r"x: got shape \[6, 18\], .* 6 entries, 2 for each of 3, .* torch\.arange\(3\)\.repeat_interleave\(2\)",
        x=torch.randn(6, 18),
        hidden=PER_CONTEXT,
    ),
    "ids_other_device": Bad(
        ValueError, r"context_ids: on meta", hidden=PER_CONTEXT, keywords=ids(*[0] * 7, device="meta")
    ),
    "bias_of_another_length": Bad(
        ValueError, r"bias: got shape \[9\], wanted \[10\] or \[1, 10\]", keywords={"bias": torch.randn(9)}
    ),
    "bias_other_dtype": Bad(TypeError, r"bias: got torch.float64", keywords={"bias": torch.randn(10).double()}),
    "head_bias_of_another_shape": Bad(
        ValueError, r"head_bias: got shape \[6, 5\], wanted \[5, 6\]", keywords={"head_bias": torch.randn(6, 5)}
    ),
    "unknown_order": Bad(ValueError, r"order: got 'fast', wanted None or one of generate", keywords={"order": "fast"}),
    "unknown_backend": Bad(
        ValueError, r"backend: got 'gpu', wanted None or one of cpu, triton, torch", keywords={"backend": "gpu"}
    ),
    "backend_without_the_order": Bad(
        ValueError,
        r"'reference' cannot do this call: .*no order 'head_first'",
        keywords={"order": "head_first", "backend": "reference"},
    ),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_hyper_linear(bad):
    with pytest.raises(bad.error, match=bad.message):
        hk.hyper_linear(bad.x, bad.hidden, bad.head, **bad.keywords)


def test_ids_out_of_range_with_the_reference():
    with pytest.raises(ValueError, match="context_ids: got values from 0 to 9"):
        hk.hyper_linear(X, PER_CONTEXT, HEAD, backend="reference", **ids(0, 0, 0, 0, 0, 0, 9))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(2, 4), HIDDEN, "relu6"), ValueError, "activation: got 'relu6', wanted one of identity"),
        ((torch.randn(4), HIDDEN, "relu"), ValueError, r"context: got shape \[4\], wanted \[G, m\]"),
        ((torch.randn(2, 4), HIDDEN[0], "relu"), ValueError, r"chunks: got shape \[3, 4\], wanted \[I, J, m\]"),
        ((torch.randn(2, 5), HIDDEN, "relu"), ValueError, "chunks: got width 4, wanted context's width 5"),
        ((torch.ones(2, 4).int(), HIDDEN, "relu"), TypeError, "context: got torch.int32, wanted a floating"),
        ((torch.randn(2, 4).double(), HIDDEN, "relu"), TypeError, "chunks: got torch.float32, wanted context's dtype"),
        (
            (torch.randn(2, 4, device="meta"), HIDDEN, "relu"),
            ValueError,
            "chunks: on cpu, wanted context's device meta",
        ),
    ],
)
def test_additive_hidden(arguments, error, message):
    with pytest.raises(error, match=message):
        hk.AdditiveHidden(*arguments)


def test_generate_weight():
    with pytest.raises(ValueError, match="shape: got 19 columns, wanted 13 to 18"):
        hk.generate_weight(HIDDEN, HEAD, (10, 19))
    with pytest.raises(ValueError, match="shape: got 11 rows, wanted 6 to 10"):
        hk.generate_weight(HIDDEN, HEAD, (11, 18))
    with pytest.raises(ValueError, match="shape: got 64, wanted"):
        hk.generate_weight(HIDDEN, HEAD, 64)
    with pytest.raises(TypeError, match=r"shape: got 10\.5, wanted an integer"):
        hk.generate_weight(HIDDEN, HEAD, (10.5, 18))
    with pytest.raises(ValueError, match=r"shape: got \(10,\), wanted \(N, K\)"):
        hk.generate_weight(HIDDEN, HEAD, (10,))
    with pytest.raises(ValueError, match="head_bias: got shape"):
        hk.generate_weight(HIDDEN, HEAD, (10, 18), head_bias=torch.randn(3, 3))


@pytest.mark.parametrize("mib", [0, -1, 1.5, "64"])
def test_workspace(mib):
    with pytest.raises(ValueError, match="mib: got"):
        hk.set_workspace_mib(mib)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"in_features": 0}, "in_features: got 0, wanted a positive integer"),
        ({"out_features": 2.5}, "out_features: got 2.5"),
        ({"width": 0}, "width: got 0"),
        ({"chunk": (0, 4)}, r"chunk: got \(0, 4\), wanted \(rows, cols\)"),
        ({"chunk": 16}, "chunk: got 16"),
        ({"bias": "learned"}, "bias: got 'learned'"),
        ({"bias": 1}, "bias: got 1, wanted True, False"),
        ({"context_features": 0}, "context_features: got 0"),
    ],
)
def test_hyper_linear_layer(keywords, message):
    with pytest.raises(ValueError, match=message):
        hk.HyperLinear(**({"in_features": 8, "out_features": 8} | keywords))


def test_contexts_of_a_layer():
    layer = hk.HyperLinear(8, 8, context_features=3, width=4)
    x = torch.randn(5, 8)
    with pytest.raises(
        ValueError, match=r"context: got none.*hyperkernels\.context.*hyperkernels\.recompute_in_context"
    ):
        layer(x)
    with pytest.raises(ValueError, match=r"context: got shape \[5, 4\], wanted \[G, 3\]"):
        layer(x, torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"x: got shape \[5, 8\], wanted \[2, \*, 8\]"):
        layer(x, torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"context: got torch.int64"):
        layer(x, torch.ones(5, 3).long())
    with pytest.raises(TypeError, match="z: got list"), hk.context([1.0]):
        layer(x)
    with pytest.raises(ValueError, match="context: this hypernetwork is static"):
        hk.HyperLinear(8, 8, width=4)(x, torch.randn(5, 3))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.tensor([0, 2]), ValueError, "context_ids: got values from 0 to 2, wanted 0 to 1"),
        (torch.tensor([-1, 0]), ValueError, "context_ids: got values from -1 to 0, wanted 0 to 1"),
        (torch.tensor([0.0]), TypeError, r"context_ids: got torch.float32, wanted an int32 or int64 tensor"),
        ([0, 1], TypeError, "context_ids: got list, wanted an int32 or int64 tensor"),
        (torch.tensor(0), ValueError, "context_ids: got a scalar"),
    ],
    ids=["too_large", "negative", "float", "list", "scalar"],
)
def test_ids_of_the_ambient_context_are_checked_at_once(given, error, message):
    with pytest.raises(error, match=message):
        hk.context(torch.randn(2, 3), context_ids=given)


@pytest.mark.parametrize("width", [7, 9, 1])
def test_x_of_another_width_than_the_layers(width):
    layer = hk.HyperLinear(8, 8, width=4, chunk=(4, 16))  # the grid alone would take 1 to 16
    with pytest.raises(ValueError, match=rf"x: got shape \[5, {width}\], wanted \[\*, 8\]"):
        layer(torch.randn(5, width))


def test_dtypes_of_a_layer():
    layer = hk.HyperLinear(8, 8, context_features=3, width=4)
    with pytest.raises(TypeError, match=r"x: got torch.float64, wanted the layer's dtype torch.float32"):
        layer(torch.randn(5, 8).double(), torch.randn(3))
    with pytest.raises(TypeError, match=r"context: got torch.float64, wanted the layer's dtype"):
        layer(torch.randn(5, 8), torch.randn(3).double())
    with pytest.raises(TypeError, match=r"x: got torch\.int64"):
        layer(torch.ones(5, 8).long(), torch.randn(3))
    with pytest.raises(TypeError, match=r"hypernet: got function, wanted a torch\.nn\.Module"):
        hk.HyperLinear(8, 8, hypernet=lambda z: z)
    with pytest.raises(TypeError, match=r"dtype: got torch\.int32, wanted a floating one"):
        hk.HyperLinear(8, 8, dtype=torch.int32)


def test_no_parameter_takes_a_generated_weights_place():
    layer = hk.HyperLinear(8, 8, width=4)
    with pytest.raises(AttributeError, match="weight: HyperLinear generates it"):
        layer.weight = torch.nn.Parameter(torch.ones(8, 8))
    assert layer(torch.ones(1, 8)).shape == (1, 8)


def test_explain():
    with pytest.raises(ValueError, match="context_ids: got values from 0 to 9"):
        hk.explain(hk.hyper_linear, X, PER_CONTEXT, HEAD, **ids(0, 0, 0, 0, 0, 0, 9))
    with pytest.raises(TypeError, match="target: got Linear, wanted a hyper layer"):
        hk.explain(torch.nn.Linear(2, 2), X)
    with pytest.raises(ValueError, match="x: got last size 2"):
        hk.explain(hk.hyper_linear, torch.randn(2, 2), HIDDEN, HEAD)
    with pytest.raises(ValueError, match="order: got 'fast'"):
        hk.explain(hk.hyper_linear, X, HIDDEN, HEAD, order="fast")
    with pytest.raises(TypeError, match="missing a required argument: 'head'"):
        hk.explain(hk.hyper_linear, X, HIDDEN)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ordr'"):
        hk.explain(hk.hyper_linear, X, HIDDEN, HEAD, ordr="generate")
    with pytest.raises(ValueError, match="bias: got shape"):
        hk.explain(hk.hyper_linear, X, HIDDEN, HEAD, bias=torch.zeros(1000))
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        hk.explain(hk.HyperLinear(8, 8))


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.randn(7, 7).double()},
        {"x": torch.randn(7, 10)},
        {"x": torch.randn(7, 7).long()},
        {"hidden": torch.randn(3, 3, 5).double()},
        {"hidden": torch.randn(2, 3, 5)},
        {"hidden": hk.AdditiveHidden(torch.randn(2, 5), torch.randn(3, 3, 5), "relu")},
        {"head": torch.randn(5, 4, 3).half()},
        {"bias": torch.randn(9)},
        {"bias": torch.randn(10).double()},
        {"head_bias": torch.randn(4, 2)},
        {"out_features": 13},
        {"out_features": 10.0},
        {"context_ids": torch.zeros(7)},
        {"context_ids": torch.zeros(6, dtype=torch.int64)},
        {"head": [[1.0]]},
    ],
    ids=lambda changed: "-".join(f"{k}_{type(v).__name__}" for k, v in changed.items()),
)
def test_what_differs_from_a_call_that_was_right_is_checked_anew(changed):
    given = {"x": torch.randn(7, 7), "hidden": torch.randn(3, 3, 5), "head": torch.randn(5, 4, 3), "out_features": 10}
    given |= {"bias": torch.randn(10), "head_bias": torch.randn(4, 3)}
    for _ in range(2):
        hk.hyper_linear(**given)
    with pytest.raises((TypeError, ValueError), match=rf"({next(iter(changed))}|x|hidden|head|out_features): "):
        hk.hyper_linear(**given | changed)
    hk.hyper_linear(**given)
