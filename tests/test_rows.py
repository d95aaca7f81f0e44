"""Rows of a generated weight, against those of the weight formed, in fp64."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import hyperkernels as hk
from hyperkernels.planner import workspace_bytes
from hyperkernels.testing import peak_bytes
from hyperkernels.weight import form

N, K, I, J, ROWS, COLS, m = 11, 13, 3, 3, 4, 5, 2
FORMS = ("shared", "one_context", "additive", "per_chunk_heads", "head_bias", "head_bias_per_chunk")


def draw(*size):
    return torch.randn(size, dtype=torch.float64)


def make(form, kernel=(), contexts=1):
    hidden = draw(I, J, m) if form != "one_context" and contexts == 1 else draw(contexts, I, J, m)
    if form == "additive":
        hidden = hk.AdditiveHidden(draw(contexts, m), draw(I, J, m), "tanh")
    per_chunk = (I * J,) if form == "per_chunk_heads" else ()
    bias = {"head_bias": (), "head_bias_per_chunk": (I * J,)}.get(form)
    return hk.GeneratedWeight(
        hidden,
        draw(*per_chunk, m, ROWS, COLS, *kernel),
        (N, K, *kernel),
        head_bias=None if bias is None else draw(*bias, ROWS, COLS, *kernel),
        scale=1.5,
    )


@pytest.fixture(autouse=True)
def nothing_is_formed(monkeypatch):
    """Of the whole weight: what falls back to that warns, and warnings are errors."""
    monkeypatch.setattr("hyperkernels.weight._warned", set())


@pytest.mark.parametrize("kernel", [(), (2, 3)], ids=["matrix", "kernel"])
@pytest.mark.parametrize("form_of", FORMS)
def test_rows_are_those_of_the_weight_formed(form_of, kernel):
    weight = make(form_of, kernel)
    formed = form(weight)
    for index in (slice(4, 9), slice(0, 3), slice(8, None), slice(4, 8)):
        part = weight[index]
        assert isinstance(part, hk.GeneratedWeight)
        torch.testing.assert_close(form(part), formed[index])
    for index in (
        3,
        -1,
        slice(1, 7),
        slice(None, None, 2),
        slice(5, 5),
        torch.tensor([[2, -3], [10, 2]]),
        slice(-3, 99),
        slice(5, 2),
    ):
        part = weight[index]
        torch.testing.assert_close(form(part) if isinstance(part, hk.GeneratedWeight) else part, formed[index])
    for ours, theirs in ((weight.split(4), formed.split(4)), (torch.split(weight, [8, 3]), formed.split([8, 3]))):
        assert [form(part).shape for part in ours] == [part.shape for part in theirs]
        for part, own in zip(ours, theirs):
            torch.testing.assert_close(form(part), own)
    q, k = weight.chunk(2)
    torch.testing.assert_close(torch.cat([form(q) if isinstance(q, hk.GeneratedWeight) else q, k]), formed)


@pytest.mark.parametrize("form_of", FORMS)
def test_embedding_is_the_one_of_the_weight_formed(form_of):
    weight, ids = make(form_of), torch.tensor([[3, 0, 10], [3, 7, 1]])
    torch.testing.assert_close(F.embedding(ids, weight), F.embedding(ids, form(weight)))
    layer = torch.nn.Embedding(N, K, padding_idx=3, dtype=torch.float64)
    got = torch.func.functional_call(layer, {"weight": weight}, ids)
    torch.testing.assert_close(got, F.embedding(ids, form(weight), 3))
    assert F.embedding(ids[:0], weight).shape == (0, 3, K)


@pytest.mark.parametrize("form_of", ["shared", "additive", "per_chunk_heads", "head_bias"])
def test_an_embedding_for_each_context(form_of):
    weight, ids = make(form_of, contexts=3), torch.randint(N, (3, 4))
    wanted = torch.stack([own[row] for own, row in zip(form(weight), ids)])
    torch.testing.assert_close(F.embedding(ids, weight), wanted)
    which = torch.tensor([2, 0])
    chosen = hk.GeneratedWeight(
        weight.hidden, weight.head, (N, K), scale=1.5, context_ids=which, head_bias=weight.settings["head_bias"]
    )
    wanted = torch.stack([form(weight)[g][row] for g, row in zip(which, ids)])
    torch.testing.assert_close(F.embedding(ids[:2], chosen), wanted)
    with pytest.raises(ValueError, match=r"input: got shape \[2, 4\], wanted \[3, \*\]"):
        F.embedding(ids[:2], weight)


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
def test_gradients(blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr("hyperkernels.rows.workspace_bytes", lambda: 2 * 2 * m * COLS * 8)
    ids = torch.tensor([3, 0, 10, 3, 7])

    def run(hidden, head):
        weight = hk.GeneratedWeight(hidden, head, (N, K))
        return F.embedding(ids, weight), form(weight[4:9])

    inputs = draw(I, J, m).requires_grad_(), draw(m, ROWS, COLS).requires_grad_()
    assert gradcheck(run, inputs)
    padded = torch.autograd.grad(F.embedding(ids, hk.GeneratedWeight(*inputs, (N, K)), 3).sum(), inputs)
    formed = hk.generate_weight(*inputs, (N, K))
    for got, wanted in zip(padded, torch.autograd.grad(F.embedding(ids, formed, 3).sum(), inputs)):
        torch.testing.assert_close(got, wanted)


def test_a_large_embedding_is_never_formed():
    hidden, head = torch.randn(1000, 16, 16), torch.randn(16, 50, 64)
    ids = torch.randint(50_000, (4096,))
    weight = hk.GeneratedWeight(hidden.requires_grad_(), head.requires_grad_(), (50_000, 1024))
    peak = peak_bytes(lambda: F.embedding(ids, weight).sum().backward())
    assert peak < 1.5 * workspace_bytes() + 8 * ids.numel() * 1024 * 4
    assert peak < 50_000 * 1024 * 4


def test_compiled_in_one_graph():
    hidden, head, ids = torch.randn(3, 3, 2), torch.randn(2, 4, 5), torch.tensor([3, 0, 10])

    def run(hidden, head, ids):
        weight = hk.GeneratedWeight(hidden, head, (11, 13))
        q, k = weight[:8], weight[8:]
        return F.embedding(ids, weight), F.linear(torch.ones(2, 13), q), F.linear(torch.ones(2, 13), k)

    for got, wanted in zip(torch.compile(run, fullgraph=True)(hidden, head, ids), run(hidden, head, ids)):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("run", "error", "match"),
    [
        (lambda w: F.embedding(torch.tensor([0, 11]), w), IndexError, "input: got 0 to 11, wanted 0 to 10"),
        (lambda w: F.embedding(torch.tensor([0]), w, None, 1.0), RuntimeError, "max_norm"),
        (lambda w: w[11], IndexError, "index: got 11 to 11"),
        (lambda w: w[::-1], ValueError, "index: got a step of -1"),
        (lambda w: w.split(0), ValueError, "split_size: got 0, wanted a positive number"),
    ],
)
def test_what_does_not_fit_is_refused(run, error, match):
    with pytest.raises(error, match=match):
        run(make("shared"))


def test_the_rest_forms_the_weight_and_says_so():
    weight = make("shared")
    with pytest.warns(UserWarning, match="__getitem__ forms"):
        torch.testing.assert_close(weight[:, 2], form(weight)[:, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert F.embedding(torch.tensor([1]), weight, scale_grad_by_freq=True).shape == (1, K)


def test_rows_by_ids_under_vmap():
    weight = hk.GeneratedWeight(torch.randn(2, 3, 6), torch.randn(6, 4, 5), (8, 14))
    ids = torch.tensor([[0, 2], [3, 7]])
    torch.testing.assert_close(torch.vmap(lambda own: F.embedding(own, weight))(ids), F.embedding(ids, weight))
