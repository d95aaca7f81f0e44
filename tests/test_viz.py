"""Pictures: what is drawn is what the weights formed are."""

import numpy as np
import pytest
import torch

import hyperkernels as hk
from hyperkernels import viz
from hyperkernels.testing import peak_bytes
from hyperkernels.weight import form

pytest.importorskip("matplotlib", reason="drawing needs matplotlib")


def images(axis):
    return np.asarray(axis.images[0].get_array())


def make(context_features=3, **settings):
    shapes = {"kernel": (20, 3, 5, 5), "weight": (30, 20)}
    return hk.HyperNet(shapes, context_features=context_features, width=4, **{"chunk": (8, 2), **settings})


@pytest.mark.parametrize(
    "settings",
    [{}, {"strategy": "multi_head"}, {"head_bias": True}, {"heads": "layer"}, {"layout": "flat", "chunk": 70}],
    ids=["chunk", "multi_head", "head_bias", "heads", "flat"],
)
def test_filters(settings, tmp_path):
    weight = make(**settings)(torch.randn(2, 3))["kernel"]
    axis = viz.filters(weight, 9, context=1)
    first = form(weight)[1, 0].detach()
    wanted = (first - first.min()) / (first.max() - first.min())
    np.testing.assert_allclose(images(axis)[:5, :5], wanted.movedim(0, -1).numpy(), atol=1e-5)
    axis.figure.savefig(tmp_path / "filters.png")
    assert (tmp_path / "filters.png").stat().st_size > 1000


def test_filters_form_their_own_chunks_alone():
    weight = hk.HyperNet({"kernel": (512, 512, 3, 3)}, context_features=3, width=4, chunk=(16, 16))(torch.randn(9, 3))
    kernel = weight["kernel"]
    assert peak_bytes(lambda: viz.filters(kernel, 16)) < 512 * 512 * 9 * 4 / 4
    hidden, heads, bias = torch.randn(3, 32, 32, 2), torch.randn(1024, 2, 16, 16, 3, 3), torch.randn(1024, 16, 16, 3, 3)
    own = hk.GeneratedWeight(hidden, heads, (512, 512, 3, 3), head_bias=bias)
    assert peak_bytes(lambda: viz.filters(own, 16)) < 512 * 512 * 9 * 4 / 4
    torch.testing.assert_close(viz._corner(own, 20, 3, 2), form(own)[2, :20, :3])
    flat = hk.FlatWeight(torch.randn(3, 4000, 2), torch.randn(2, 600), (512, 512, 3, 3), 50)
    assert peak_bytes(lambda: viz.filters(flat, 16)) < 512 * 9 * 16 * 4 / 4, "less than the rows that hold them"
    torch.testing.assert_close(viz._corner(flat, 20, 3, 2), form(flat)[2, :20, :3])


def test_maps_and_similarities_form_no_weight():
    weights = hk.HyperNet({"w": (512, 1024)}, context_features=3, width=4, chunk=(16, 32))(torch.randn(9, 3))
    for draw in (lambda: viz.chunks(weights["w"]), lambda: viz.similarity(weights), lambda: viz.pca(weights)):
        draw()
        assert peak_bytes(draw) < 512 * 1024 * 4 / 2


def test_chunks_similarity_and_principal_components(tmp_path):
    weights = make()(torch.randn(6, 3))
    w = torch.cat([form(weight).flatten(1) for weight in weights.values()], 1).detach().double()
    cosine = torch.nn.functional.cosine_similarity(w[:, None], w, dim=-1)
    np.testing.assert_allclose(images(viz.similarity(weights)), cosine.numpy(), atol=1e-5)
    axis = viz.pca(weights, names=list("abcdef"))
    drawn = torch.tensor(np.asarray(axis.collections[0].get_offsets()))
    centred = w - w.mean(0)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    wanted = centred @ components[:2].T
    torch.testing.assert_close(torch.cdist(drawn, drawn), torch.cdist(wanted, wanted), rtol=1e-4, atol=1e-4)
    axis = viz.chunks(weights["weight"], context=2)
    norm = form(weights["weight"])[2, :8, :2].norm()
    assert images(axis)[0, 0] == pytest.approx(norm.item(), rel=1e-4)
    axis.figure.savefig(tmp_path / "chunks.png")


@pytest.mark.parametrize(
    ("run", "error", "match"),
    [
        (lambda w: viz.filters(w["weight"]), TypeError, "weight: got"),
        (lambda w: viz.filters(w["kernel"], 0), ValueError, "count"),
        (lambda w: viz.filters(w["kernel"], context=0.5), ValueError, "context: got 0.5"),
        (lambda w: viz.filters(w["kernel"], context=2), ValueError, "context: got 2, wanted 0 to 1"),
        (lambda w: viz.chunks(w["weight"], context=5), ValueError, "context"),
        (lambda w: viz.similarity(w, names=["a"]), ValueError, "names: got 1, wanted one for each of 2"),
        (lambda w: viz.pca(make(None)()), ValueError, "two at least"),
        (lambda w: viz.similarity({}), ValueError, "weights: got none, wanted at least one"),
        (lambda w: viz.filters(w["kernel"], True), ValueError, "count: got True"),
        (lambda w: viz.filters(w["kernel"], axis=3), TypeError, "axis: got int, wanted a matplotlib axis"),
        (lambda w: viz.chunks(w["weight"], context="a"), ValueError, "context: got 'a', wanted 0 to 1"),
        (
            lambda w: viz.similarity({"a": w["weight"], "b": make()(torch.randn(5, 3))["weight"]}),
            ValueError,
            r"weights\['b'\]: got 5 contexts, wanted 2",
        ),
        (
            lambda _: viz.chunks(make(layout="flat", chunk=70)(torch.randn(2, 3))["weight"]),
            ValueError,
            "got chunks of 70 in a flat vector, from 30 to 630, wanted some that are blocks",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(run, error, match):
    with pytest.raises(error, match=match):
        run(make()(torch.randn(2, 3)))
