"""What a `HyperNet` is conditioned on, the trunks that make hidden of it, and targets that differ from call to call."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperkernels as hk
from hyperkernels.nn.targets import Found, cut
from hyperkernels.weight import form


class Attention(nn.Module):
    """A trunk in which chunks see each other, and the context."""

    def __init__(self, features, context_features):
        super().__init__()
        self.context = nn.Linear(context_features, features)
        self.layer = nn.TransformerEncoderLayer(features, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, embedding, context):
        return self.layer(embedding + self.context(context)[:, None])


TRUNKS = {
    "mlp": partial(hk.nn.MLPTrunk, (16, 8), 8, context_features=5, dropout=0.1),
    "cnn": partial(hk.nn.CNNTrunk, 8, 8, context_features=5),
    "rnn": partial(hk.nn.RNNTrunk, 8, 8, context_features=5),
    "attention": partial(hk.nn.AttentionTrunk, 8, 8, context_features=5),
    "the user's": partial(Attention, 8, 5),
}


@pytest.fixture(params=TRUNKS.values(), ids=TRUNKS)
def trunk(request):
    return request.param()


def test_any_module_is_a_trunk(trunk):
    """Each context's weights are the head's of what the trunk makes of it and the embeddings, beside no other."""
    shapes, z = {"a": (12, 10), "b": (6, 12)}, torch.randn(3, 5)
    net = hk.HyperNet(shapes, context_features=5, width=8, chunk=(4, 5), trunk=trunk).eval()
    weights, chunks = net(z), 0
    for n, (name, (N, K)) in enumerate(shapes.items()):
        I, J = -(-N // 4), -(-K // 5)
        for g in range(3):
            hidden = trunk(net.embedding, z[g : g + 1])[0, chunks : chunks + I * J].unflatten(0, (I, J))
            wanted = torch.einsum("ijk,krq->irjq", hidden, net.heads[0].unflatten(1, (4, 5))) * net.scales[n]
            got = form(weights[name])
            torch.testing.assert_close(got[g], wanted.reshape(I * 4, J * 5)[:N, :K], rtol=1e-4, atol=1e-6)
        chunks += I * J
    assert not torch.allclose(got[0], got[1], rtol=1e-2)
    x = torch.randn(3, 2, 10)
    F.linear(F.linear(x, weights["a"]).relu(), weights["b"]).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("kind", [hk.nn.CNNTrunk, hk.nn.RNNTrunk, hk.nn.AttentionTrunk])
def test_chunks_see_each_other(kind):
    trunk, embedding = kind(8, 8).eval(), torch.randn(6, 8)
    other = embedding.clone()
    other[2] += 1
    moved = (trunk(other) - trunk(embedding)).abs().amax(1) > 1e-6
    assert moved[2]
    assert moved[3], "its neighbour"
    assert moved.all() == (kind is hk.nn.AttentionTrunk)


def test_descriptors_are_as_exact_in_half_precision():
    net = hk.HyperNet({"w": (256, 256)}, width=8, chunk=(4, 4), descriptors=True)
    embedding = net.descriptors(net.targets.values())
    rounded = net.descriptors.bfloat16()(net.targets.values())
    assert F.cosine_similarity(embedding, rounded.float(), dim=1).min() > 0.999


def test_task_numbers_may_be_compiled():
    tasks = hk.nn.Tasks(5, 3)
    compiled = torch.compile(tasks, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(torch.tensor([4, 0])), tasks(torch.tensor([4, 0])))


@pytest.mark.parametrize(
    "trunk",
    [
        hk.nn.MLPTrunk((8,), 8),
        hk.nn.TrunkLayer(8, 8),
        hk.nn.ColumnTrunk(2, 8, 8),
        hk.nn.MLPTrunk((8,), 8, context_features=4),
    ],
    ids=["mlp", "layer", "columns", "another size"],
)
def test_a_trunk_that_would_not_see_the_context_is_refused(trunk):
    with pytest.raises(ValueError, match=r"trunk: got one with context_features=(None|4), wanted 3"):
        hk.HyperNet({"w": (8, 6)}, context_features=3, width=8, trunk=trunk)
    if trunk.context_features is None:
        with pytest.raises(ValueError, match="context: got one, wanted none"):
            trunk(torch.randn(4, 8), torch.randn(2, 3))


def test_a_model_with_convolutions_learns_through_any_trunk(trunk):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 7))
    net = hk.HyperNet(model, context_features=5, width=8, chunk=(8, 8), trunk=trunk)
    y = hk.HyperModel(model, net)(torch.randn(3, 3, 14, 14), context=torch.randn(3, 5))
    y.sum().backward()
    assert y.shape == (3, 7)
    assert all(p.grad is not None for p in net.trunk.parameters())


def test_a_trunk_without_context_is_static():
    for kind in (hk.nn.CNNTrunk, hk.nn.RNNTrunk, hk.nn.AttentionTrunk):
        net = hk.HyperNet({"weight": (12, 10)}, width=8, chunk=(4, 5), trunk=kind(8, 8))
        assert F.linear(torch.randn(3, 10), net()["weight"]).shape == (3, 12)


def test_tasks_data_and_noise_condition_it():
    shapes, x = {"weight": (6, 10)}, torch.randn(4, 3, 10)
    by_task = hk.HyperNet(shapes, context_features=5, encoder=hk.nn.Tasks(7, 5))
    one, two = (F.linear(x, by_task(torch.tensor(ids))["weight"]) for ids in ([3, 3, 0, 6], [3, 1, 2, 6]))
    torch.testing.assert_close(one[[0, 3]], two[[0, 3]])
    assert not torch.allclose(one[1], two[1])
    by_data = hk.HyperNet(shapes, context_features=5, encoder=nn.Sequential(nn.Flatten(), nn.Linear(30, 5)))
    F.linear(x, by_data(x)["weight"]).sum().backward()
    assert by_data.encoder[1].weight.grad.abs().sum() > 0
    by_noise = hk.HyperNet(shapes, context_features=5, encoder=hk.nn.Noise(5))
    members = F.linear(x[:1].expand(9, 3, 10), by_noise(9)["weight"])
    assert members.std(0).min() > 0
    sample = torch.randn(9, 5)
    assert torch.equal(form(by_noise(sample)["weight"]), form(by_noise(sample)["weight"]))


@pytest.mark.parametrize("chunk", [(4, 4), None, 24], ids=["tuple", "default", "number"])
def test_targets_may_differ_from_call_to_call(chunk):
    shapes, z = {"0.weight": (12, 10), "2.weight": (5, 12)}, torch.randn(2, 3)
    net = hk.HyperNet(shapes, context_features=3, width=8, chunk=chunk, descriptors=True)
    for widths in ((10, 12, 5), (10, 30, 7, 5), (6, 90, 9, 9, 2)):
        layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
        model = nn.Sequential(*itertools.chain(*((layer, nn.Tanh()) for layer in layers)))
        net.zero_grad()
        weights, x = net(z, targets=model), torch.randn(2, 7, widths[0])
        assert [tuple(w.shape) for w in weights.values()] == [(b, a) for a, b in itertools.pairwise(widths)]
        y = torch.func.functional_call(model, weights, x)
        for weight in weights.values():
            x = (x @ form(weight).mT).tanh()
            assert 0.2 < form(weight).square().mean() * weight.shape[1] / 2 < 5, "each by its own fan"
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)
        y.sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    same = [form(w) for w in net(z, targets=shapes).values()]
    for got, wanted in zip(same, net(z).values()):
        torch.testing.assert_close(got, form(wanted))
    with pytest.raises(
        ValueError, match=r"(targets: got a chunk of 10000 numbers in|got at most .* of target) 'kernel'"
    ):
        net(z, targets={"kernel": (4, 4, 25, 25)})
    with pytest.raises(ValueError, match="descriptors=True"):
        hk.HyperNet(shapes)(targets=shapes)


def test_no_two_chunks_look_the_same_to_descriptors():
    net = hk.HyperNet({"weight": (12, 10)}, width=8, chunk=(4, 4), descriptors=True)
    alike = net.descriptors([cut(name, Found((12, 10)), (4, 4), 8, "chunk", "row") for name in "abc"])
    assert len(alike.unique(dim=0)) == len(alike) == 3 * 9


def test_other_modules_are_taken_as_the_first_was():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    net = hk.HyperNet(model, filter_fn=lambda _layer, name: name == "0", biases=True, descriptors=True)
    other = nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 4))
    assert list(net(targets=other)) == list(net()) == ["0.weight", "0.bias"]
    assert list(net(targets={"any": (3, 2)})) == ["any"]


def test_tasks_and_noise_that_are_none_are_refused():
    tasks, noise = hk.nn.Tasks(3, 4), hk.nn.Noise(4)
    for given, kind, match in (
        (torch.tensor([0, 3]), ValueError, r"task: got \[0, 3\], wanted 0 to 2"),
        (torch.tensor([-1]), ValueError, "task"),
        (torch.tensor([0.5]), TypeError, "task"),
        ("first", TypeError, "task"),
    ):
        with pytest.raises(kind, match=match):
            tasks(given)
    with pytest.raises(ValueError, match=r"sample: got shape \[2, 5\], wanted \[G, 4\]"):
        noise(torch.randn(2, 5))
    with pytest.raises(ValueError, match="count"):
        noise(0)
    with pytest.raises(ValueError, match="context: got none, wanted what Tasks makes z of"):
        hk.HyperNet({"weight": (8, 6)}, context_features=4, encoder=tasks)()


NET = hk.HyperNet({"w": (8, 6)}, context_features=3)
TASKS = hk.nn.Tasks(3, 4, beside=2)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: hk.HyperNet({"w": (8, 6)}, trunk=nn.Linear(32, 32)),
            TypeError,
            "trunk: got Linear, wanted a module that",
        ),
        (
            lambda: hk.HyperNet({"w": (8, 6)}, trunk=hk.nn.MLPTrunk((32,), 16)),
            ValueError,
            r"embedding: got shape \[\d+, 32\], wanted 16 embedding_features",
        ),
        (
            lambda: hk.HyperLinear(6, 8, context_features=3, hypernet=NET),
            TypeError,
            "hypernet: got a HyperNet, which makes a dict",
        ),
        (
            lambda: TASKS(torch.randn(2, 2), torch.tensor([1])),
            ValueError,
            r"context: got \[\[2, 2\]\] beside tasks \[1\]",
        ),
        (lambda: TASKS([1, 2], torch.tensor([1])), ValueError, r"context: got \['list'\]"),
        (lambda: hk.context(torch.tensor([1, 2])).__enter__(), TypeError, "ids go through an encoder"),
    ],
    ids=["called otherwise", "embeddings", "a HyperNet", "too many beside", "a list beside", "ids"],
)
def test_parts_that_do_not_fit_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
