"""What `algebra` tells of weights, against the weights formed, in fp64."""

import copy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import hyperkernels as hk
from hyperkernels import algebra
from hyperkernels.testing import peak_bytes
from hyperkernels.weight import form

SHAPES = {"whole": (12, 10), "cropped": (11, 13), "one_chunk": (3, 4), "kernel": (7, 9, 2, 3), "bias": (6,)}
FORMS = ("shared", "contexts", "additive", "per_chunk_heads", "head_bias", "head_bias_per_chunk")


def make(shape, form, contexts=3, m=3):
    N, K, *kernel = shape if len(shape) > 1 else (*shape, 1)
    rows, cols = 4, min(5, K)
    I, J = -(-N // rows), -(-K // cols)

    def draw(*size):
        return torch.randn(size, dtype=torch.float64)

    per_chunk = (I * J,) if form == "per_chunk_heads" else ()
    hidden = draw(*(() if form == "shared" else (contexts,)), I, J, m)
    if form == "additive":
        hidden = hk.AdditiveHidden(draw(contexts, m), draw(I, J, m), "tanh")
    bias = {"head_bias": (), "head_bias_per_chunk": (I * J,)}.get(form)
    return hk.GeneratedWeight(
        hidden,
        draw(*per_chunk, m, rows, cols, *kernel),
        shape,
        head_bias=None if bias is None else draw(*bias, rows, cols, *kernel),
    )


def flat(weight):
    formed = form(weight)
    return formed.reshape(formed.shape[0] if formed.dim() > weight.dim() else 1, -1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equal_to_what_the_weights_formed_give(shape, form):
    a, b = make(shape, form), make(shape, form)
    w, v = flat(a), flat(b)
    one = form == "shared"
    torch.testing.assert_close(algebra.gram(a, b), w @ v.T)
    torch.testing.assert_close(algebra.gram(a), w @ w.T)
    inner = (w * v).sum(1)
    wanted = {
        "inner": inner,
        "distance": (w - v).norm(dim=1),
        "squared_distance": (w - v).square().sum(1),
        "cosine": inner / w.norm(dim=1) / v.norm(dim=1),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(algebra, name)(a, b), value[0] if one else value)
    torch.testing.assert_close(algebra.norm(a), w.norm(dim=1)[0] if one else w.norm(dim=1))
    matrices = w.reshape(len(w), shape[0], -1)
    spectral = torch.linalg.matrix_norm(matrices, 2)
    torch.testing.assert_close(algebra.spectral_norm(a, tol=1e-9), spectral[0] if one else spectral, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["shared", "contexts", "additive", "head_bias"])
@pytest.mark.parametrize(
    ("shape", "start"), [((12, 10), 0), ((11, 13), 5), ((3, 2), 8), ((5, 3, 2, 2), 30), ((40,), 7)]
)
def test_equal_for_stretches_of_a_flat_vector(shape, start, form):
    def draw(*size):
        return torch.randn(size, dtype=torch.float64)

    def make():
        hidden = draw(*(() if form == "shared" else (3,)), 10, 4)
        if form == "additive":
            hidden = hk.AdditiveHidden(draw(3, 4), draw(10, 1, 4), "tanh")
        return hk.FlatWeight(hidden, draw(4, 17), shape, start, head_bias=draw(17) if "bias" in form else None, scale=2)

    a, b = make(), make()
    w, v = flat(a), flat(b)
    first = (lambda value: value[0]) if form == "shared" else (lambda value: value)
    torch.testing.assert_close(algebra.gram(a, b), w @ v.T)
    torch.testing.assert_close(algebra.distance(a, b), first((w - v).norm(dim=1)))
    torch.testing.assert_close(algebra.total_norm({"a": a, "b": b}), first(torch.cat([w, v], 1).norm(dim=1)))
    spectral = torch.linalg.matrix_norm(w.reshape(len(w), shape[0], -1), 2)
    torch.testing.assert_close(algebra.spectral_norm(a, tol=1e-9), first(spectral), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"a: got chunks of .* in a flat vector"):
        algebra.chunk_norms(a)


@pytest.mark.parametrize("other", ["context", "activation"])
def test_layers_of_one_head_but_other_hiddens_are_told_apart(other):
    def draw(*size):
        return torch.randn(size, dtype=torch.float64)

    head, context = draw(3, 4, 5), draw(2, 3)
    second = (draw(2, 3), "tanh") if other == "context" else (context, "relu")
    hiddens = [hk.AdditiveHidden(c, draw(3, 3, 3), activation) for c, activation in ((context, "tanh"), second)]
    a, b = (hk.GeneratedWeight(hidden, head, (11, 13)) for hidden in hiddens)
    torch.testing.assert_close(algebra.total_norm({"a": a, "b": b}), torch.cat([flat(a), flat(b)], 1).norm(dim=1))


def test_the_output_regularizer_of_a_flat_vector():
    net = hk.HyperNet({"a": (30, 20), "b": (30,)}, context_features=4, width=5, layout="flat", chunk=64).double()
    tasks = torch.randn(6, 4, dtype=torch.float64)
    before = copy.deepcopy(net)(tasks)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = net(tasks)
    got = algebra.output_regularizer(weights, before)
    torch.testing.assert_close(got, sum((flat(weights[n]) - flat(before[n])).square().sum(1) for n in weights).mean())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_norms_of_chunks(shape, form):
    weight = make(shape, form)
    N, K = shape[0], torch.Size(shape[1:]).numel()
    rows, cols = 4, min(5, (*shape, 1)[1]) * torch.Size(shape[2:]).numel()
    w = flat(weight).reshape(-1, N, K)
    wanted = [torch.stack([b.flatten(1).norm(dim=1) for b in a.split(cols, 2)], 1) for a in w.split(rows, 1)]
    torch.testing.assert_close(algebra.chunk_norms(weight), torch.stack(wanted, 1))


def test_one_context_beside_many_and_heads_of_another_width():
    a, b = make((11, 13), "contexts"), make((11, 13), "shared", m=5)
    w, v = flat(a), flat(b)
    torch.testing.assert_close(algebra.inner(a, b), (w * v).sum(1))
    torch.testing.assert_close(algebra.distance(a, b), (w - v).norm(dim=1))


def test_differentiable():
    I, J, m = 3, 3, 2
    hidden = torch.randn(2, I, J, m, dtype=torch.float64, requires_grad=True)
    head = torch.randn(m, 4, 5, dtype=torch.float64, requires_grad=True)
    other = make((11, 13), "contexts", contexts=2)

    def run(hidden, head):
        weight = hk.GeneratedWeight(hidden, head, (11, 13))
        return algebra.norm(weight), algebra.squared_distance(weight, other), algebra.gram(weight)

    assert gradcheck(run, (hidden, head))
    spectral = algebra.spectral_norm(hk.GeneratedWeight(hidden, head, (11, 13)), tol=0)
    grads = torch.autograd.grad(spectral.sum(), (hidden, head))
    formed = hk.generate_weight(hidden, head, (11, 13))
    wanted = torch.autograd.grad(torch.linalg.matrix_norm(formed, 2).sum(), (hidden, head))
    for got, want in zip(grads, wanted):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["contexts", "per_chunk_heads"])
def test_sums_of_squares_are_differentiable_to_any_order(form):
    """Their backward is our own; forward mode and `torch.func` take torch's."""
    weight, other = (make((5, 2), form, contexts=2, m=2) for _ in range(2))
    factors = [weight.hidden, weight.head]

    def run(hidden, head):
        moved = hk.GeneratedWeight(hidden, head, (5, 2))
        apart = algebra.squared_distance(moved, other), algebra.squared_distance(other, moved)
        return (*apart, algebra.total_norm({"w": moved}))

    for needs in ((True, True), (True, False), (False, True)):
        inputs = tuple(v.clone().requires_grad_(needed) for v, needed in zip(factors, needs))
        assert gradcheck(run, inputs, check_forward_ad=True)
        assert gradgradcheck(run, inputs)
    hessian = torch.func.hessian(lambda hidden: run(hidden, factors[1])[0].sum())(factors[0])
    wanted = torch.autograd.functional.hessian(lambda hidden: run(hidden, factors[1])[0].sum(), factors[0])
    torch.testing.assert_close(hessian, wanted)


def test_the_output_regularizer_is_the_one_of_weights_formed():
    shapes = {"a": (30, 20), "b": (30,), "c": (8, 6, 3, 3)}
    net = hk.HyperNet(shapes, context_features=4, width=5, head_bias=True).double()
    tasks = torch.randn(6, 4, dtype=torch.float64)
    before = copy.deepcopy(net).requires_grad_(False)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights, earlier = net(tasks), before(tasks)
    got = algebra.output_regularizer(weights, earlier)
    wanted = sum((flat(weights[n]) - flat(earlier[n])).square().sum(1) for n in weights).mean()
    torch.testing.assert_close(got, wanted)
    parameters = list(net.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(v, parameters, retain_graph=True) for v in (got, wanted))):
        torch.testing.assert_close(ours, theirs)
    total = sum(flat(w).square().sum(1) for w in weights.values()).sqrt()
    torch.testing.assert_close(algebra.total_norm(weights), total)


def test_gradients_are_clipped_by_what_is_generated():
    net = hk.HyperNet({"a": (30, 20), "b": (8, 6, 3, 3)}, context_features=4, width=5)
    weights = net(torch.randn(3, 4))
    penalty = algebra.weight_decay(weights)
    torch.testing.assert_close(penalty, sum(flat(w).square().sum() for w in weights.values()) / 3)
    (1e3 * penalty).backward()
    before = [p.grad.clone() for p in net.parameters()]
    norm = algebra.clip_gradients_(net.parameters(), weights, 0.1)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in before]).norm())
    after = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(after.norm(), 0.1 * algebra.total_norm(weights).mean().detach())
    algebra.clip_gradients_(net.parameters(), weights, 1e9)
    assert torch.equal(torch.cat([p.grad.flatten() for p in net.parameters()]), after), "small ones stay"
    net.zero_grad()
    assert algebra.clip_gradients_(net.parameters(), weights) == 0


def test_no_weight_is_formed():
    weight = hk.GeneratedWeight(torch.randn(8, 30, 25, 8), torch.randn(8, 40, 40), (1190, 990))
    size = 8 * 1190 * 990 * 4
    for run in (algebra.norm, algebra.gram, lambda w: algebra.distance(w, w), algebra.spectral_norm):
        assert peak_bytes(lambda run=run: run(weight)) < size / 10


def few():
    return make((11, 13), "contexts", contexts=2)


@pytest.mark.parametrize(
    ("run", "error", "match"),
    [
        (lambda a, b: algebra.inner(a, torch.ones(11, 13)), TypeError, "b: got Tensor"),
        (lambda a, b: algebra.gram(a, make((12, 10), "shared")), ValueError, "b: got chunks"),
        (lambda a, b: algebra.inner(a, make((11, 13), "contexts", contexts=2)), ValueError, "b: got 2 contexts"),
        (lambda a, b: algebra.spectral_norm(a, 0), ValueError, "iterations"),
        (lambda a, b: algebra.spectral_norm(a, tol=-1), ValueError, "tol: got -1, wanted 0 or more"),
        (
            lambda a, b: algebra.total_norm(a),
            TypeError,
            "weights: got GeneratedWeight, wanted generated weights by name",
        ),
        (lambda a, b: algebra.output_regularizer({"w": a}, b), TypeError, "earlier: got GeneratedWeight"),
        (lambda a, b: algebra.total_norm({}), ValueError, "weights: got none, wanted at least one"),
        (
            lambda a, b: algebra.weight_decay({"w": a, "v": few()}),
            ValueError,
            r"weights\['v'\]: got 2 contexts, wanted 3",
        ),
        (lambda a, b: algebra.output_regularizer({}, {}), ValueError, "weights: got none"),
        (
            lambda a, b: algebra.output_regularizer({"w": make((11, 13), "shared")}, {"w": a}),
            ValueError,
            r"earlier\['w'\]: got 3 contexts, wanted 1",
        ),
        (lambda a, b: algebra.cosine(a, None), TypeError, "b: got NoneType"),
        (lambda a, b: algebra.cosine(a, few()), ValueError, "b: got 2 contexts"),
        (lambda a, b: algebra.clip_gradients_([1], {"w": a}), TypeError, "parameters: got int"),
        (
            lambda a, b: algebra.output_regularizer({"w": a}, {"w": few()}),
            ValueError,
            r"earlier\['w'\]: got 2 contexts",
        ),
        (lambda a, b: algebra.output_regularizer({"w": a}, {"w": 3}), TypeError, r"earlier\['w'\]: got int"),
        (lambda a, b: algebra.output_regularizer({"w": a}, {"v": b}), ValueError, "earlier"),
    ],
)
def test_what_does_not_fit_is_refused(run, error, match):
    with pytest.raises(error, match=match):
        run(make((11, 13), "contexts"), make((11, 13), "contexts"))


@pytest.mark.parametrize("context_features", [None, 3])
def test_the_weight_of_a_layer_is_told_of_as_it_is_made(context_features):
    linear = hk.HyperLinear(24, 12, chunk=(4, 4), width=5, context_features=context_features, dtype=torch.float64)
    conv = hk.HyperConv2d(8, 12, 3, chunk=(4, 4), width=5, context_features=context_features, dtype=torch.float64)
    with hk.context(torch.randn(4, 3, dtype=torch.float64)):
        for layer in (linear, conv):
            w = flat(layer.weight.made())
            norms = w.norm(dim=1) if context_features else w.norm()
            torch.testing.assert_close(algebra.norm(layer.weight), norms)
            torch.testing.assert_close(algebra.gram(layer.weight), w @ w.T)
            torch.testing.assert_close(algebra.distance(layer.weight, layer.weight), norms * 0, atol=1e-6, rtol=0)
            torch.testing.assert_close(algebra.chunk_norms(layer.weight).square().sum((1, 2)), w.square().sum(1))
            torch.testing.assert_close(algebra.total_norm({"w": layer.weight}), norms)
            found = algebra.output_regularizer({"w": layer.weight}, {"w": layer.weight})
            torch.testing.assert_close(found, found * 0, atol=1e-9, rtol=0)
            matrices = w.view(len(w), 12, -1)
            wanted = torch.linalg.matrix_norm(matrices, 2)
            got = algebra.spectral_norm(layer.weight, tol=1e-9)
            torch.testing.assert_close(got, wanted if context_features else wanted[0])


@pytest.mark.parametrize("kind", ["numbers", "tensors", "mixed"])
def test_targets_that_share_a_head_have_scales_of_their_own(kind):
    """Their chunks are summed over together; a number is as exact as fp64, whatever the default dtype."""
    given = {
        "numbers": (0.1, -0.3, 0.7),
        "tensors": (torch.tensor(0.5), torch.tensor([0.25]), torch.tensor(2.0)),
        "mixed": (1.0, torch.tensor(0.25), 0.3),
    }[kind]
    head, context = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)

    def make(seed):
        torch.manual_seed(seed)
        chunks = [torch.randn(2 + n, 3, 3, dtype=torch.float64) for n in range(3)]
        hidden = [hk.AdditiveHidden(context, v, "tanh") for v in chunks]
        sizes = [((2 + n) * 4 - 1, 14) for n in range(3)]
        return {str(n): hk.GeneratedWeight(hidden[n], head, sizes[n], scale=given[n]) for n in range(3)}

    weights, others = make(0), make(1)
    formed, formed_others = ({n: form(w) for n, w in own.items()} for own in (weights, others))
    squares = sum(w.square().flatten(1).sum(1) for w in formed.values())
    torch.testing.assert_close(hk.algebra.total_norm(weights), squares.sqrt(), rtol=1e-12, atol=0)
    moved = sum((formed[n] - formed_others[n]).square().flatten(1).sum(1) for n in formed)
    torch.testing.assert_close(hk.algebra.output_regularizer(weights, others), moved.mean(), rtol=1e-12, atol=0)
    largest = torch.linalg.matrix_norm(formed["1"], 2)
    torch.testing.assert_close(hk.algebra.spectral_norm(weights["1"], tol=0), largest, rtol=1e-6, atol=0)


def test_heads_for_each_chunk_that_two_weights_share():
    head = torch.randn(4, 2, 3, 5, dtype=torch.float64)
    weights = {n: hk.GeneratedWeight(torch.randn(2, 2, 2, 2, dtype=torch.float64), head, (6, 10)) for n in "ab"}
    squares = sum(form(w).square().flatten(1).sum(1) for w in weights.values())
    torch.testing.assert_close(hk.algebra.total_norm(weights), squares.sqrt())


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda net, w: hk.algebra.clip_gradients_(net, w), "parameters: got HyperNet"),
        (lambda net, w: hk.algebra.clip_gradients_(net.heads[0], w), "parameters: got Parameter"),
        (lambda net, w: hk.algebra.clip_gradients_(net.parameters(), w, "a"), "limit: got 'a'"),
        (lambda net, w: hk.algebra.spectral_norm(w["a"], iterations=True), "iterations: got True"),
        (lambda net, w: hk.algebra.spectral_norm(w["a"], tol="a"), "tol: got 'a'"),
    ],
)
def test_arguments_that_are_none_are_named(run, match):
    net = hk.HyperNet({"a": (8, 6)}, width=4)
    with pytest.raises((TypeError, ValueError), match=match):
        run(net, net())


def test_before_the_first_task_there_is_nothing_to_keep():
    net, none = hk.HyperNet({"w": (8, 6)}, context_features=3), torch.randn(0, 3)
    value = hk.algebra.output_regularizer(net(none), net(none)) + hk.algebra.weight_decay(net(none))
    value.backward()
    assert value == 0
    assert not any(p.grad is not None and p.grad.abs().sum() for p in net.parameters())


def test_of_other_dtypes_and_a_distance_of_two_weights_of_one_net():
    weights = hk.HyperNet({"a": (6, 5), "b": (6, 5)}, context_features=3)(torch.randn(2, 3))
    a, b = weights["a"], weights["b"]
    wide = hk.GeneratedWeight(a.hidden.to(torch.float64), a.head.double(), (6, 5), scale=a.scale.double())
    for run in (algebra.inner, algebra.cosine, algebra.gram, algebra.distance):
        torch.testing.assert_close(run(wide, b), run(b, wide).mT if run is algebra.gram else run(b, wide))
    leaves = [a.hidden.context, a.head]
    plain = torch.autograd.grad(algebra.squared_distance(a, b).sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(algebra.squared_distance(a, b).sum(), leaves, create_graph=True)
    for got, want in zip(again, plain):
        torch.testing.assert_close(got, want)


def test_biases_for_each_chunk_that_two_grids_share():
    head, bias = torch.randn(2, 3, 4).double(), torch.randn(6, 3, 4).double()
    shapes = {"a": ((2, 3), (6, 11)), "b": ((3, 2), (8, 8))}
    weights = {
        name: hk.GeneratedWeight(torch.randn(*grid, 2).double(), head, shape, head_bias=bias)
        for name, (grid, shape) in shapes.items()
    }
    wanted = sum(w.materialize().square().sum() for w in weights.values())
    torch.testing.assert_close(algebra.weight_decay(weights), wanted)


def test_many_weights_of_a_flat_vector_and_one_of_them():
    shapes = {str(n): (n % 7 + 1, 5) for n in range(40)}
    net = hk.HyperNet(shapes, context_features=3, layout="flat", chunk=64).double()
    weights, earlier = net(torch.randn(2, 3).double()), net(torch.randn(2, 3).double())
    moved = [(weights[n].materialize() - earlier[n].materialize()).square().sum((1, 2)) for n in shapes]
    torch.testing.assert_close(algebra.output_regularizer(weights, earlier), sum(moved).mean())
    alone = weights["17"]
    torch.testing.assert_close(algebra.norm(alone), alone.materialize().square().sum((1, 2)).sqrt())
