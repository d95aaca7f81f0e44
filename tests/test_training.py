"""What trains models, around hyper layers: autocast, checkpointing, compilation, several processes, trainers."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperkernels as hk

tf = pytest.importorskip("transformers", reason="needs transformers")
tf.logging.set_verbosity_error()
IDS = torch.randint(97, (4, 7), generator=torch.Generator().manual_seed(0))


def gpt2(**config):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 97}
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, **DROPOUT))
    hk.hyperize_(model, hk.HyperConfig(width=4, **config))
    return model


DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_autocast():
    model = gpt2()
    wanted = model(IDS, labels=IDS).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IDS, labels=IDS)
    assert out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.loss.float(), wanted, rtol=2e-2, atol=0)
    for mixed, full in zip(gradients(model, out.loss), gradients(model, wanted)):
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed, full, rtol=0, atol=0.06 * full.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Backward runs outside of the context, and finds it; of the old kind, inside."""
    model = gpt2(context_features=3).train()
    z, ids = torch.randn(2, 3), torch.tensor([1, 0, 0, 1])
    with hk.context(z, context_ids=ids):
        wanted = gradients(model, model(IDS, labels=IDS).loss)
    given = {"use_reentrant": True} if reentrant else {"context_fn": hk.recompute_in_context, "use_reentrant": False}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(given)
    with hk.context(z, context_ids=ids):
        loss = model(IDS, labels=IDS).loss
        found = gradients(model, loss) if reentrant else None
    for got, want in zip(found or gradients(model, loss), wanted):
        torch.testing.assert_close(got, want)


def test_what_is_recomputed_again_finds_its_context_again():
    layer, x, z = hk.HyperLinear(6, 4, context_features=3), torch.randn(5, 6, requires_grad=True), torch.randn(5, 3)
    from torch.utils.checkpoint import checkpoint

    with hk.context(z):
        y = checkpoint(layer, x, use_reentrant=False, context_fn=hk.recompute_in_context)
    with hk.context(torch.zeros(5, 3)):  # another by now
        first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, torch.autograd.grad(layer(x, z).sum(), x)[0])
    assert torch.equal(first, second)


def test_a_whole_model_compiled_in_one_graph():
    model = gpt2(context_features=3).eval()
    compiled = torch.compile(model, fullgraph=True)
    with hk.context(torch.randn(3)):
        logits, wanted = compiled(IDS).logits, model(IDS).logits
        torch.testing.assert_close(logits, wanted)
        for got, want in zip(*(gradients(model, value.square().mean()) for value in (logits, wanted))):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def one_of_two(rank, port, folder):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = nn.parallel.DistributedDataParallel(gpt2(context_features=3, share_head=True))
    own = slice(2 * rank, 2 * rank + 2)
    with hk.context(torch.load(folder / "z.pt")[own]):
        model(IDS[own], labels=IDS[own]).loss.backward()
    torch.save([parameter.grad for parameter in model.parameters()], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    z = torch.randn(4, 3)
    torch.save(z, tmp_path / "z.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, tmp_path), nprocs=2)
    model = gpt2(context_features=3, share_head=True)
    with hk.context(z):
        wanted = gradients(model, model(IDS, labels=IDS).loss)
    for rank in range(2):
        for got, want in zip(torch.load(tmp_path / f"{rank}.pt"), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def task():
    """A network to learn `y = sign(z) x`, whose weight must follow the context."""
    torch.manual_seed(0)
    x, z = torch.randn(512, 8), torch.randn(512, 2).sign()
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    hk.hyperize_(model, hk.HyperConfig(width=16, context_features=2))
    return model, torch.utils.data.TensorDataset(x, z, x * z[:, :1])


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model, data = task()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, 64))
    for _ in range(60):
        for x, z, y in loader:
            with hk.context(z):
                loss = F.mse_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 0.05
    saved = copy.deepcopy(accelerator.unwrap_model(model).state_dict())
    assert saved.keys() == task()[0].state_dict().keys()


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    class Learner(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = task()[0]

        def training_step(self, batch, _):
            x, z, y = batch
            with hk.context(z):
                self.loss = F.mse_loss(self.model(x), y)
            return self.loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    learner, quiet = Learner(), {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=60, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(learner, torch.utils.data.DataLoader(task()[1], 64))
    assert learner.loss < 0.05
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Learner.load_from_checkpoint(tmp_path / "last.ckpt")
    for one, other in zip(learner.parameters(), again.parameters()):
        assert torch.equal(one, other)
