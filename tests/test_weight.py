"""`GeneratedWeight` in the functions of torch, beside the weight formed."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperkernels as hk
from hyperkernels import weight as generated
from hyperkernels.testing import peak_bytes
from hyperkernels.weight import GeneratedWeight, form

N, K, B = 8, 14, 9


def make(shape=(N, K), contexts=None, *, head_bias=False, additive=False, dtype=torch.float64):
    n, k, *kernel = shape
    lead = () if contexts is None else (contexts,)
    head = torch.randn(6, 4, 5, *kernel, dtype=dtype, requires_grad=True)
    bias = torch.randn(4, 5, *kernel, dtype=dtype, requires_grad=True) if head_bias else None
    grid = (-(-n // 4), -(-k // 5), 6)
    if additive:
        parts = (torch.randn(contexts or 1, 6, dtype=dtype), torch.randn(grid, dtype=dtype))
        hidden = hk.AdditiveHidden(*(v.requires_grad_() for v in parts), "tanh")
    else:
        hidden = torch.randn(*lead, *grid, dtype=dtype, requires_grad=True)
    return GeneratedWeight(hidden, head, shape, head_bias=bias)


x = torch.randn(B, K, dtype=torch.float64)
RUNS = {
    "linear": lambda w: F.linear(x, w),
    "linear, bias": lambda w: F.linear(x, w, torch.ones(N).double()),
    "linear, named": lambda w: F.linear(input=x[0], weight=w, bias=None),
    "x @ W.T": lambda w: x @ w.T,
    "x @ W.t()": lambda w: torch.matmul(x, w.t()),
    "W @ x": lambda w: w @ x.T,
    "W @ vector": lambda w: w @ x[0],
    "W @ batch": lambda w: w @ torch.stack([x.T, 2 * x.T]),
    "mv": lambda w: w.mv(x[0]),
    "addmm, scaled": lambda w: torch.addmm(torch.ones(B, N).double(), x, w.T, beta=2, alpha=0.5),
    "mm": lambda w: torch.mm(w, x.T),
    "x @ W.mT": lambda w: x.view(3, 3, K) @ w.mT,
    "transpose": lambda w: x @ w.transpose(0, 1),
    "addmm": lambda w: torch.addmm(torch.ones(B, N).double(), x, w.T),
    "W.T @ y": lambda w: w.T @ x[:N],
    "to": lambda w: F.linear(x.float(), w.to(torch.float32)).double(),
    "double": lambda w: F.linear(x, w.double(memory_format=torch.preserve_format)),
    "rows": lambda w: w[2:5],
    "rows, every column": lambda w: w[2:5, :],
    "rows, and whatever else": lambda w: w[torch.tensor([3, 0]), ...],
    "matmul, named": lambda w: torch.matmul(x, other=w.T),
    "t, named": lambda w: x @ torch.t(input=w),
    "addmm, named": lambda w: torch.ones(B, N).double().addmm(mat1=x, mat2=w.T, alpha=2),
    "embedding": lambda w: F.embedding(torch.tensor([[0, 2], [3, 1]]), w),
}
FORMED = {
    "sum": lambda w: w.sum(),
    "columns": lambda w: w[:, 2:5],
    "norm": lambda w: torch.linalg.vector_norm(w),
    "stack": lambda w: torch.stack([w, w]),
    "scaled": lambda w: 2 * w,
    "addmm, beta 0": lambda w: torch.addmm(torch.full((N,), torch.nan).double(), x, w.T, beta=0),
    "mm, by another name": lambda w: torch.mm(x, mat2=w.T),
}


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(generated, "_warned", set())


@pytest.mark.parametrize("settings", [{}, {"head_bias": True}, {"additive": True}], ids=["plain", "bias", "additive"])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_what_runs_without_forming_it(run, settings, monkeypatch):
    weight = make(**settings)
    parts = [v for v in (weight.head, weight.settings["head_bias"]) if v is not None]
    formed = form(weight)
    wanted = run(formed)
    dy = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, parts, dy)
    monkeypatch.setattr(generated, "form", None)
    got = run(weight)
    tolerance = 1e-4 if run is RUNS["to"] else 1e-12
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(torch.autograd.grad(got, parts, dy), grads):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("run", FORMED.values(), ids=FORMED)
def test_what_forms_it_is_right_and_says_so_once(run):
    weight = make()
    with pytest.warns(UserWarning, match="forms a generated weight"):
        got = run(weight)
    torch.testing.assert_close(got, run(form(weight)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(weight)
    got.sum().backward()
    assert weight.head.grad.abs().sum() > 0


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("run", [lambda w: w + 1, lambda w: F.softmax(w, -1), lambda w: nn.Softmax(-1)(w)])
def test_it_says_so_at_the_users_line(run, deferred):
    weight = hk.HyperLinear(8, 4).weight if deferred else make()
    with pytest.warns(UserWarning, match="forms a generated weight") as said:
        run(weight)
    assert (said[0].filename, said[0].lineno) == (__file__, run.__code__.co_firstlineno)


@pytest.mark.filterwarnings("ignore:.*forms a generated weight")
@torch.no_grad()
def test_products_into_a_result():
    weight, y = make(), x.new_empty(B, N)
    for run in (torch.matmul, torch.mm):
        assert run(x, weight.T, out=y.zero_()) is y
        torch.testing.assert_close(y, x @ form(weight).T)


IN_PLACE = {
    "add_": lambda w: w.add_(1),
    "[]": lambda w: w.__setitem__(0, 1),
    "*=": lambda w: w.__imul__(2),
    "out": lambda w: torch.mm(x[:N], torch.eye(K).double(), out=w),
    "outs": lambda w: torch.max(x, 0, out=(w, torch.empty(0, dtype=torch.int64))),
}


@pytest.mark.parametrize("run", IN_PLACE.values(), ids=IN_PLACE)
def test_it_is_not_changed_in_place(run):
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        run(make())


def test_under_autocast():
    weight = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = GeneratedWeight(weight.hidden.bfloat16(), weight.head, (N, K))
        y = F.linear(x.float(), half)
    assert y.dtype == half.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*forms a generated weight")
def test_products_with_a_generated_bias():
    hidden, head = torch.randn(2, 1, 6).double(), torch.randn(6, 4, 1).double()
    bias, v = GeneratedWeight(hidden, head, (N,)), torch.randn(N, 3).double()
    torch.testing.assert_close(bias @ v, form(bias) @ v)
    torch.testing.assert_close(bias @ v[:, 0], form(bias) @ v[:, 0])
    torch.testing.assert_close(v.T @ bias, v.T @ form(bias))


def test_more_contexts_than_one_are_not_one_tensor():
    weight = make(contexts=3)
    torch.testing.assert_close(
        F.linear(x.view(3, 3, K), weight), torch.einsum("gtk,gnk->gtn", x.view(3, 3, K), form(weight))
    )
    with pytest.raises(RuntimeError, match="sum: got a generated weight of 3 contexts"):
        weight.sum()


CONVOLUTIONS = {
    "1d": (F.conv1d, (N, K, 3), (2, K, 11)),
    "2d": (F.conv2d, (N, K, 3, 2), (2, K, 7, 8)),
    "3d": (F.conv3d, (N, K, 2, 1, 2), (2, K, 4, 4, 5)),
    "transposed": (F.conv_transpose2d, (K, N, 3, 3), (2, K, 5, 5)),
}


@pytest.mark.parametrize(("function", "shape", "images"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(function, shape, images, monkeypatch):
    weight, v = make(shape), torch.randn(images).double()
    formed = form(weight)
    monkeypatch.setattr(generated, "form", None)
    for arguments in ((), (None, 2, 1), (torch.ones(N).double(), 2)):
        torch.testing.assert_close(function(v, weight, *arguments), function(v, formed, *arguments))


def test_a_module_reads_what_a_weight_tells():
    weight = make(dtype=torch.float32)
    linear = nn.Linear(K, N, bias=False)
    shapes = []

    def look(module, _inputs):
        shapes.append((module.weight.shape, module.weight.dtype, module.weight.device.type, module.weight.size(0)))

    linear.register_forward_pre_hook(look)
    torch.func.functional_call(linear, {"weight": weight}, x.float())
    assert shapes == [((N, K), torch.float32, "cpu", N)]
    assert weight.requires_grad
    assert not weight.is_leaf
    assert "GeneratedWeight(shape=[8, 14]" in repr(weight)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 3))
        self.hidden, self.head = nn.Parameter(torch.randn(2, 3, 6)), nn.Parameter(torch.randn(6, 4, 5))

    def forward(self, v):
        weight = GeneratedWeight(self.hidden, self.head, (N, K))
        return torch.func.functional_call(self.layers, {"0.weight": weight}, v)


def test_compiled_without_a_break():
    model, v = Model(), x.float()
    grads = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(v).square().sum().backward()
        grads.append((model.hidden.grad.clone(), model.head.grad.clone()))
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*forms a generated weight")
def test_compiled_functions_take_it_form_it_and_read_it_from_a_layer():
    """Given from without; in an operation that forms it; and through a layer's `.weight`."""
    hidden, head = torch.randn(2, 3, 6), torch.randn(6, 4, 5)
    weight, v, dense = GeneratedWeight(hidden, head, (8, 14)), torch.randn(3, 14), nn.Linear(14, 8)
    layer, filters, images = hk.HyperLinear(14, 8, width=4), torch.randn(6, 4, 5, 3, 3), torch.randn(2, 14, 7, 7)
    runs = {
        "given": (lambda w: torch.func.functional_call(dense, {"weight": w}, v), weight),
        "formed": (lambda h: GeneratedWeight(h, head, (8, 14)).sum(), hidden),
        "read": (lambda v: F.linear(v, layer.weight, layer.bias), v),
        "static layer": (layer, v),
        "transposed": (lambda w: v @ w.T, weight),
        "of another dtype": (lambda w: F.linear(v.double(), w.to(torch.float64)), weight),
        "product": (lambda w: w @ v.T, weight),
        "rows": (lambda w: F.linear(v, w[:4]), weight),
        "convolution": (lambda w: F.conv2d(images, w, stride=2), GeneratedWeight(hidden, filters, (8, 14, 3, 3))),
    }
    for name, (run, given) in runs.items():
        torch.compiler.reset()
        found = torch.compile(run, fullgraph=True, backend="aot_eager")(given)
        torch.testing.assert_close(found, run(given), msg=name)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo reads it
def test_a_compiled_function_takes_one_weight_after_another():
    """None of them is built into the graph; and of many contexts too."""
    dense, v = nn.Linear(14, 8), torch.randn(3, 14)
    run = lambda w, v: torch.func.functional_call(dense, {"weight": w}, v)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 2.0):
        hidden, head = torch.randn(2, 3, 6, requires_grad=True), torch.randn(6, 4, 5)
        weight = GeneratedWeight(hidden, head, (8, 14), scale=torch.tensor(scale))
        torch.testing.assert_close(compiled(weight, v), run(weight, v))
        (got,) = torch.autograd.grad(compiled(weight, v).square().sum(), hidden)
        (wanted,) = torch.autograd.grad(run(weight, v).square().sum(), hidden)
        torch.testing.assert_close(got, wanted)
    many = GeneratedWeight(hk.AdditiveHidden(torch.randn(3, 6), torch.randn(2, 3, 6), "tanh"), head, (8, 14))
    x = torch.randn(3, 5, 14)
    torch.testing.assert_close(compiled(many, x), run(many, x))


def test_what_would_be_lost_or_taken_wrongly_is_refused():
    weight = GeneratedWeight(torch.randn(2, 3, 6), torch.randn(6, 4, 5), (8, 14))
    for name in ("data", "grad"):
        with pytest.raises(RuntimeError, match="cannot be changed in place"):
            setattr(weight, name, torch.zeros(8, 14))
    with pytest.raises(IndexError):
        weight.transpose(0, 5)
    for scale in (torch.ones(5), "2", None):
        with pytest.raises(ValueError, match="scale: got"):
            GeneratedWeight(weight.hidden, weight.head, (8, 14), scale=scale)
    with pytest.raises(ValueError, match="padding_idx: got 8, wanted -8 to 7"):
        F.embedding(torch.tensor([1]), weight, padding_idx=8)
    with pytest.raises(TypeError, match=r"input: got torch.float32"):
        F.embedding(torch.tensor([1.5]), weight)
    torch.testing.assert_close(weight.materialize(), hk.generate_weight(weight.hidden, weight.head, (8, 14)))


@pytest.mark.filterwarnings("ignore:.*forms a generated weight")
@pytest.mark.parametrize("training", [False, True])
def test_attention_that_reads_its_layers_weight(training):
    """It takes `out_proj.weight` past the layer, and its fast path looks at it."""
    attention, v = nn.MultiheadAttention(8, 2, batch_first=True).train(training), torch.randn(3, 5, 8)
    weight = GeneratedWeight(torch.randn(2, 2, 6), torch.randn(6, 4, 4), (8, 8))
    run = lambda w: torch.func.functional_call(attention, {"out_proj.weight": w}, (v, v, v))[0]  # noqa: E731
    torch.testing.assert_close(run(weight), run(form(weight)))
    hk.hyperize_(attention, hk.HyperConfig(width=2), lambda *_: True)  # it stays as it is, and right
    torch.testing.assert_close(run(weight), run(form(weight)))


def test_a_large_weight_is_never_there():
    hidden, head = torch.randn(128, 32, 8), torch.randn(8, 32, 128)
    v = torch.randn(2, 4096)
    assert peak_bytes(lambda: F.linear(v, GeneratedWeight(hidden, head, (4096, 4096)))) < 4096 * 4096 * 4 / 20


@pytest.mark.parametrize(
    ("shape", "head", "match"),
    [((9, 14), (6, 4, 5), "shape"), ((8, 14, 3), (6, 4, 5), "head"), ((8, 14), (7, 4, 5), "head")],
)
def test_parts_that_do_not_fit_are_refused(shape, head, match):
    with pytest.raises(ValueError, match=match):
        GeneratedWeight(torch.randn(2, 3, 6), torch.randn(head), shape)


@pytest.mark.parametrize("size", [17, 19, 21, 24])
def test_an_input_as_wide_as_the_chunks_but_not_as_the_weight_is_refused(size):
    weight = hk.GeneratedWeight(torch.randn(8, 4, 6), torch.randn(6, 4, 6), (30, 20))
    kernel = hk.GeneratedWeight(torch.randn(2, 4, 6), torch.randn(6, 4, 6, 3, 3), (6, 20, 3, 3))
    for run in (
        lambda: F.linear(torch.randn(3, size), weight),
        lambda: torch.randn(3, size) @ weight.T,
        lambda: weight @ torch.randn(size, 3),
        lambda: F.conv2d(torch.randn(1, size, 5, 5), kernel),
    ):
        with pytest.raises(ValueError, match=r"input: got shape .* wanted 20 features"):
            run()
