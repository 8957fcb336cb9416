"""The decoder: the size in the specification, Hugging Face's contracts, its attention."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from memstudy.attention import SoftmaxConfig, WindowConfig
from memstudy.huggingface.decoder import DecoderLM, decoder

MIXERS = [SoftmaxConfig("eager"), SoftmaxConfig("sdpa"), WindowConfig(8)]
every_mixer = pytest.mark.parametrize("mixer", MIXERS, ids=["eager", "sdpa", "window"])


def small(mixer=MIXERS[0], **changes):
    """A decoder of two layers, with weights large enough that attention matters."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "n_layers": 2, "hidden_size": 32, "n_heads": 4, "feed_forward": 64, "max_len": 48}
    model = decoder(**(sizes | changes), attention=mixer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model.eval()


@pytest.fixture
def tokens():
    """Two sequences of 40 tokens."""
    return torch.randint(100, (2, 40), generator=torch.Generator().manual_seed(1))


def loss_of(logits, labels):
    """Mean negative log-likelihood of the next tokens, computed one by one."""
    terms = [
        -torch.log_softmax(logits[row, i], -1)[labels[row, i + 1]]
        for row in range(labels.shape[0])
        for i in range(labels.shape[1] - 1)
        if labels[row, i + 1] != -100
    ]
    return torch.stack(terms).mean()


def test_the_specs_model_has_its_parameters():
    with torch.device("meta"):
        model = decoder(
            vocab_size=10_000,
            n_layers=6,
            hidden_size=512,
            n_heads=8,
            feed_forward=2048,
            max_len=512,
            attention=SoftmaxConfig("eager"),
        )
    block = 4 * (512 * 512 + 512) + 2 * (2 * 512) + (512 * 2048 + 2048) + (2048 * 512 + 512)
    # token embedding (also the head), positions, blocks, last norm
    assert 10_000 * 512 + 512 * 512 + 6 * block + 2 * 512 == 24_297_472
    assert sum(p.numel() for p in model.parameters()) == 24_297_472


@every_mixer
def test_forward(mixer, tokens):
    model = small(mixer)
    with torch.no_grad():
        output = model(tokens)
        assert output.logits.shape == (2, 40, 100)
        assert output.loss is None
        output = model(input_ids=tokens, labels=tokens, attention_mask=torch.ones_like(tokens))
    torch.testing.assert_close(output.loss, loss_of(output.logits, tokens))
    torch.testing.assert_close(output.logits, model(tokens).logits)


def test_labels_of_minus_100_do_not_count(tokens):
    model, labels = small(), tokens.clone()
    labels[:, :25] = -100
    labels[1, 30] = -100
    output = model(tokens, labels=labels)
    torch.testing.assert_close(output.loss, loss_of(output.logits, labels))


def test_in_training_the_output_is_the_loss_only(tokens):
    model = small()
    expected = model(tokens, labels=tokens).loss
    model.train()
    output = model(tokens, labels=tokens)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=0)  # the model has no dropout
    assert model(tokens).logits.shape == (2, 40, 100)


@every_mixer
def test_padding_on_either_side_changes_nothing(mixer, tokens):
    model, mask = small(mixer), torch.ones_like(tokens)
    mask[:, 30:] = 0
    other = torch.where(mask.bool(), tokens, 7)
    with torch.no_grad():
        alone = model(tokens[:, :30]).logits
        padded = model(other, attention_mask=mask).logits
        left = {"attention_mask": mask.flip(1), "position_ids": (mask.flip(1).cumsum(1) - 1).clamp(min=0)}
        rolled = model(other.roll(10, 1), **left).logits
    torch.testing.assert_close(padded[:, :30], alone)
    torch.testing.assert_close(rolled[:, 10:], alone)


@every_mixer
def test_no_token_sees_the_future(mixer, tokens):
    model = small(mixer)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    (gradient,) = torch.autograd.grad(logits[:, :20].sum(), embedded)
    assert gradient[:, 20:].abs().max() == 0
    assert gradient[:, :20].abs().min() > 0


def test_a_window_reaches_as_far_as_its_layers(tokens):
    """Token 39 sees 7 tokens back in each of two layers, 14 in all."""
    model = small(WindowConfig(8))
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embedded).logits[:, 39].sum(), embedded)
    assert gradient[:, : 39 - 14].abs().max() == 0
    assert gradient[:, 39 - 14 :].abs().amax(-1).min() > 0


def test_a_window_as_long_as_the_sequence_is_softmax(tokens):
    exact, longest, shorter = small(MIXERS[0]), small(WindowConfig(40)), small(WindowConfig(39))
    with torch.no_grad():
        expected = exact(tokens).logits
        torch.testing.assert_close(longest(tokens).logits, expected)
        assert not torch.allclose(shorter(tokens).logits[:, -1], expected[:, -1])


@every_mixer
def test_generating_with_a_cache_gives_the_same(mixer, tokens):
    model = small(mixer)
    assert model.generation_config.use_cache
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = tokens[:, :12]
    cached = model.generate(prompt, **options)
    assert cached.shape == (2, 32)
    assert torch.equal(cached, model.generate(prompt, **options, use_cache=False))
    step_by_step = prompt
    for _ in range(20):
        best = model(step_by_step).logits[:, -1:].argmax(-1)
        step_by_step = torch.cat([step_by_step, best], 1)
    assert torch.equal(cached, step_by_step)


def test_training_keeps_no_cache(tokens):
    assert small()(tokens).past_key_values is None


@every_mixer
def test_saved_and_loaded_it_is_the_same(mixer, tokens, tmp_path):
    model = small(mixer)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["memstudy_attention"] == mixer.settings()
    weights = load_file(tmp_path / "model.safetensors")
    assert sum(w.numel() for w in weights.values()) == sum(p.numel() for p in model.parameters())
    for load in (DecoderLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path)
        assert isinstance(loaded, DecoderLM)
        assert not loaded.training
        assert loaded.config.memstudy_attention == mixer.settings()
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.generation_config.use_cache


def test_a_loaded_window_is_still_a_window(tokens, tmp_path):
    model = small(WindowConfig(8))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert not torch.allclose(loaded(tokens).logits, small(MIXERS[0])(tokens).logits)


@every_mixer
def test_gradient_checkpointing_gives_the_same_gradients(mixer, tokens):
    plain = small(mixer).train()
    recomputed = copy.deepcopy(plain)
    recomputed.activation_checkpointing_enable({"use_reentrant": False})
    assert recomputed.is_activation_checkpointing
    for model in (plain, recomputed):
        model(tokens, labels=tokens).loss.backward()
    for (name, expected), actual in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert expected.grad.abs().max() > 0, name
        assert torch.equal(actual.grad, expected.grad), name


def test_the_seed_alone_decides_the_weights():
    first, again = small().state_dict(), small().state_dict()
    torch.manual_seed(1)
    other = decoder(
        vocab_size=100, n_layers=2, hidden_size=32, n_heads=4, feed_forward=64, max_len=48, attention=MIXERS[0]
    ).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_a_sequence_longer_than_the_model_is_refused(tokens):
    with pytest.raises((ValueError, IndexError)):
        small(max_len=32)(tokens)
