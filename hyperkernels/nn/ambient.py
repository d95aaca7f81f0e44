"""The ambient context: what every hyper layer inside a model is conditioned on, given once around the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import local
from typing import Any

from torch import Tensor

from hyperkernels.form import check_ids_are_whole
from hyperkernels.operators import check_context_ids
from hyperkernels.watched import transformed


class _Ambient(local):  # Dynamo traces a thread-local's attributes; it cannot trace a ContextVar
    z: Tensor | None = None
    context_ids: Tensor | None = None


_ambient = _Ambient()


def context(z: Tensor, context_ids: Tensor | None = None) -> AbstractContextManager[None]:
    """Condition every hyper layer called inside on `z`, unless the layer is called with a context of its own.

    Args:
        z: `[G, context_features]`, or `[context_features]` for one context.
        context_ids: as for `hyper_linear`: which context each leading entry of a layer's input uses.

    Nests (the inner one counts), and belongs to the thread that entered it. Static layers ignore it. What backward
    recomputes (gradient checkpointing) finds the context where `recompute_in_context` keeps it.

    Where `generate` searches with k beams, or returns k sequences, a model sees k entries for each request, one beside
    the other, and wants `context_ids=ids.repeat_interleave(k)`. An encoder sees each request once: run it before, with
    the ids as they are.

    Raises:
        TypeError: z is no floating tensor, or context_ids none of int32 or int64.
        ValueError: z has more than two dimensions, context_ids none, or an id is out of range.

    Example:
        >>> import torch, hyperkernels as hk
        >>> model = torch.nn.Sequential(hk.HyperLinear(6, 4, context_features=3), torch.nn.ReLU())
        >>> with hk.context(torch.randn(5, 3)):
        ...     model(torch.randn(5, 6)).shape
        torch.Size([5, 4])
    """
    z = check_context(z, "z")
    if context_ids is not None:
        check_ids_are_whole(context_ids)
        if not transformed():  # whoever traces cannot read them; the layers check them again
            check_context_ids(context_ids, z.shape[0])
    return _within(z, context_ids)


@contextmanager
def _within(z: Tensor, context_ids: Tensor | None) -> Iterator[None]:
    outer = current_context()
    _ambient.z, _ambient.context_ids = z, context_ids
    try:
        yield
    finally:
        _ambient.z, _ambient.context_ids = outer


class _Kept:
    """`context`, to be entered as often as wanted."""

    def __init__(self, z: Tensor, context_ids: Tensor | None) -> None:
        self.kept, self.entered = (z, context_ids), []

    def __enter__(self) -> None:
        self.entered.append(_within(*self.kept))
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)


def recompute_in_context() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`: what backward recomputes finds
    the context that was there in forward, in whatever thread.

    For a Hugging Face model: `model.activation_checkpointing_enable({"context_fn": hk.recompute_in_context,
    "use_reentrant": False})`, which older ones call `gradient_checkpointing_enable`.

    Example:
        >>> import torch, hyperkernels as hk
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer, x = hk.HyperLinear(6, 4, context_features=3), torch.randn(5, 6)
        >>> with hk.context(torch.randn(5, 3)):
        ...     y = checkpoint(layer, x, use_reentrant=False, context_fn=hk.recompute_in_context)
        >>> y.sum().backward()
    """
    z, context_ids = current_context()
    return nullcontext(), nullcontext() if z is None else _Kept(z, context_ids)


def current_context() -> tuple[Tensor | None, Tensor | None]:
    """The innermost `(z, context_ids)`, or `(None, None)`."""
    return _ambient.z, _ambient.context_ids


def find_context(context: Tensor | None, features: int | None) -> tuple[Tensor | None, Tensor | None]:
    """`(z [G, features], context_ids)` for a hypernetwork: the argument, else the ambient one; of a static one, which
    has no features, `(None, None)`."""
    context_ids = None
    if context is None and features is not None:
        context, context_ids = current_context()
        if context is None:
            raise ValueError(
                f"context: got none, wanted [G, {features}]: give context=z, or call inside "
                "`with hyperkernels.context(z):`; gradient checkpointing, which calls again in backward, finds it by "
                "context_fn=hyperkernels.recompute_in_context"
            )
    if context is None:
        return None, None
    if features is None:
        raise ValueError("context: this hypernetwork is static: build it with context_features to condition it")
    return check_context(context, "context", features), context_ids


def check_context(z: Tensor, name: str, features: int | None = None) -> Tensor:
    """z as `[G, context_features]`."""
    if not isinstance(z, Tensor) or not z.is_floating_point():
        got = z.dtype if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(f"{name}: got {got}, wanted a floating tensor [G, context_features]; ids go through an encoder")
    if z.dim() not in (1, 2) or (features is not None and z.shape[-1] != features):
        wanted = "context_features" if features is None else features
        raise ValueError(f"{name}: got shape {list(z.shape)}, wanted [G, {wanted}] or [{wanted}]")
    return z[None] if z.dim() == 1 else z
