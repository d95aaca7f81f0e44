"""What is saved comes back: state dicts, whole models, and `save_pretrained` of swapped Hugging Face models."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import hyperkernels as hk

tf = pytest.importorskip("transformers", reason="needs transformers")
safetensors = pytest.importorskip("safetensors.torch", reason="transformers saves by it")
pytest.importorskip("hyperkernels.huggingface")

tf.logging.set_verbosity_error()
IDS = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "replaced": hk.HyperConfig(width=4, chunk=(8, 8)),
    "one_head": hk.HyperConfig(width=4, share_head=True),
    "conditional": hk.HyperConfig(width=4, context_features=3, bias="generated"),
    "fitted": hk.HyperConfig(width=6, mode="fit", context_features=3),
    "residual": hk.HyperConfig(width=4, mode="residual", share_head=True, context_features=3),
    "low_rank": hk.HyperConfig(width=4, mode="residual", rank=2, context_features=3),
    "patterns": {r".*\.attn\..*": hk.HyperConfig(width=3), r".*c_fc": None, r".*": hk.HyperConfig(width=5)},
    "output_head": hk.HyperConfig(width=4, output_head=True),
    "residual_output_head": hk.HyperConfig(width=4, mode="residual", rank=2, output_head=True),
}


def gpt2(config=None):
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=97, bos_token_id=1, eos_token_id=2)
    )
    if config is not None:
        hk.hyperize_(model, config)
    with torch.no_grad():
        for parameter in model.parameters():  # what training would have done
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def logits(model):
    with torch.no_grad(), hk.context(torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.5, -0.5]])):
        return model(IDS).logits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_save_pretrained_and_from_pretrained(config, tmp_path):
    model = gpt2(config)
    model.save_pretrained(tmp_path)
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(found), logits(model))
    assert found.state_dict().keys() == model.state_dict().keys()
    found.save_pretrained(tmp_path / "again")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(logits(again), logits(model))
    for one, other in zip(model.parameters(), again.parameters()):  # as many: what was shared is
        assert one.shape == other.shape
        assert one.requires_grad == other.requires_grad


@pytest.mark.parametrize("config", [CONFIGS["replaced"], CONFIGS["one_head"]], ids=["replaced", "one_head"])
def test_a_model_that_is_wrapped_is_saved_too(config, tmp_path):
    """As Lightning's modules wrap one."""
    wrapper = nn.Module()
    wrapper.model = gpt2()
    hk.hyperize_(wrapper, config)
    wrapper.model.save_pretrained(tmp_path)
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(found), logits(wrapper.model))
    hk.merge_(wrapper)
    wrapper.model.save_pretrained(tmp_path / "merged")
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(found), rtol=1e-4, atol=1e-5)


def test_what_was_loaded_is_no_quantized_model_to_train(tmp_path):
    """Trainers refuse those; and once it is dense again, nothing of it is left."""
    gpt2(CONFIGS["replaced"]).save_pretrained(tmp_path)
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found.hf_quantizer.is_trainable
    assert found.hf_quantizer.is_qat_trainable
    hk.merge_(found)
    assert not getattr(found, "is_quantized", False)
    assert not hasattr(found, "hf_quantizer")


def test_a_head_shared_between_layers_is_saved_once_and_shared_again(tmp_path):
    model = gpt2(CONFIGS["one_head"])
    model.save_pretrained(tmp_path)
    assert sum(name.endswith(".head") for name in safetensors.load_file(tmp_path / "model.safetensors")) == 3
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    first, second = (block.attn.c_attn.head for block in found.transformer.h)
    assert first is second
    assert len(list(found.parameters())) == len(list(model.parameters()))


def test_into_the_model_without_its_head_and_back(tmp_path):
    model = gpt2(CONFIGS["output_head"])
    model.save_pretrained(tmp_path)
    base = tf.GPT2Model.from_pretrained(tmp_path).eval()
    wanted = model.transformer(IDS).last_hidden_state
    torch.testing.assert_close(base(IDS).last_hidden_state, wanted)
    base.save_pretrained(tmp_path / "base")
    found = tf.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    torch.testing.assert_close(found.transformer(IDS).last_hidden_state, wanted)


def test_sharded_in_half_precision_and_merged(tmp_path):
    model = gpt2(CONFIGS["replaced"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    hk.merge_(model).save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits(dense), logits(model))


ON_DISK = dict.fromkeys(("lm_head", *(f"transformer.{own}" for own in ("wte", "wpe", "ln_f", "h.0"))), "cpu")
ON_DISK["transformer.h.1"] = "disk"


@pytest.mark.parametrize("name", ["replaced", "fitted", "low_rank"])
def test_a_layer_that_stays_on_disk(name, tmp_path):
    model = gpt2(CONFIGS[name])
    model.save_pretrained(tmp_path)
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=ON_DISK, offload_folder=tmp_path / "there")
    assert all(parameter.is_meta for parameter in found.transformer.h[1].parameters())
    torch.testing.assert_close(logits(found.eval()), logits(model))


def test_a_layer_that_should_be_on_disk_and_is_not(tmp_path):
    gpt2(CONFIGS["replaced"]).save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.attn.c_attn.head"]
    safetensors.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the file has no transformer\.h\.1\.attn\.c_attn\.head"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=ON_DISK, offload_folder=tmp_path / "there")


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0)).eval()


@pytest.mark.parametrize("mode", ["replace", "fit", "residual"])
@pytest.mark.parametrize("build", [gpt2, t5])
def test_an_output_head_that_parted_from_the_embedding_stays_so(build, mode, tmp_path):
    """Swapped, merged, saved and loaded; given back, it is tied again."""
    model, inputs = build(), {"decoder_input_ids": IDS} if build is t5 else {}
    report = hk.hyperize_(model, {"lm_head": hk.HyperConfig(width=4, chunk=(8, 8), mode=mode, output_head=True)})
    assert model.get_input_embeddings().weight.requires_grad
    with torch.no_grad():
        for parameter in model.lm_head.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        wanted = model(IDS, **inputs).logits
        model.tie_weights()
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(IDS, **inputs).logits, wanted)
        for found in (loaded, hk.merge_(copy.deepcopy(model))):
            hk.merge_(found).tie_weights()
            torch.testing.assert_close(found(IDS, **inputs).logits, wanted)
            found.save_pretrained(tmp_path / "merged")
            again = type(model).from_pretrained(tmp_path / "merged").eval()
            torch.testing.assert_close(again(IDS, **inputs).logits, wanted)
    assert found.config.tie_word_embeddings == (build is t5)  # whose encoder and decoder have one embedding still
    report.restore()
    assert model.config.tie_word_embeddings
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "restored")
    again = type(model).from_pretrained(tmp_path / "restored")
    assert again.lm_head.weight is again.get_input_embeddings().weight


def damaged(tmp_path, change_config=None, change_file=None):
    gpt2(CONFIGS["replaced"]).save_pretrained(tmp_path)
    if change_config:
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        change_config(config["quantization_config"])
        path.write_text(json.dumps(config))
    if change_file:
        path = tmp_path / "model.safetensors"
        tensors = safetensors.load_file(path)
        change_file(tensors)
        safetensors.save_file(tensors, path, {"format": "pt"})
    return tf.AutoModelForCausalLM.from_pretrained(tmp_path)


LAYER = "transformer.h.0.attn.c_attn"
HEAD = f"{LAYER}.head"


@pytest.mark.parametrize(
    ("config", "file", "error", "match"),
    [
        (None, lambda t: t.pop(HEAD), ValueError, HEAD),
        (None, lambda t: t.update({HEAD: t[HEAD][:3].clone()}), ValueError, rf"wants {HEAD} of shape \[4, 8, 8\]"),
        (None, lambda t: t.update({f"{LAYER}.weight": t[HEAD].clone()}), ValueError, f"without {LAYER}.weight"),
        (lambda c: c["layers"].update({"nowhere": {"width": 4}}), None, ValueError, "nowhere"),
        (lambda c: c["layers"].update({"transformer.ln_f": {"width": 4}}), None, ValueError, "ln_f"),
        (lambda c: c["layers"][LAYER].update(width=5), None, ValueError, rf"wants {LAYER}\.\S+ of shape"),
        (lambda c: c["layers"][LAYER].update(bias=False), None, ValueError, f"without {LAYER}.bias"),
        (lambda c: c["layers"]["transformer.h.0.attn.c_attn"].update(wide=5), None, ValueError, "wide"),
        (lambda c: c["layers"].pop("transformer.h.0.attn.c_attn"), None, ValueError, "c_attn"),
    ],
    ids=[
        *("tensor_missing", "tensor_of_another_size", "tensor_extra", "no_such_layer", "no_such_kind", "width", "bias"),
        *("unknown", "not_named"),
    ],
)
def test_a_file_and_a_configuration_that_disagree(config, file, error, match, tmp_path):
    with pytest.raises(error, match=match):
        damaged(tmp_path, config, file)


def test_state_dicts_are_plain_tensors_and_strict(tmp_path):
    def build(width=4):
        return nn.Sequential(hk.HyperLinear(8, 6, width=width), hk.HyperLinear(6, 4, width=4, context_features=3))

    model, other = build(), build()
    state = model.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    torch.save(state, tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x, z = torch.randn(5, 8), torch.randn(3)
    with hk.context(z):
        assert torch.equal(other(x), model(x))
        torch.save(model, tmp_path / "model.pt")
        assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), model(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(width=5).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: value for name, value in state.items() if "head" not in name})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(state | {"0.weight": torch.ones(6, 8)})
