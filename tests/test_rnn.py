"""`HyperRNNCell` and `HyperLSTMCell`, against steps with every sample's weights formed."""

import pytest
import torch
import torch.nn.functional as F

import hyperkernels as hk
from hyperkernels.testing import peak_bytes
from hyperkernels.weight import form

CELLS = {"rnn": hk.nn.HyperRNNCell, "lstm": hk.nn.HyperLSTMCell}


def by_hand(cell, x, state):
    """One step, as the docstrings write it."""
    lstm = isinstance(cell, hk.nn.HyperLSTMCell)
    h, own = state[0], state[2:] if lstm else state[1]
    own = cell.hyper_cell(torch.cat([x, h], 1), own)
    z = cell.context_layer(own[0] if lstm else own)
    if cell.generates == "rows":
        of_x, of_h, bias = F.linear(z, cell.scales.weight, cell.scales.bias).chunk(3, 1)
        sums = of_x * (x @ cell.weights["x"].T) + of_h * (h @ cell.weights["h"].T) + bias
    else:
        w = {name: form(weight) for name, weight in cell.hypernet(z).items()}
        products = (torch.einsum("bnk,bk->bn", w[name], v) for name, v in (("x.weight", x), ("h.weight", h)))
        sums = sum(products) + cell.bias(z)
    if not lstm:
        h = sums.tanh()
        return h, (h, own)
    i, f, g, o = sums.chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h, (h, c, *own)


@pytest.mark.parametrize("generates", ["weights", "rows"])
@pytest.mark.parametrize("kind", CELLS.values(), ids=CELLS)
def test_steps_and_gradients(kind, generates):
    cell = kind(5, 12, hyper_size=6, context_features=4, generates=generates, width=3).double()
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    steps = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    leaves = [steps, *cell.parameters()]
    results = []
    for run in (cell, lambda x, state: by_hand(cell, x, state)):
        state = cell.start(steps[0])
        for x in steps:
            h, state = run(x, state)
        results.append((h, *torch.autograd.grad(h.square().sum(), leaves)))
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", CELLS.values(), ids=CELLS)
def test_no_samples_weights_are_formed(kind):
    cell = kind(256, 256, width=8)
    x = torch.randn(16, 256)
    weights = 16 * cell.GATES * 256 * 512 * 4
    assert peak_bytes(lambda: cell(x)[0].sum().backward()) < weights / 4


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="generates"):
        hk.nn.HyperRNNCell(5, 12, generates="all")
    with pytest.raises(ValueError, match="hidden_size"):
        hk.nn.HyperRNNCell(5, 0)
    with pytest.raises(ValueError, match=r"x: got shape \[3, 4\], wanted \[B, 5\]"):
        hk.nn.HyperRNNCell(5, 12)(torch.randn(3, 4))
