"""The claim: weights are never formed, so memory does not grow with them."""

from __future__ import annotations

import pytest
import torch
from conftest import can

import hyperkernels as hk
from hyperkernels.call import ORDERS
from hyperkernels.testing import peak_bytes

MIB = 2**20
N = K = 2048  # 16 MiB a weight in fp32


def arguments(device, contexts, additive, tokens):
    hidden = torch.randn(contexts, 128, 8, 16, device=device)
    head = torch.randn(16, 16, 256, device=device)
    x = torch.randn(contexts, tokens, K, device=device)
    leaves = [x, hidden, head]
    if additive:
        leaves[1:2] = [torch.randn(contexts, 16, device=device), hidden[0].clone()]
    for leaf in leaves:
        leaf.requires_grad_()
    return leaves


def run(leaves, backend, order=None):
    x, *hidden, head = leaves
    hidden = hk.AdditiveHidden(*hidden, "tanh") if len(hidden) == 2 else hidden[0]
    return hk.hyper_linear(x, hidden, head, order=order, backend=backend)


def bytes_of(tensors):
    return sum(v.numel() * v.element_size() for v in tensors)


@pytest.mark.parametrize("additive", [False, True], ids=["hidden", "additive"])
@pytest.mark.parametrize("order", [None, *ORDERS])
def test_a_context_per_entry_forms_no_weight(order, additive, engine):
    """Forward and backward, 32 contexts: 512 MiB of weights, against gradients and a workspace."""
    backend, device = engine
    leaves = arguments(device, 32, additive, 2)
    peak = peak_bytes(lambda: run(leaves, backend, order).sum().backward(), device)
    outputs = 3 * N * 32 * 2 * 4  # y, its expanded gradient and a product's output
    # The grid of blocks keeps to the workspace; at most one product's operand copy comes on top of it.
    assert peak <= bytes_of(leaves) + outputs + 64 * MIB
    assert peak < 512 * MIB / 3


def test_the_default_order_needs_less_than_one_weight(engine):
    backend, device = engine
    leaves = arguments(device, 32, True, 2)
    with torch.no_grad():
        assert peak_bytes(lambda: run(leaves, backend), device) < N * K * 4 / 2


def test_the_workspace_is_bounded_by_its_setting(engine):
    backend, device = engine
    leaves = arguments(device, 1, False, 1024)
    y_bytes = 1024 * N * 4
    with torch.no_grad():
        for order in ORDERS:
            peaks = {}
            for mib in (64, 2):
                hk.set_workspace_mib(mib)
                try:
                    peaks[mib] = peak_bytes(lambda order=order: run(leaves, backend, order), device) - y_bytes
                finally:
                    hk.set_workspace_mib(64)
                assert peaks[mib] <= 1.5 * mib * MIB
            assert peaks[2] < peaks[64] or peaks[64] <= 2 * MIB


def test_the_workspace_is_bounded_when_one_context_has_all_the_tokens(engine):
    """20,000 contexts, and every entry asks for the first."""
    backend, device = engine
    n = 20_000
    hidden = hk.AdditiveHidden(*(torch.randn(*s, device=device) for s in ((n, 16), (32, 8, 16))), "tanh")
    x, head = torch.randn(n, 512, device=device), torch.randn(16, 16, 64, device=device)
    ids = torch.zeros(n, dtype=torch.int64, device=device)
    peak = peak_bytes(lambda: hk.hyper_linear(x, hidden, head, context_ids=ids, backend=backend), device)
    indices, y = 5 * 8 * n, 4 * 512 * n
    assert peak <= y + indices + 64 * MIB


@pytest.mark.parametrize("order", ORDERS)
def test_per_chunk_heads_and_cropped_edges_keep_to_the_workspace(order, engine):
    backend, device = engine
    hidden = torch.randn(16, 16, 16, 8, device=device)
    head, x = torch.randn(256, 8, 64, 64, device=device), torch.randn(16, 64, 1000, device=device)
    if not can(backend, torch.float32, per_chunk_heads=True):
        with pytest.raises(ValueError, match="share one head"):
            hk.hyper_linear(x, hidden, head, out_features=1001, order=order, backend=backend)
        return
    with torch.no_grad():
        peak = peak_bytes(
            lambda: hk.hyper_linear(x, hidden, head, out_features=1001, order=order, backend=backend), device
        )
    y = 16 * 64 * 1024 * 4
    assert peak <= 2 * y + 64 * MIB
    assert peak < 16 * 1000 * 1001 * 4  # the weights


def test_the_reference_does_form_them(device):
    """The measurement can fail: the materialised call shows every weight."""
    x, hidden, head = arguments(device, 4, False, 2)
    with torch.no_grad():
        assert peak_bytes(lambda: hk.hyper_linear(x, hidden, head, backend="reference"), device) >= 4 * N * K * 4


def test_a_frozen_hypernetwork_saves_no_input(engine):
    """Only dx is wanted: backward keeps hidden and head, not x."""
    backend, device = engine
    x, hidden, head = arguments(device, 1, False, 256)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.shape) or v, lambda v: v):
        hk.hyper_linear(x, hidden.detach(), head.detach(), backend=backend)
    assert torch.Size([1, 256, K]) not in saved
    assert saved
