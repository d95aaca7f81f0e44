"""Models that nobody rewrote, from transformers' configs: swapped, run, trained, generating, merged back."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import hyperkernels as hk

tf = pytest.importorskip("transformers", reason="needs transformers")

tf.logging.set_verbosity_error()
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
LM = {"vocab_size": 97, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32)}


def tokens(**more):
    return {"input_ids": torch.randint(3, 97, (2, 7)), **more}


def model(name):
    """Its name, the model, its inputs, and how many of its layers are to be swapped."""
    torch.manual_seed(0)
    if name == "gpt2":
        config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **LM)
        return SimpleNamespace(model=tf.GPT2LMHeadModel(config), inputs=tokens(), layers=8)
    if name == "llama":
        config = tf.LlamaConfig(**SMALL, **LM, num_key_value_heads=1)
        return SimpleNamespace(model=tf.LlamaForCausalLM(config), inputs=tokens(), layers=14)
    if name == "bert":
        return SimpleNamespace(model=tf.BertForMaskedLM(tf.BertConfig(**SMALL, **LM)), inputs=tokens(), layers=13)
    if name == "t5":
        config = tf.T5Config(
            vocab_size=97, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        inputs = tokens(decoder_input_ids=torch.randint(3, 97, (2, 5)))
        return SimpleNamespace(model=tf.T5ForConditionalGeneration(config), inputs=inputs, layers=32)
    if name == "vit":
        config = tf.ViTConfig(**SMALL, image_size=32, patch_size=8)
        return SimpleNamespace(model=tf.ViTForImageClassification(config), inputs=IMAGES, layers=14)
    if name == "resnet":
        config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        return SimpleNamespace(model=tf.ResNetForImageClassification(config), inputs=IMAGES, layers=7)
    config = tf.MixtralConfig(**SMALL, **LM, num_key_value_heads=1, num_local_experts=3)
    return SimpleNamespace(model=tf.MixtralForCausalLM(config), inputs=tokens(), layers=8)


NAMES = ("gpt2", "llama", "bert", "t5", "vit", "resnet", "mixtral")


def generated(case, **given):
    return case.model.generate(case.inputs["input_ids"], max_new_tokens=6, do_sample=False, **given)


@pytest.mark.parametrize("name", NAMES)
def test_swapped_run_trained_and_merged(name):
    case = model(name)
    case.model.eval()
    before = {name: type(layer) for name, layer in case.model.named_modules()}
    dense = case.model(**case.inputs).logits
    dense.square().sum().backward()
    case.model.zero_grad()
    if case.model.can_generate():
        assert torch.equal(generated(case), generated(case, use_cache=False))
    report = hk.hyperize_(case.model, hk.HyperConfig(width=4))
    assert len(report.swapped) == case.layers
    logits = case.model(**case.inputs).logits
    assert logits.shape == dense.shape
    assert not torch.allclose(logits, dense, atol=1e-3)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in case.model.parameters())
    found = generated(case) if case.model.can_generate() else None
    if found is not None:
        assert torch.equal(found, generated(case, use_cache=False))
    hk.merge_(case.model)
    assert {name: type(layer) for name, layer in case.model.named_modules()} == before
    torch.testing.assert_close(case.model(**case.inputs).logits, logits)
    if found is not None:
        assert torch.equal(generated(case), found)


@pytest.mark.parametrize("name", NAMES)
def test_fitted_in_full_it_is_the_same_model(name):
    case = model(name)
    dense = case.model.eval()(**case.inputs).logits
    report = hk.hyperize_(case.model, hk.HyperConfig(chunk=(4, 4), width=150, mode="fit"))
    assert max(layer.error for layer in report.swapped) < 1e-5
    torch.testing.assert_close(case.model(**case.inputs).logits, dense, rtol=1e-3, atol=1e-5)
    report.restore()
    assert torch.equal(case.model(**case.inputs).logits, dense)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_each_entrys_own(name, rank):
    case = model(name)
    dense = case.model.eval()(**case.inputs).logits
    hk.hyperize_(case.model, hk.HyperConfig(width=4, mode="residual", rank=rank, context_features=3))
    with hk.context(torch.randn(2, 3)):
        assert torch.equal(case.model(**case.inputs).logits, dense)
    learning = {n for n, p in case.model.named_parameters() if p.requires_grad}
    assert all(".change." in n for n in learning if n.endswith(".head"))
    assert not any(n.endswith((".base.weight", ".base.bias")) for n in learning)
    with torch.no_grad():
        for parameter in (p for n, p in case.model.named_parameters() if ".change." in n):
            parameter.add_(0.1 * torch.randn_like(parameter))
    z = torch.randn(2, 3)
    with hk.context(z):
        both = case.model(**case.inputs).logits
    for n in range(2):
        with hk.context(z[n]):
            own = case.model(**{k: v[n : n + 1] for k, v in case.inputs.items()}).logits
        torch.testing.assert_close(both[n : n + 1], own, rtol=1e-3, atol=1e-4)
    hk.merge_(case.model, z[1])
    torch.testing.assert_close(case.model(**case.inputs).logits[1], both[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_mixed_requests_give_token_for_token_what_separate_models_give(name):
    case = model(name)
    hk.hyperize_(case.model.eval(), hk.HyperConfig(width=8, context_features=4))
    z, which = torch.randn(3, 4), torch.tensor([2, 0, 2, 1, 0])
    ids = torch.randint(3, 97, (5, 6))
    with hk.context(z, context_ids=which):
        mixed = case.model.generate(ids, max_new_tokens=8, do_sample=False)
    for n, task in enumerate(which):
        with hk.context(z[task]):
            hk.merge_(separate := copy.deepcopy(case.model))
        assert torch.equal(separate.generate(ids[n : n + 1], max_new_tokens=8, do_sample=False)[0], mixed[n])
    assert len({tuple(row[6:].tolist()) for row in mixed}) > 1


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_beams_of_mixed_requests(name):
    """Each request's beams use its context; ids that are too few are said to be so, and what to do."""
    case = model(name)
    hk.hyperize_(case.model.eval(), hk.HyperConfig(width=8, context_features=4))
    z, which, ids = torch.randn(3, 4), torch.tensor([2, 0]), torch.randint(3, 97, (2, 6))
    given = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with hk.context(z, which):
        with torch.no_grad():  # generate repeats what an encoder made, in place
            own = {"encoder_outputs": case.model.get_encoder()(ids)} if name == "t5" else {}
        with pytest.raises(ValueError, match=r"x has 6 entries, 3 for each of 2.*context_ids\.repeat_interleave\(3\)"):
            case.model.generate(ids, **given, **copy.deepcopy(own))
    with hk.context(z, which.repeat_interleave(3)):
        found = case.model.generate(ids, **given, **own)
    for n, task in enumerate(which):
        with hk.context(z[task]):
            wanted = case.model.generate(ids[n : n + 1], **given)
        assert torch.equal(found[2 * n : 2 * n + 2, : wanted.shape[1]], wanted)


def test_what_is_left_alone_unless_asked_for():
    case = model("llama")
    report = hk.hyperize_(case.model, hk.HyperConfig(width=4), dry_run=True)
    assert report.skipped == {"lm_head": "it is the output head: HyperConfig(output_head=True) swaps it"}
    case = model("mixtral")
    skipped = hk.hyperize_(case.model, hk.HyperConfig(width=4), dry_run=True).skipped
    assert "MixtralExperts" in skipped["model.layers.0.mlp.experts"]
    case = model("gpt2")
    report = hk.hyperize_(case.model, hk.HyperConfig(width=4), dry_run=True)
    assert report.skipped == {"lm_head": "its weight is shared with transformer.wte.weight"}
    hk.hyperize_(case.model, {"lm_head": hk.HyperConfig(width=4, output_head=True)})
    assert isinstance(case.model.lm_head, hk.HyperLinear)
    case.model.tie_weights()  # they have parted
    assert isinstance(case.model.lm_head, hk.HyperLinear)
    assert case.model(**case.inputs).logits.shape == (2, 7, 97)
