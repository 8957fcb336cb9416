"""Converted Hugging Face models, small and with random weights; nothing is downloaded."""

import copy
import json
from dataclasses import dataclass
from typing import ClassVar

import peft
import pytest
import safetensors.torch
import torch
import transformers

from memstudy.attention import (
    AttentionConfig,
    LinformerConfig,
    LowRankConfig,
    LSHConfig,
    MemSizerConfig,
    NystromConfig,
    PerformerConfig,
    SoftmaxConfig,
    WindowConfig,
)
from memstudy.huggingface.convert import convert_attention, load_converted, save_converted
from memstudy.huggingface.decoder import decoder
from memstudy.huggingface.families import known_attentions

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {**SMALL, "intermediate_size": 64, "max_position_embeddings": 40}
CONFIGS = {
    "bert": transformers.BertConfig(**ENCODER),
    "roberta": transformers.RobertaConfig(**ENCODER, pad_token_id=1),
    "distilbert": transformers.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "gpt2": transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=64),
}
SIDES = ("encoder", "decoder")
SEQ2SEQ = {
    "bart": transformers.BartConfig(
        vocab_size=50, d_model=32, max_position_embeddings=40, eos_token_id=2,
        **{f"{side}_{name}": n for side in SIDES for name, n in
           {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()},
    ),
    "t5": transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
}  # fmt: skip
ALL = CONFIGS | SEQ2SEQ
SOFTMAX = [SoftmaxConfig("sdpa"), SoftmaxConfig("eager")]
every_model = pytest.mark.parametrize("name", CONFIGS)
decoders = pytest.mark.parametrize("name", ["gpt2", "llama"])
encoders = pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
seq2seq = pytest.mark.parametrize("name", SEQ2SEQ)
each_family = pytest.mark.parametrize("name", ALL)
both = pytest.mark.parametrize("config", SOFTMAX, ids=["sdpa", "eager"])


def _model(name, **changes):
    torch.manual_seed(0)
    config = copy.deepcopy(ALL[name])
    for key, value in changes.items():
        setattr(config, key, value)
    if name in ("gpt2", "llama"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    elif name in SEQ2SEQ:
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    else:
        model = transformers.AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():  # weights large enough that attention matters; T5's already are
        for parameter in model.parameters():
            if parameter.dim() > 1 and name != "t5":
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


def _batch_for(name, padding_side="right"):
    """A `_batch`; for an encoder-decoder with decoder tokens, fewer and padded in the second sequence."""
    batch = _batch(padding_side)
    if name in SEQ2SEQ:
        mask = (torch.arange(9) < torch.tensor([[9], [6]])).long()
        batch |= {"decoder_input_ids": torch.randint(2, 50, (2, 9)), "decoder_attention_mask": mask}
    return batch


def _real_logits(model, batch):
    return model(**batch).logits[batch.get("decoder_attention_mask", batch["attention_mask"]).bool()]


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
@pytest.mark.parametrize(
    "config", [*SOFTMAX, WindowConfig(4), PerformerConfig(8)], ids=["sdpa", "eager", "window", "performer"]
)
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
@pytest.mark.parametrize("config", [WindowConfig(4), PerformerConfig(8)], ids=["window", "performer"])
def test_several_tokens_after_a_cache_equal_all_at_once(name, config):
    model, input_ids = _converted(name, config), _batch()["input_ids"]
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


@seq2seq
@both
@pytest.mark.parametrize("side", ["right", "left"])
def test_exact_attention_gives_the_native_logits_of_encoder_and_decoder(name, config, side):
    batch = _batch_for(name, side)
    native, ours = (_real_logits(model, batch) for model in (_model(name), _converted(name, config)))
    torch.testing.assert_close(ours, native, rtol=0, atol=1e-5)
    full = {key: value for key, value in batch.items() if "mask" not in key}
    torch.testing.assert_close(_converted(name, config)(**full).logits, _model(name)(**full).logits, rtol=0, atol=1e-5)


@seq2seq
@both
def test_encoder_and_decoder_generate_as_the_native_model(name, config):
    batch = _batch()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "forced_eos_token_id": None}
    native, ours = _model(name), _converted(name, config)
    for beams in (1, 2):
        tokens = native.generate(**batch, **options, num_beams=beams)
        assert torch.equal(ours.generate(**batch, **options, num_beams=beams), tokens)


@seq2seq
@pytest.mark.parametrize("checkpointing", [False, True])
def test_encoder_and_decoder_get_the_native_gradients(name, checkpointing):
    """Including the gradient of T5's score bias."""
    off = {"dropout": 0.0} if name == "bart" else {"dropout_rate": 0.0}
    batch = _batch()
    native = _gradients(_model(name, **off), batch)
    ours = _gradients(_converted(name, SoftmaxConfig(), **off), batch, checkpointing=checkpointing)
    torch.testing.assert_close(ours, native, rtol=1e-3, atol=1e-5)


@decoders
def test_hashed_decoding_goes_without_a_cache_and_says_so(name):
    """LSH uses the queries as keys, so the native key projection gets no gradient."""
    model, input_ids = _converted(name, LSHConfig(2, 4, 4, hash_seed=0)), _batch()["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert model.generate(input_ids, **options, use_cache=False).shape == (2, 21)
    with pytest.raises(ValueError, match="generate with use_cache=False"):
        model.generate(input_ids, **options)
    gradients = _gradients(model, {"input_ids": input_ids})
    keys = [g for name, g in gradients.items() if "k_proj.weight" in name]
    assert all(gradient.abs().max() == 0 for gradient in keys)


def test_a_variant_for_two_sequences_is_put_between_them_too():
    native, ours = _model("bart"), _converted("bart", PerformerConfig(8))
    query, memory = torch.randn(2, 4, 32), torch.randn(2, 17, 32)
    difference = [m.get_decoder().layers[0].encoder_attn(query, memory)[0] for m in (native, ours)]
    assert not torch.allclose(*difference, atol=1e-3)
    batch = _batch_for("bart")
    assert _real_logits(ours, batch).isfinite().all()


def test_attention_to_another_sequence_stays_exact():
    batch = _batch_for("bart")
    native = _real_logits(_model("bart"), batch)
    long, short = (_real_logits(_converted("bart", WindowConfig(w)), batch) for w in (40, 3))
    torch.testing.assert_close(long, native, rtol=0, atol=1e-5)
    assert (short - native).abs().max() > 1e-2
    ours = _converted("bart", WindowConfig(3)).get_decoder().layers[0].encoder_attn
    exact = _model("bart").get_decoder().layers[0].encoder_attn
    query, memory = torch.randn(2, 4, 32), torch.randn(2, 17, 32)
    torch.testing.assert_close(ours(query, memory)[0], exact(query, memory)[0])


@encoders
@pytest.mark.parametrize(
    "config",
    [LinformerConfig(6, 40), NystromConfig(4), LSHConfig(2, 4, 4, hash_seed=0), PerformerConfig(8)],
    ids=lambda config: config.name,
)
def test_encoders_ignore_padding_under_every_variant(name, config):
    model, batch = _converted(name, config, attention_probs_dropout_prob=0.0), _batch()
    logits = model(**batch).logits
    assert (logits - _model(name)(**batch).logits)[batch["attention_mask"].bool()].abs().max() > 1e-2
    alone = model(batch["input_ids"][1:, :11]).logits
    torch.testing.assert_close(logits[1:, :11], alone, rtol=0, atol=1e-4)


@encoders
@pytest.mark.parametrize("config", [LinformerConfig(17, 17), NystromConfig(17)], ids=["linformer", "nystrom"])
def test_encoders_limits_are_the_native_model(name, config):
    model, input_ids = _converted(name, config), _batch()["input_ids"]
    for parameter_name, parameter in model.named_parameters():
        if "memstudy" in parameter_name:
            torch.nn.init.eye_(parameter)
    torch.testing.assert_close(model(input_ids).logits, _model(name)(input_ids).logits, rtol=0, atol=1e-5)


def test_a_seed_makes_the_variants_weights_and_leaves_the_rest_alone():
    def weights(seed):
        model = convert_attention(_model("bert"), LinformerConfig(4, 40), seed=seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "memstudy" in name])

    torch.testing.assert_close(weights(1), weights(1), rtol=0, atol=0)
    assert not torch.equal(weights(1), weights(2))
    assert weights(1).unique().numel() == 2 * 2 * 4 * 40  # the two layers differ
    model, state = _model("bert"), torch.get_rng_state()
    convert_attention(model, LinformerConfig(4, 40))
    assert torch.equal(torch.get_rng_state(), state)
    half = convert_attention(_model("bert").bfloat16(), LinformerConfig(4, 40))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("config", [LinformerConfig(6, 40), NystromConfig(4)], ids=["linformer", "nystrom"])
def test_barts_encoder_alone(config):
    native, model, batch = _model("bart"), _model("bart"), _batch_for("bart")
    convert_attention(model.get_encoder(), config)
    assert (_real_logits(model, batch) - _real_logits(native, batch)).abs().max() > 1e-2
    memory = transformers.modeling_outputs.BaseModelOutput(torch.randn(2, 17, 32))
    batch["encoder_outputs"] = memory
    torch.testing.assert_close(_real_logits(model, batch), _real_logits(native, batch))  # the decoder is unchanged
    assert model.config._attn_implementation == native.config._attn_implementation
    assert not hasattr(model.config, "memstudy_attention")
    model.generate(_batch()["input_ids"], max_new_tokens=4)
    with pytest.raises(ValueError, match="not converted as a whole"):
        save_converted(model, "never_made")


@each_family
def test_projections_of_full_rank_give_the_native_logits_and_of_less_do_not(name):
    batch = _batch_for(name)
    native, model = _real_logits(_model(name), batch), _converted(name, LowRankConfig(32))
    assert model.config._attn_implementation == _model(name).config._attn_implementation
    torch.testing.assert_close(_real_logits(model, batch), native, rtol=1e-4, atol=1e-4)
    for parts in ("qkvo", "q", "v", "o"):
        less = _real_logits(_converted(name, LowRankConfig(4, parts)), batch)
        assert (less - native).abs().max() > 1e-3


@each_family
def test_only_the_parts_asked_for_are_replaced(name):
    width, attentions = 32, {"bart": 6, "t5": 6}.get(name, 2)
    native, config = _model(name), LowRankConfig(4, "qo")
    before, after = (sum(p.numel() for p in m.parameters()) for m in (native, convert_attention(_model(name), config)))
    assert before - after == attentions * 2 * (width * width - 4 * 2 * width)


@each_family
def test_projections_of_low_rank_learn(name):
    batch = _batch()
    gradients = _gradients(_converted(name, LowRankConfig(3)), batch)
    factors = [gradient for name, gradient in gradients.items() if gradient.dim() == 2 and 3 in gradient.shape]
    assert len(factors) == {"bart": 6, "t5": 6}.get(name, 2) * 8
    assert all(gradient.abs().max() > 0 for gradient in factors)


ROUND_TRIPS = [
    ("bert", LinformerConfig(6, 40)), ("distilbert", NystromConfig(4)), ("roberta", LowRankConfig(4)),
    ("gpt2", LowRankConfig(4)), ("llama", WindowConfig(4)), ("llama", PerformerConfig(8)),
    ("gpt2", LSHConfig(2, 4, 4, hash_seed=0)), ("bart", WindowConfig(4)), ("t5", LowRankConfig(4)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config"), ROUND_TRIPS, ids=lambda value: getattr(value, "name", value))
def test_what_is_saved_is_loaded(name, config, tmp_path):
    """GPT-2, BART and T5 have tied weights."""
    model, batch = convert_attention(_model(name), config, seed=7), _batch_for(name)
    save_converted(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["memstudy_attention"] == config.settings()
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = load_converted(tmp_path, type(model))
    assert again.config.memstudy_attention == config.settings()
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    if model.config.tie_word_embeddings:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("config", [LowRankConfig(4), WindowConfig(4)], ids=["lowrank", "window"])
def test_our_own_decoder_is_saved_and_loaded(config, tmp_path):
    sizes = {"vocab_size": 50, "n_layers": 2, "hidden_size": 32, "n_heads": 4, "feed_forward": 64, "max_len": 64}
    model, batch = decoder(**sizes, attention=config).eval(), _batch()
    save_converted(model.bfloat16(), tmp_path)
    again = load_converted(tmp_path, type(model))
    assert again.dtype == torch.bfloat16
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_a_variant_that_is_not_known_is_not_loaded(tmp_path):
    model = _converted("bert", WindowConfig(4))
    model.config.memstudy_attention = {"variant": "windows", "window": 4}
    save_converted(model, tmp_path)
    with pytest.raises(ValueError, match=r"config.json: unknown variant 'windows'; known are softmax, window"):
        load_converted(tmp_path, type(model))


def test_generation_settings_are_saved_too(tmp_path):
    model = _converted("gpt2", WindowConfig(4))
    model.generation_config.max_new_tokens = 3
    save_converted(model, tmp_path)
    assert load_converted(tmp_path, type(model)).generation_config.max_new_tokens == 3


def test_a_plain_from_pretrained_loses_what_the_variant_added(tmp_path):
    save_converted(_converted("bert", LinformerConfig(6, 40)), tmp_path)
    plain = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    assert not any("memstudy" in name for name in plain.state_dict())
    with pytest.raises(ValueError, match="linformer has weights of its own, which this model lacks; call"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path, attn_implementation="memstudy_linformer")(**_batch())


def test_what_does_not_fit_is_not_loaded(tmp_path):
    model = _converted("bert", LinformerConfig(6, 40))
    with pytest.raises(ValueError, match="BertForMaskedLM is not converted as a whole; convert it"):
        save_converted(_model("bert"), tmp_path)
    _model("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config.json has no memstudy_attention.*use from_pretrained"):
        load_converted(tmp_path, type(model))

    save_converted(model, tmp_path)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    key = "bert.encoder.layer.0.attention.self.memstudy.key"
    for wrong, message in (
        ({k: v for k, v in weights.items() if k != key}, f"missing \\['{key}'\\], unexpected \\[\\]"),
        (weights | {"more": torch.ones(1)}, r"missing \[\], unexpected \['more'\]"),
        (weights | {key: torch.ones(6, 39)}, "doesn't fit BertForMaskedLM.*size mismatch"),
    ):
        safetensors.torch.save_file(wrong, path)
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_converted(tmp_path, type(model))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors can't be read .*save the model again"):
        load_converted(tmp_path, type(model))
    path.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors can't be read .*No such file"):
        load_converted(tmp_path, type(model))


# peft asks by the name that transformers 5 deprecates (peft/peft_model.py).
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_learn_on_a_converted_model():
    model = _converted("bert", LinformerConfig(6, 40))
    lora = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    model, batch = peft.get_peft_model(model, lora).train(), _batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    updates = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    updates.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora" in name}
    assert any("memstudy" in name for name in before)


def test_trainer_trains_the_variants_weights(tmp_path):
    model = _converted("bert", LinformerConfig(6, 40))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "memstudy" in name}
    ids = _batch()["input_ids"]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, learning_rate=0.1, report_to=[], disable_tqdm=True, use_cpu=True
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    assert len(before) == 4
    for name, weight in before.items():
        assert (model.get_parameter(name) - weight).abs().max() > 1e-3


def test_converting_again_drops_the_weights_of_the_variant_before():
    model, batch = _converted("bert", LinformerConfig(6, 40)), _batch()
    convert_attention(model, LinformerConfig(3, 40))
    assert {len(p) for name, p in model.named_parameters() if "memstudy" in name} == {3}
    convert_attention(model, SoftmaxConfig())
    assert not any("memstudy" in name for name in model.state_dict())
    torch.testing.assert_close(model(**batch).logits[0], _model("bert")(**batch).logits[0], rtol=0, atol=1e-5)


def test_a_config_that_several_models_share_is_left_alone():
    config = copy.deepcopy(CONFIGS["bert"])
    one, other = (transformers.BertForMaskedLM(config) for _ in range(2))
    convert_attention(one, WindowConfig(4))
    assert other.config is config
    assert not hasattr(config, "memstudy_attention")
    assert one.config is one.bert.config is one.bert.encoder.layer[0].attention.self.config


def test_what_cannot_be_converted_is_refused():
    @dataclass(frozen=True)
    class NoQueries(AttentionConfig):
        name: ClassVar[str] = "no_queries"
        parameter_free: ClassVar[bool] = False

    with pytest.raises(ValueError, match="memsizer has no queries and keys, so no trained weight has a place"):
        convert_attention(_model("bert"), MemSizerConfig())
    with pytest.raises(ValueError, match=r"no_queries has no queries and keys.*take one of \[.*'softmax'"):
        convert_attention(_model("bert"), NoQueries())
    reformer = transformers.ReformerModel(
        transformers.ReformerConfig(hidden_size=32, num_attention_heads=2, attn_layers=["local"], axial_pos_embds=False)
    )
    with pytest.raises(ValueError, match="ReformerModel doesn't dispatch"):
        convert_attention(reformer, SoftmaxConfig())


@pytest.mark.parametrize("config", [LinformerConfig(6, 40), NystromConfig(4)], ids=["linformer", "nystrom"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_decoders_are_refused_what_is_not_causal(name, config):
    model = _model(name)
    with pytest.raises(ValueError, match=rf"Attention: {config.name} .*is_causal=True.*model.get_encoder\(\)"):
        convert_attention(model, config)
    assert not hasattr(model.config, "memstudy_attention")


@pytest.mark.parametrize(
    "config",
    [WindowConfig(4), LinformerConfig(), NystromConfig(), LSHConfig(), PerformerConfig()],
    ids=lambda c: c.name,
)
def test_t5s_bias_is_refused_where_it_cannot_be_added(config):
    with pytest.raises(ValueError, match=rf"T5Attention adds a bias.*{config.name} doesn't do.*'softmax', 'lowrank'"):
        convert_attention(_model("t5"), config)
    model = _model("t5")
    model.set_attn_implementation("memstudy_window")
    with pytest.raises(ValueError, match="T5Attention passes position_bias, which memstudy_window doesn't do"):
        model(**_batch_for("t5"))


@pytest.mark.parametrize("config", [LinformerConfig(), LowRankConfig()], ids=["linformer", "lowrank"])
def test_models_whose_projections_are_not_known_are_refused(config):
    vit = transformers.ViTModel(
        transformers.ViTConfig(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(
        ValueError, match=r"the attention projections of ViT\w*Attention are .*known are those of BertAttention"
    ):
        convert_attention(vit, config)
    both = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)
    with pytest.raises(ValueError, match=r"linformer is bidirectional|the attention projections of GPT2Attention"):
        convert_attention(transformers.GPT2LMHeadModel(both), config)


def test_projections_that_are_not_as_they_were_trained_are_refused():
    model = _converted("gpt2", LowRankConfig(4))
    with pytest.raises(ValueError, match=r"GPT2Attention.c_attn is a _Fused, not a linear layer.*not twice"):
        convert_attention(model, LowRankConfig(2))
    with pytest.raises(ValueError, match="converted to lowrank already, and softmax doesn't go with it"):
        convert_attention(model, SoftmaxConfig())
    with pytest.raises(ValueError, match="converted to window already, and lowrank doesn't go with it"):
        convert_attention(_converted("gpt2", WindowConfig(4)), LowRankConfig(4))
    model = _model("gpt2")
    model.set_attn_implementation("memstudy_window")
    with pytest.raises(ValueError, match="converted to memstudy_window already, and lowrank"):
        convert_attention(model, LowRankConfig(4))


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("bert", "attention_probs_dropout_prob"),
        ("roberta", "attention_probs_dropout_prob"),
        ("distilbert", "attention_dropout"),
    ],
)
def test_dropout_that_a_variant_cannot_do_is_refused_by_the_options_name(name, option):
    batch = _batch()
    model = _converted(name, NystromConfig(4), **{option: 0.1}).train()
    with pytest.raises(ValueError, match=rf"nystrom has no weights to drop.*make the model with {option}=0.0"):
        model(**batch)
    _converted(name, NystromConfig(4), **{option: 0.0}).train()(**batch)


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


@pytest.mark.parametrize("layers", [[1], [0], [1, 0], []], ids=str)
@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_only_the_layers_asked_for_are_converted_saved_and_loaded(name, layers, tmp_path):
    model = convert_attention(_model(name), LowRankConfig(4), layers=layers)
    width, batch = 32, _batch_for(name)
    whole = sum(p.numel() for p in _model(name).parameters())
    if name != "llama":  # llama's keys and values are narrower
        assert whole - sum(p.numel() for p in model.parameters()) == len(layers) * 4 * (width**2 - 4 * 2 * width)
    attentions = [attention for attention, _ in known_attentions(model)]
    factored = [any(4 in p.shape for p in attention.parameters()) for attention in attentions]
    assert factored == [layer in layers for layer in range(2)]
    assert model.config.memstudy_attention == {"variant": "lowrank", "rank": 4, "parts": "qkvo", "layers": layers}
    save_converted(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["memstudy_attention"]["layers"] == layers
    again = load_converted(tmp_path, type(model))
    assert again.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=0, atol=0)


def test_layers_left_alone_give_what_they_gave():
    """Only the second layer is factored: the states before it equal the unconverted model's."""
    batch = _batch() | {"output_hidden_states": True}
    native = _model("bert")(**batch).hidden_states
    states = convert_attention(_model("bert"), LowRankConfig(4), layers=[1])(**batch).hidden_states
    torch.testing.assert_close(states[1], native[1], rtol=0, atol=0)
    assert (states[2] - native[2]).abs().max() > 1e-3


def test_all_layers_by_number_are_all_layers():
    by_number = convert_attention(_model("bert"), LowRankConfig(4), layers=range(2)).state_dict()
    torch.testing.assert_close(by_number, _converted("bert", LowRankConfig(4)).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("layers", [[2], [0, 7], [-1]], ids=str)
def test_layers_that_the_model_does_not_have_are_refused_and_nothing_is_changed(layers):
    model = _model("bert")
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=rf"layers=\[.*{layers[-1]}\]: the model has 2 attentions, counted from 0"):
        convert_attention(model, LowRankConfig(4), layers=layers)
    assert model.state_dict().keys() == before
    assert not hasattr(model.config, "memstudy_attention")


@pytest.mark.parametrize("config", [SoftmaxConfig(), WindowConfig(4), LinformerConfig(6, 40)], ids=lambda c: c.name)
def test_a_variant_that_replaces_no_projections_is_refused_some_layers_alone(config):
    model = _model("bert")
    with pytest.raises(ValueError, match=rf"layers=\[1\]: {config.name} converts all layers of a model or none"):
        convert_attention(model, config, layers=[1])
    assert not hasattr(model.config, "memstudy_attention")


def test_a_layer_asked_for_twice_is_refused():
    with pytest.raises(ValueError, match="Sequential, not a linear layer"):
        convert_attention(_model("bert"), LowRankConfig(4), layers=[1, 1])
