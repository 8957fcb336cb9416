"""The Reformer against transformers' Reformer, and the memory of its reversible layers."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, ReformerConfig, ReformerModelWithLMHead
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from memstudy.attention import lsh
from memstudy.huggingface.catalogue import hub_models
from memstudy.profiler import measure, predict
from memstudy.studies.reformer.model import ReformerLM, ReversibleConfig

PUBLISHED = {
    name: value
    for name, value in hub_models()["reformer-crime-and-punishment"].config.items()
    if name not in ("model_type", "architectures")
}
SMALL = PUBLISHED | {
    "attention_head_size": 8, "attn_layers": ["local", "lsh"], "axial_pos_embds_dim": [8, 24],
    "axial_pos_shape": [4, 8], "feed_forward_size": 48, "hidden_dropout_prob": 0.0, "hidden_size": 32,
    "local_attention_probs_dropout_prob": 0.0, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
    "max_position_embeddings": 64, "num_buckets": [2, 4], "num_hashes": 2, "vocab_size": 50,
}  # fmt: skip
TOKENS = torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(1))


def small(dtype=torch.float64, **changes) -> ReformerLM:
    """Two layers, with weights large enough that attention matters."""
    torch.manual_seed(0)
    model = ReformerLM(ReversibleConfig(**SMALL | changes))
    if dtype is not torch.float32:
        model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model


def gradients(model, tokens=TOKENS):
    """The loss, and the gradients of all parameters that have one."""
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def one_hash(monkeypatch):
    """Make every head of every layer hash with the same rotations, here and in transformers."""
    rotations = [torch.randn(2, size, 8, dtype=torch.float64) for size in (1, 2)]
    real = lsh.hash_buckets

    def theirs(self, vectors, num_hashes, attention_mask, increase_num_buckets=False):
        buckets = torch.stack([real(head, rotations) for head in vectors.unbind(1)], 1).long()
        return (buckets + 8 * torch.arange(num_hashes)[:, None]).flatten(2)

    monkeypatch.setattr(lsh, "hash_buckets", lambda vectors, _: real(vectors, rotations))
    monkeypatch.setattr(LSHSelfAttention, "_hash_vectors", theirs)


@pytest.mark.parametrize(("axial", "body"), [(True, 2_584_064), (False, 136_572_416)])
def test_parameters_are_those_of_transformers(axial, body):
    """The published 2.6 million parameters leave out the head's 164,160."""
    with torch.device("meta"):
        theirs = ReformerModelWithLMHead(ReformerConfig(**PUBLISHED | {"axial_pos_embds": axial}))
        ours = ReformerLM(ReversibleConfig(**PUBLISHED | {"axial_pos_embds": axial}))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert ours.reformer.num_parameters() == body
    assert ours.num_parameters() == body + 320 * 512 + 320


@pytest.mark.parametrize("chunk", [0, 8], ids=["whole", "chunks"])
@pytest.mark.parametrize("axial", [True, False], ids=["axial", "learned"])
def test_equals_transformers_with_its_weights_and_buckets(one_hash, axial, chunk):
    ours = small(axial_pos_embds=axial, chunk_size_feed_forward=chunk)
    theirs = ReformerModelWithLMHead(ReformerConfig(**SMALL | {"axial_pos_embds": axial})).double()
    theirs.load_state_dict(ours.state_dict())
    # Logits are compared in eval mode: in training, our model returns the loss only.
    torch.testing.assert_close(ours.eval()(TOKENS).logits, theirs.eval()(TOKENS, use_cache=False).logits)
    (loss, of_ours), (expected, of_theirs) = gradients(ours.train()), gradients(theirs.train())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(of_ours, of_theirs)


@pytest.mark.parametrize("exact", [False, True], ids=["reformer", "exact"])
@pytest.mark.parametrize("chunk", [0, 5], ids=["whole", "chunks"])
def test_reversible_layers_give_the_gradients_of_autograd(exact, chunk):
    changes = {"exact": exact, "hash_seed": 1, "chunk_size_feed_forward": chunk}
    if exact:
        changes["attn_layers"] = ["local", "local", "local"]
    forwards, backwards = (small(reversible=reversible, **changes) for reversible in (False, True))
    (expected, of_forwards), (loss, of_backwards) = gradients(forwards), gradients(backwards)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(of_backwards, of_forwards)


def test_exact_attention_is_local_attention_of_one_chunk():
    layers = ["local", "local"]
    exact = small(exact=True, attn_layers=layers)
    one_chunk = small(attn_layers=layers, local_attn_chunk_length=32)
    torch.testing.assert_close(exact.eval()(TOKENS).logits, one_chunk.eval()(TOKENS).logits)


def test_what_is_dropped_and_hashed_is_drawn_again_in_backward():
    """With all dropouts and new rotations, the loss changes along a random direction as the gradient says."""
    dropouts = ("hidden_dropout_prob", "local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob")
    model = small(**dict.fromkeys(dropouts, 0.3), axial_pos_embds=False, chunk_size_feed_forward=8)

    weights = torch.randn(2, 32, 50, dtype=torch.float64)

    def weighted():  # not the loss, which transformers computes in float32
        torch.manual_seed(3)
        return (model(TOKENS).logits * weights).sum()

    weighted().backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
    moved = []
    for step in (1e-7, -2e-7):
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=step)
        moved.append(weighted().detach())
    torch.testing.assert_close((moved[0] - moved[1]) / 2e-7, slope, rtol=1e-5, atol=0)


def test_the_same_seed_gives_the_same_step_and_other_draws_are_left_alone():
    model = small(hidden_dropout_prob=0.2)
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append((*gradients(model), torch.get_rng_state()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    deeper = small(hidden_dropout_prob=0.2, attn_layers=["local", "lsh"] * 2)
    torch.manual_seed(5)
    gradients(deeper)
    assert torch.equal(torch.get_rng_state(), states[0][2])


def kept_bytes(layers: int, **changes) -> int:
    """Bytes that autograd keeps between forward and backward, without the weights."""
    model, kept = small(attn_layers=["local", "lsh"] * (layers // 2), **changes), []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(TOKENS, labels=TOKENS)
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for at, size in storages.items() if at not in weights)


def test_reversible_layers_keep_nothing_that_grows_with_their_number():
    assert kept_bytes(2) == kept_bytes(4) == kept_bytes(12)
    assert kept_bytes(4, reversible=False) > kept_bytes(2, reversible=False) + 10 * TOKENS.numel() * 32 * 8


@pytest.mark.parametrize("frozen", ["embeddings", "layers"])
def test_what_is_frozen_gets_no_gradient_and_what_is_not_does(frozen):
    model, whole = small(hash_seed=1), small(hash_seed=1)
    part = model.reformer.embeddings if frozen == "embeddings" else model.reformer.encoder.layers[0]
    part.requires_grad_(False)
    (_, found), (_, expected) = gradients(model), gradients(whole)
    still = {name for name, p in model.named_parameters() if p.requires_grad and name in expected}
    assert found.keys() == still < expected.keys()
    torch.testing.assert_close(found, {name: expected[name] for name in still})


def test_gradients_add_up_and_hooks_see_each_once():
    model = small(hash_seed=1, chunk_size_feed_forward=8)
    _, once = gradients(model)
    seen = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    model(TOKENS, labels=TOKENS).loss.backward()
    assert sorted(seen) == sorted(once)
    twice = {name: p.grad for name, p in model.named_parameters() if name in once}
    torch.testing.assert_close(twice, {name: 2 * gradient for name, gradient in once.items()})


@pytest.mark.parametrize("follow", [measure, predict])
def test_activations_at_the_peak_do_not_grow_with_depth(follow):
    """Six more layers add only their parameters and gradients to the peak, to the byte."""

    def peak(layers):
        def build():
            model = small(torch.float32, attn_layers=["local", "lsh"] * (layers // 2), hidden_dropout_prob=0.1)

            def step():
                model.zero_grad(set_to_none=False)
                model(TOKENS, labels=TOKENS).loss.backward()

            return step

        report = follow(build, iterations=2)
        return report.peak_by_category["activations"], report.peak_by_category["temporary"]

    assert peak(8) == peak(2)


def test_padding_changes_nothing():
    model = small(hash_seed=1).eval()
    alone = model(TOKENS[:1, :24]).logits
    padded = torch.cat([TOKENS[:1, :24], torch.zeros(1, 8, dtype=torch.long)], 1)
    mask = torch.arange(32)[None] < torch.tensor([[24], [32]])
    both = model(torch.cat([padded, TOKENS[1:]]), attention_mask=mask.long()).logits
    torch.testing.assert_close(both[:1, :24], alone)


def test_lengths_that_are_no_whole_chunks_are_padded():
    model, mask = small(hash_seed=1).eval(), torch.arange(32).expand(2, -1) < 27
    torch.testing.assert_close(model(TOKENS[:, :27]).logits, model(TOKENS, attention_mask=mask).logits[:, :27])


def test_is_saved_loaded_and_generates(tmp_path):
    model = small(hash_seed=1, axial_pos_embds=False).float().eval()
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is ReformerLM
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    told = loaded.generate(TOKENS[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert told.shape == (2, 12)
    assert torch.equal(told[:, 8], model(TOKENS[:, :8]).logits[:, -1].argmax(-1))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: small(exact=True), "exact=True with attn_layers=.*take 'local' throughout"),
        (lambda: small(is_decoder=False), "is_decoder"),
        (lambda: small(lsh_num_chunks_before=2), "set lsh_ and local_num_chunks_before to 1"),
        (lambda: small()(TOKENS, use_cache=True), "set use_cache=False"),
        (lambda: small()(TOKENS, output_attentions=True), "leave them out"),
        (lambda: small()(TOKENS, num_hashes=4), "leave them out"),
    ],
)
def test_what_it_cannot_do_is_refused(act, message):
    with pytest.raises((ValueError, AssertionError), match=message):
        act()
