"""`HyperRNNCell` and `HyperLSTMCell`: a smaller cell generates their weights, for each sample and step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperkernels.chunking import check_sizes
from hyperkernels.form import autocast_enabled
from hyperkernels.nn.hypernet import HyperNet
from hyperkernels.nn.loading import LoadsWhole

State = tuple[Tensor, ...]


class HyperCell(LoadsWhole):
    """What the two have in common: a small cell that sees `[x, h]`, its z, and the gates' sums by generated weights."""

    GATES: int
    small: Any  # nn.RNNCell or nn.LSTMCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        hyper_size: int = 32,
        context_features: int = 8,
        generates: str = "weights",
        width: int = 16,
        chunk: tuple[int, int] | int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "hyper_size": hyper_size}
        check_sizes(**sizes, context_features=context_features, width=width)
        if generates == "rows" and chunk is not None:
            raise ValueError(f'chunk: got {chunk!r}, wanted None: it is of generates="weights"')
        if generates not in ("weights", "rows"):
            raise ValueError(f'generates: got {generates!r}, wanted "weights" or "rows"')
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input_size, self.hidden_size, self.generates = input_size, hidden_size, generates
        self.hyper_cell = self.small(input_size + hidden_size, hyper_size, **factory)
        self.context_layer = nn.Linear(hyper_size, context_features, **factory)
        rows = self.GATES * hidden_size
        shapes: dict[str, tuple[int, ...]] = {"x.weight": (rows, input_size), "h.weight": (rows, hidden_size)}
        if generates == "rows":
            self.weights = nn.ParameterDict({n[0]: torch.empty(shape, **factory) for n, shape in shapes.items()})
            for weight in self.weights.values():
                nn.init.uniform_(weight, -(hidden_size**-0.5), hidden_size**-0.5)
            self.scales = nn.Linear(context_features, 3 * rows, **factory)  # of both products' rows, and the bias
            nn.init.zeros_(self.scales.weight)
            with torch.no_grad():
                self.scales.bias.copy_(torch.cat([torch.ones(2 * rows), torch.zeros(rows)]))
        else:
            given: dict[str, Any] = {"width": width, "chunk": chunk, "nonlinearity": "linear"}
            self.hypernet = HyperNet(shapes, context_features=context_features, **given, **factory)
            self.bias = nn.Linear(context_features, rows, **factory)

    def start(self, x: Tensor) -> State:
        """The state before the first step: zeros."""
        return tuple(x.new_zeros(shape) for shape in self._shapes(x))

    def _shapes(self, x: Tensor) -> list[tuple[int, int]]:
        """Of the state's parts: h, of an LSTM c, and as many of the small cell's."""
        sizes = [self.hidden_size] * self.parts + [self.hyper_cell.hidden_size] * self.parts
        return [(len(x), size) for size in sizes]

    def _checked(self, x: Tensor, state: State | None) -> State:
        if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != self.input_size:
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: got {got}, wanted [B, {self.input_size}]")
        if x.dtype != self.context_layer.weight.dtype and not autocast_enabled(x.device.type):
            raise TypeError(f"x: got {x.dtype}, wanted the cell's dtype {self.context_layer.weight.dtype}")
        if state is None:
            return self.start(x)
        whole = isinstance(state, tuple) and all(isinstance(part, Tensor) for part in state)
        got = [tuple(part.shape) for part in state] if whole else type(state).__name__
        if got != self._shapes(x):
            raise ValueError(f"state: got {got}, wanted what the step before returned: tensors {self._shapes(x)}")
        return state

    @property
    def parts(self) -> int:
        """Of a cell's state: h, and of an LSTM's c."""
        return 2 if self.small is nn.LSTMCell else 1

    def _sums(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """`W_x(z) x + W_h(z) h + b(z)`, `[B, GATES * hidden_size]`, and the small cell's new state."""
        h, own = state[0], state[self.parts :]
        seen = torch.cat([x, h], 1)
        found = self.hyper_cell(seen, own if self.parts > 1 else own[0])
        own = found if isinstance(found, tuple) else (found,)
        z = self.context_layer(own[0])
        if self.generates == "rows":
            of_x, of_h, bias = self.scales(z).chunk(3, 1)
            return of_x * F.linear(x, self.weights["x"]) + of_h * F.linear(h, self.weights["h"]) + bias, own
        weights = self.hypernet(z)
        return F.linear(x, weights["x.weight"]) + F.linear(h, weights["h.weight"]) + self.bias(z), own

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, generates={self.generates}"


class HyperRNNCell(HyperCell):
    """`h' = tanh(W_x(z) x + W_h(z) h + b(z))`, where `z = A s` and s is the state of a small RNN cell that sees
    `[x, h]`: other weights for each sample, and at each step.

    Args:
        input_size, hidden_size: of x and of h.
        hyper_size: of the small cell's state.
        context_features: of z.
        generates: "weights", all of `W_x` and `W_h`, from a `HyperNet`; "rows", a factor for each row of weights that
            are learned, which is less, and what Ha et al. could afford.
        width, chunk: of the `HyperNet`.
        device, dtype: of the parameters.

    Call:
        `h, state = cell(x, state=None)`, x `[B, input_size]`; no state is zeros. It is a tuple of h and the small
        cell's state, of an LSTM of h, c and the small cell's two.

    Memory: for each sample and step what `hyper_linear` keeps: no weight, where weights of their own for B samples in T
    steps would be `B * T * hidden_size * (input_size + hidden_size)` numbers.

    Raises:
        TypeError, ValueError: a size below 1, an x or a state of another size or dtype, an unknown `generates`, or a
            chunk for "rows".

    Example:
        >>> import torch, hyperkernels as hk
        >>> cell, state = hk.nn.HyperRNNCell(5, 20), None
        >>> for x in torch.randn(7, 3, 5):  # seven steps of three samples
        ...     h, state = cell(x, state)
        >>> h.shape
        torch.Size([3, 20])

    Source: Ha, Dai and Le 2016 (HyperNetworks), section 3.2.
    """

    GATES = 1
    small = nn.RNNCell

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        sums, own = self._sums(x, self._checked(x, state))
        h = torch.tanh(sums)
        return h, (h, *own)


class HyperLSTMCell(HyperCell):
    """`c' = sigmoid(f) c + sigmoid(i) tanh(g)`, `h' = sigmoid(o) tanh(c')`, with `[i, f, g, o] = W_x(z) x + W_h(z) h +
    b(z)` and z of a small LSTM cell: as `HyperRNNCell`, with the state of an LSTM.

    Example:
        >>> import torch, hyperkernels as hk
        >>> cell, state = hk.nn.HyperLSTMCell(5, 20, generates="rows"), None
        >>> h, state = cell(torch.randn(3, 5), state)
        >>> h.shape
        torch.Size([3, 20])

    Source: Ha, Dai and Le 2016 (HyperNetworks), section 3.2 and appendix A.2.
    """

    GATES = 4
    small = nn.LSTMCell

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self._checked(x, state)
        sums, own = self._sums(x, state)
        i, f, g, o = sums.chunk(4, 1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c, *own)
