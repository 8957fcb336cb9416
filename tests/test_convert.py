"""Converted Hugging Face models: small, random, nothing downloaded."""

import copy
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers

from memstudy.attention import AttentionConfig, SoftmaxConfig, WindowConfig
from memstudy.convert import convert_attention

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {**SMALL, "intermediate_size": 64, "max_position_embeddings": 40}
CONFIGS = {
    "bert": transformers.BertConfig(**ENCODER),
    "roberta": transformers.RobertaConfig(**ENCODER, pad_token_id=1),
    "distilbert": transformers.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "gpt2": transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=64),
}
SOFTMAX = [SoftmaxConfig("sdpa"), SoftmaxConfig("eager")]
every_model = pytest.mark.parametrize("name", CONFIGS)
decoders = pytest.mark.parametrize("name", ["gpt2", "llama"])
both = pytest.mark.parametrize("config", SOFTMAX, ids=["sdpa", "eager"])


def _model(name, **changes):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    for key, value in changes.items():
        setattr(config, key, value)
    if name in ("gpt2", "llama"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = transformers.AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():  # weights large enough that attention matters
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model.eval()


def _converted(name, config, **changes):
    return convert_attention(_model(name, **changes), config)


def _batch(padding_side="right"):
    torch.manual_seed(1)
    input_ids = torch.randint(2, 50, (2, 17))
    mask = torch.ones_like(input_ids)
    mask[1, 11:] = 0
    if padding_side == "left":
        mask = mask.flip(1)
    return {"input_ids": input_ids, "attention_mask": mask}


@every_model
@both
@pytest.mark.parametrize("side", ["right", "left"])
def test_exact_attention_gives_the_native_logits(name, config, side):
    batch = _batch(side)
    real = batch["attention_mask"].bool()
    native, ours = _model(name)(**batch).logits, _converted(name, config)(**batch).logits
    torch.testing.assert_close(ours[real], native[real], rtol=0, atol=1e-5)
    native = _model(name)(batch["input_ids"]).logits
    torch.testing.assert_close(_converted(name, config)(batch["input_ids"]).logits, native, rtol=0, atol=1e-5)


@every_model
def test_a_long_window_is_exact_and_a_short_one_is_not(name):
    batch = _batch()
    real = batch["attention_mask"].bool()
    native = _model(name)(**batch).logits[real]
    long, short = (_converted(name, WindowConfig(w))(**batch).logits[real] for w in (40, 3))
    torch.testing.assert_close(long, native, rtol=0, atol=1e-5)
    assert (short - native).abs().max() > 1e-2


@decoders
@pytest.mark.parametrize("config", [*SOFTMAX, WindowConfig(4)], ids=["sdpa", "eager", "window"])
def test_decoders_stay_causal(name, config):
    model, input_ids = _converted(name, config), _batch()["input_ids"]
    changed = input_ids.clone()
    changed[:, 10:] = 1
    torch.testing.assert_close(model(changed).logits[:, :10], model(input_ids).logits[:, :10], rtol=0, atol=1e-6)


@decoders
@both
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_generate_equals_the_native_model(name, config, padded):
    batch = _batch("left") if padded else {"input_ids": _batch()["input_ids"]}
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    native, ours = _model(name), _converted(name, config)
    tokens = native.generate(**batch, **options)
    assert torch.equal(ours.generate(**batch, **options), tokens)
    assert torch.equal(
        ours.generate(**batch, **options, num_beams=2),
        native.generate(**batch, **options, num_beams=2),
    )


@decoders
def test_windowed_decoding_with_a_cache_equals_without(name):
    model, batch = _converted(name, WindowConfig(4)), _batch("left")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


@decoders
def test_several_tokens_after_a_cache_equal_all_at_once(name):
    model, input_ids = _converted(name, WindowConfig(4)), _batch()["input_ids"]
    first = model(input_ids[:, :9], use_cache=True)
    second = model(input_ids[:, 9:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, model(input_ids).logits[:, 9:], rtol=0, atol=1e-5)


def _gradients(model, batch, *, checkpointing=False):
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    torch.manual_seed(2)  # dropout
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_model
@pytest.mark.parametrize("config", [SoftmaxConfig(), WindowConfig(4)], ids=["softmax", "window"])
def test_checkpointing_changes_no_gradient(name, config):
    batch = _batch()
    plain = _gradients(_converted(name, config), batch)
    checkpointed = _gradients(_converted(name, config), batch, checkpointing=True)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5)


@decoders
def test_dropout_is_passed_on(name):
    dropout = {"attn_pdrop": 0.5} if name == "gpt2" else {"attention_dropout": 0.5}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    model = _converted(name, SoftmaxConfig(), **dropout, **off).train()
    input_ids = _batch()["input_ids"]
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.eval()
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)


@every_model
def test_attn_implementation_reads_the_saved_settings(name, tmp_path):
    model, batch = _converted(name, WindowConfig(4)), _batch()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["memstudy_attention"] == WindowConfig(4).settings()
    again = type(model).from_pretrained(tmp_path, attn_implementation="memstudy_window").eval()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="settings for 'window'"):
        type(model).from_pretrained(tmp_path, attn_implementation="memstudy_softmax")(**batch)


def test_without_settings_the_defaults_hold():
    model, batch = _model("gpt2"), _batch()
    native = model(**batch).logits[0]
    model.set_attn_implementation("memstudy_window")
    torch.testing.assert_close(model(**batch).logits[0], native, rtol=0, atol=1e-5)


def test_converting_again_changes_the_variant():
    model, batch = _converted("llama", WindowConfig(2)), _batch()
    convert_attention(model, SoftmaxConfig())
    torch.testing.assert_close(model(**batch).logits[0], _model("llama")(**batch).logits[0], rtol=0, atol=1e-5)


def test_what_cannot_be_converted_is_refused():
    @dataclass(frozen=True)
    class WithWeights(AttentionConfig):
        name: ClassVar[str] = "with_weights"
        parameter_free: ClassVar[bool] = False

    with pytest.raises(ValueError, match="with_weights has weights of its own"):
        convert_attention(_model("bert"), WithWeights())
    reformer = transformers.ReformerModel(
        transformers.ReformerConfig(hidden_size=32, num_attention_heads=2, attn_layers=["local"], axial_pos_embds=False)
    )
    with pytest.raises(ValueError, match="ReformerModel doesn't dispatch"):
        convert_attention(reformer, SoftmaxConfig())


def test_what_the_variant_cannot_do_is_refused():
    model, input_ids = _converted("llama", SoftmaxConfig()), _batch()["input_ids"]
    with pytest.raises(ValueError, match="shape \\(2, 1, 17, 17\\)"):
        model(input_ids, attention_mask=torch.zeros(2, 1, 17, 17))
    packed = torch.cat([torch.arange(9), torch.arange(8)])[None].expand(2, -1)
    with pytest.raises(ValueError, match="packed sequences"):
        model(input_ids, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="DynamicCache"):
        model.generate(input_ids, max_new_tokens=4, cache_implementation="static")
    mistral = transformers.MistralConfig(**SMALL, intermediate_size=64, sliding_window=8)
    mistral = convert_attention(transformers.AutoModelForCausalLM.from_config(mistral), SoftmaxConfig())
    with pytest.raises(ValueError, match="own window"):
        mistral(input_ids)
