"""The encoder-decoder: equal to Marian with exact attention, and MemSizer's properties in each place."""

import itertools

import pytest
import torch
from support.tiers import slow_but
from transformers import AutoModelForSeq2SeqLM, MarianConfig, MarianMTModel

from memstudy.studies.memsizer.encoder_decoder import PLACES, Seq2SeqLM
from memstudy.studies.memsizer.run import Seq2SeqRun
from memstudy.studies.memsizer.seq2seq import decode

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYWHERE = {"encoder": {"slots": 8}, "decoder": {"slots": 4}, "cross": {"slots": 8}}
CHOICES = [
    {place: EVERYWHERE[place] for place in chosen} for n in range(4) for chosen in itertools.combinations(PLACES, n)
]
PAIRS = [chosen for chosen in CHOICES if len(chosen) in (0, 2)]  # no MemSizer, or MemSizer in any two places
every_choice = pytest.mark.parametrize(
    "memsizer", slow_but(PAIRS, CHOICES), ids=lambda chosen: "+".join(chosen) or "exact"
)


def small(memsizer, **changes):
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "hidden_size": 32, "n_heads": 4, "feed_forward": 64, "seq_len": 200, "target_len": 9}
    given = sizes | {"vocab_size": 50, "dropout": 0.0, "batch_size": 2, "measure_steps": 1} | changes
    model = Seq2SeqRun(experiment="small", memsizer=memsizer, **given).make_model().double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query_proj" in name or "q_proj" in name:  # makes attention far from uniform
                parameter.mul_(4.0)
    return model


@pytest.fixture
def tokens():
    """Padded sources of 17 and 11 tokens; targets of 9 tokens each."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(2, 50, (2, 17), generator=generator)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[1, 11:] = 0
    return {"input_ids": source.masked_fill(mask == 0, 0), "attention_mask": mask}, torch.randint(
        2, 50, (2, 9), generator=generator
    )


def test_exact_everywhere_is_marian(tokens):
    inputs, target = tokens
    ours = small({})
    theirs = MarianMTModel._from_config(MarianConfig(**ours.config.to_dict()), attn_implementation="eager").double()
    theirs.load_state_dict(ours.state_dict())
    wanted = theirs.eval()(**inputs, decoder_input_ids=target).logits
    torch.testing.assert_close(ours(**inputs, decoder_input_ids=target).logits, wanted)


@every_choice
def test_incremental_equals_full(memsizer, tokens):
    inputs, target = tokens
    model = small(memsizer)
    with torch.no_grad():
        full = model(**inputs, decoder_input_ids=target).logits
        encoded, cache, steps = model.get_encoder()(**inputs), None, []
        for part in (target[:, :3], *target[:, 3:].split(1, 1)):  # a prompt of three, then token by token
            output = model(
                encoder_outputs=encoded,
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=part,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full)


@every_choice
def test_padding_changes_nothing(memsizer, tokens):
    inputs, target = tokens
    model = small(memsizer)
    with torch.no_grad():
        both = model(**inputs, decoder_input_ids=target, use_cache=False).logits[1]
        alone = model(inputs["input_ids"][1:, :11], decoder_input_ids=target[1:], use_cache=False).logits[0]
        padded = torch.cat([target, torch.zeros_like(target)], 1)
        mask = (padded > 0).long()
        longer = model(**inputs, decoder_input_ids=padded, decoder_attention_mask=mask, use_cache=False).logits[1, :9]
    torch.testing.assert_close(both, alone)
    torch.testing.assert_close(both, longer)


@every_choice
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_a_state_is_generation_without(memsizer, num_beams, tokens):
    inputs, _ = tokens
    model = small(memsizer)
    options = {"max_new_tokens": 12, "num_beams": num_beams, "do_sample": False}
    with_state, without = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert with_state.tolist() == without.tolist()
    assert len({tuple(row) for row in with_state.tolist()}) == 2  # the two sources give different targets


def test_every_gradient_is_finite_and_reaches_every_weight(tokens):
    inputs, target = tokens
    for memsizer in CHOICES:
        model = small(memsizer).train()
        model(**inputs, labels=target).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name


def test_the_state_has_one_size_whatever_the_length():
    source = torch.randint(2, 50, (3, 40))
    with torch.no_grad():
        held = {n: decode(small(EVERYWHERE, seq_len=300), source, n) for n in (10, 100, 200)}
        exact = {n: decode(small({}, seq_len=300), source, n) for n in (10, 100, 200)}
    # Two layers in float64: sum and count over the decoder's tokens, and the summary of the encoder's tokens.
    assert set(held.values()) == {2 * 3 * (8 * 4 * 32 + 8 + 8 * 8 * 32)}
    assert exact == {n: 2 * 2 * 3 * 32 * 8 * (n + 40) for n in exact}  # keys and values


def test_beams_take_their_state_with_them():
    model, source = small(EVERYWHERE), torch.randint(2, 50, (4, 12))
    order = torch.tensor([2, 2, 0, 3])
    with torch.no_grad():
        encoded = model.get_encoder()(source)
        first = torch.randint(2, 50, (4, 1))
        cache = model(encoder_outputs=encoded, decoder_input_ids=first, use_cache=True).past_key_values
        cache.reorder_cache(order)
        encoded.last_hidden_state = encoded.last_hidden_state[order]
        token = torch.randint(2, 50, (4, 1))
        reordered = model(encoder_outputs=encoded, decoder_input_ids=token, past_key_values=cache, use_cache=True)
        both = torch.cat([first[order], token], 1)
        wanted = model(source[order], decoder_input_ids=both).logits[:, 1:]
    torch.testing.assert_close(reordered.logits, wanted)


def test_separate_vocabularies():
    model = small(EVERYWHERE, vocab_size=30, target_vocab_size=13)
    assert model.model.encoder.embed_tokens.weight.shape == (30, 32)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    output = model(torch.randint(2, 30, (2, 5)), decoder_input_ids=torch.randint(2, 13, (2, 4)))
    assert output.logits.shape == (2, 4, 13)


@every_choice
def test_saved_and_loaded(memsizer, tokens, tmp_path):
    inputs, target = tokens
    model = small(memsizer).float()
    model.save_pretrained(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".json"] == [".safetensors"]
    for family in (Seq2SeqLM, AutoModelForSeq2SeqLM):
        loaded = family.from_pretrained(tmp_path)
        assert isinstance(loaded, Seq2SeqLM)
        with torch.no_grad():
            wanted = model(**inputs, decoder_input_ids=target).logits
            torch.testing.assert_close(loaded(**inputs, decoder_input_ids=target).logits, wanted)


def test_what_memsizer_saves_in_parameters():
    """In each place, Φ, W_l, W_r and two norms replace four projections."""
    hidden, heads, slots = 32, 4, 8
    four = 4 * (hidden**2 + hidden)
    memory = (hidden + 1) * (heads * slots + slots + hidden) + 2 * (slots + hidden)
    sizes = {
        chosen: sum(p.numel() for p in small({place: {"slots": slots} for place in chosen}).parameters())
        for chosen in ((), *((place,) for place in PLACES), PLACES)
    }
    for place in PLACES:
        assert sizes[()] - sizes[place,] == 2 * (four - memory)
    assert sizes[()] - sizes[PLACES] == 3 * 2 * (four - memory)


def test_bad_choices():
    with pytest.raises(ValueError, match=r"unknown place 'self'; known: encoder, decoder, cross"):
        small({"self": {}})
    model = small(EVERYWHERE)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with pytest.raises(ValueError, match="decodes without padding"):
        model(
            torch.randint(2, 50, (2, 5)),
            decoder_input_ids=torch.randint(2, 50, (2, 3)),
            decoder_attention_mask=mask,
            use_cache=True,
        )
