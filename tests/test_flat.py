"""`FlatWeight`: stretches of one vector, beside the vector formed."""

import pytest
import torch
import torch.nn.functional as F

import hyperkernels as hk
from hyperkernels.flat import FlatWeight
from hyperkernels.testing import peak_bytes
from hyperkernels.weight import form

C, M, SIZE = 7, 3, 40
SHAPES = {
    "within": ((5, 6), 44),
    "straddling": ((8, 14), 33),
    "from_the_start": ((13, 17), 0),
    "to_the_end": ((6, 5), 250),
}
CONTEXTS = ("shared", "per_entry", "ids", "additive")


def make(shape, start, contexts="shared", bias=True):
    def draw(*size):
        return torch.randn(size, dtype=torch.float64, requires_grad=True)

    G = {"shared": None, "per_entry": 3, "ids": 2, "additive": 3}[contexts]
    leaves = [draw(M, SIZE), draw(SIZE)]
    if contexts == "additive":
        parts = [draw(G, M), draw(C, 1, M)]
        leaves += parts
        hidden = hk.AdditiveHidden(*parts, "relu")
        dense = hidden.materialize()[:, :, 0]
    else:
        hidden = draw(*(() if G is None else (G,)), C, M)
        leaves.append(hidden)
        dense = hidden
    ids = torch.tensor([1, 0, 1]) if contexts == "ids" else None
    weight = FlatWeight(hidden, leaves[0], shape, start, head_bias=leaves[1], scale=0.5, context_ids=ids)
    vector = 0.5 * (dense @ leaves[0] + leaves[1]).flatten(-2)
    number = torch.Size(shape).numel()
    formed = vector[..., start : start + number].reshape(*vector.shape[:-1], *shape)
    return weight, formed if ids is None else formed[ids], leaves


def assert_same(got, wanted, leaves):
    torch.testing.assert_close(got, wanted)
    dy = torch.randn_like(wanted)
    for ours, theirs in zip(*(torch.autograd.grad(v, leaves, dy, retain_graph=True) for v in (got, wanted))):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture(params=[None, 1], ids=["at_once", "row_by_row"])
def _workspace(request, monkeypatch):
    if request.param:
        monkeypatch.setattr("hyperkernels.flat.workspace_bytes", lambda: request.param)


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize(("shape", "start"), SHAPES.values(), ids=SHAPES)
def test_linear(shape, start, contexts):
    weight, formed, leaves = make(shape, start, contexts)
    x = torch.randn(3, 4, shape[1], dtype=torch.float64)
    bias = torch.randn(shape[0], dtype=torch.float64)
    assert_same(F.linear(x, weight, bias), x @ formed.mT + bias, leaves)
    if contexts != "ids":
        assert_same(form(weight), formed, leaves)


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("contexts", CONTEXTS)
def test_convolution(contexts):
    weight, formed, leaves = make((6, 3, 2, 2), 23, contexts)
    x = torch.randn(3, 3, 5, 6, dtype=torch.float64)
    kernels = formed if formed.dim() == 5 else formed.expand(3, *formed.shape)
    wanted = torch.cat([F.conv2d(v[None], w, stride=2) for v, w in zip(x, kernels)])
    assert_same(F.conv2d(x, weight, None, 2), wanted, leaves)


@pytest.mark.parametrize("workspace", [1, 1 << 10, 1 << 26])
@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize(("shape", "groups"), [((6, 3, 2, 2), 2), ((6, 2, 2, 2), 3), ((12, 1, 2, 2), 12)])
def test_grouped_convolution(shape, groups, contexts, workspace, monkeypatch):
    monkeypatch.setattr("hyperkernels.flat.workspace_bytes", lambda: workspace)
    weight, formed, leaves = make(shape, 23, contexts)
    x = torch.randn(3, shape[1] * groups, 5, 6, dtype=torch.float64)
    bias = torch.randn(shape[0], dtype=torch.float64)
    kernels = formed if formed.dim() == 5 else formed.expand(3, *formed.shape)
    wanted = torch.cat([F.conv2d(v[None], w, bias, padding=1, groups=groups) for v, w in zip(x, kernels)])
    assert_same(F.conv2d(x, weight, bias, padding=1, groups=groups), wanted, leaves)
    assert_same(F.conv2d(x, weight, bias, 1, 1, 1, groups), wanted, leaves)
    with pytest.raises(ValueError, match=f"input: .* wanted {x.shape[1]} channels for {groups} groups"):
        F.conv2d(x[:, :-1], weight, groups=groups)


def test_no_tokens():
    weight, _, _ = make((8, 14), 33, "per_entry")
    assert F.linear(torch.randn(3, 0, 14).double(), weight).shape == (3, 0, 8)


def test_a_large_weight_is_formed_in_parts():
    hidden, head = torch.randn(100, 8, requires_grad=True), torch.randn(8, 40_000, requires_grad=True)
    x = torch.randn(2, 2000, requires_grad=True)
    hk.set_workspace_mib(2)
    try:
        run = lambda: F.linear(x, FlatWeight(hidden, head, (2000, 2000))).sum().backward()  # noqa: E731
        run()
        assert peak_bytes(run) < 2000 * 2000 * 4 / 2
    finally:
        hk.set_workspace_mib(64)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.randn(C, M), torch.randn(M + 1, SIZE), (3, 4)), "head"),
        ((torch.randn(C, M), torch.randn(M, SIZE), (30, 40)), "shape"),
        ((torch.randn(C, M), torch.randn(M, SIZE), (3, 4), -1), "shape"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        FlatWeight(*arguments)
    weight = FlatWeight(torch.randn(2, C, M), torch.randn(M, SIZE), (3, 4))
    with pytest.raises(ValueError, match="x: got 3 entries"):
        F.linear(torch.randn(3, 4), weight)
    with pytest.raises(RuntimeError, match="2 contexts"):
        weight.sum()


@pytest.mark.parametrize("bias", [False, True])
def test_one_image_without_a_batch(bias, monkeypatch):
    weight = hk.FlatWeight(torch.randn(11, 3), torch.randn(3, 5), (4, 3, 2, 2), 5)
    b = torch.randn(4) if bias else None
    for size in (5, 6):
        x = torch.randn(3, size, size)
        torch.testing.assert_close(F.conv2d(x, weight, b), F.conv2d(x, form(weight), b))


def test_ids_out_of_range_are_refused():
    weight = hk.FlatWeight(torch.randn(2, 10, 3), torch.randn(3, 5), (4, 6), context_ids=torch.tensor([1, -1, 0]))
    with pytest.raises(ValueError, match="context_ids: got values from -1 to 1"):
        F.linear(torch.randn(3, 6), weight)
