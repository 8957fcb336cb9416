"""Every variant of `ATTENTION` against one contract; then each variant's own properties."""

import copy
import itertools
from functools import partial

import pytest
import torch
import transformers
from support import naive
from support.tiers import slow_but
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from memstudy.attention import (
    ATTENTION,
    LinformerConfig,
    LowRankConfig,
    LSHConfig,
    MemSizerConfig,
    NystromConfig,
    PerformerConfig,
    SelfAttention,
    SoftmaxConfig,
    Unavailable,
    WindowConfig,
    linformer_attention,
    low_rank,
    lsh,
    memsizer,
    nystrom_attention,
    performer,
    softmax_attention,
    window,
    window_attention,
)

CONFIGS = [
    SoftmaxConfig("eager"),
    SoftmaxConfig("sdpa"),
    SoftmaxConfig(recompute=True),
    WindowConfig(4),
    WindowConfig(1),
    WindowConfig(16),
    WindowConfig(64),
    WindowConfig(4, chunked=True),
    WindowConfig(16, chunked=True),
    LinformerConfig(5, 64),
    LowRankConfig(6),
    LowRankConfig(3, "qv"),
    NystromConfig(4),
    NystromConfig(16, 3),
    LSHConfig(2, 8, 4, hash_seed=0),
    LSHConfig(1, 4, 32, hash_seed=0),
    LSHConfig(3, 64, hash_seed=0),
    MemSizerConfig(4),
    MemSizerConfig(8),
    PerformerConfig(10),
    PerformerConfig(3, seed=1),
]
LAYERS_ONLY = [SoftmaxConfig(recompute=True), MemSizerConfig(4), MemSizerConfig(8)]
LENGTHS = (1, 7, 16, 33)
SHAPES = list(itertools.product(LENGTHS, (False, True)))  # (length, whether some tokens are padding)


def _id(config):
    return "-".join(str(value) for value in config.settings().values())


def _cases(configs, quick=None):
    """Each config in each of its directions; marked slow unless it is among ``quick``."""
    for config in configs:
        for is_causal in config.causal:
            direction = "causal" if is_causal else "bidirectional"
            marks = [pytest.mark.slow] if quick is not None and config not in quick else []
            yield pytest.param(config, is_causal, id=f"{_id(config)}-{direction}", marks=marks)


# Configs for tests of the op; tests of the layer use all.
OPS = [config for config in CONFIGS if config not in LAYERS_ONLY]
ops = pytest.mark.parametrize(("config", "is_causal"), list(_cases(OPS)))
FIRST = list({config.name: config for config in reversed(OPS)}.values())  # one of each variant
layers = pytest.mark.parametrize(("config", "is_causal"), list(_cases(CONFIGS)))
causal_ops = pytest.mark.parametrize("config", [config for config in OPS if True in config.causal], ids=_id)
# Configs that answer one query from the keys of earlier tokens.
DECODERS = [config for config in OPS if True in config.causal and config.name != "lsh"]
decoders = pytest.mark.parametrize("config", DECODERS, ids=_id)
# Configs whose state is a fixed number of the last keys.
KEEPERS = [c for c in DECODERS if c.name != "performer" and not getattr(c, "chunked", False)]
keepers = pytest.mark.parametrize("config", KEEPERS, ids=_id)
# Configs whose layer is the op between projections.
AROUND_OPS = [config for config in CONFIGS if config.name != "memsizer"]
around_ops = pytest.mark.parametrize(("config", "is_causal"), list(_cases(AROUND_OPS)))
# Dropped weights show in the output if it is weights times values, not weights times mixtures of values.
DROPPABLE = [config for config in OPS if config.drops_weights]
dropout_ops = pytest.mark.parametrize(("config", "is_causal"), list(_cases(DROPPABLE)))
PLAIN = [c for c in DROPPABLE if c.make_weights(4) is None and getattr(c, "num_hashes", 1) == 1]
plain_dropout_ops = pytest.mark.parametrize(("config", "is_causal"), list(_cases(PLAIN)))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let even short sequences span several blocks."""
    monkeypatch.setattr(window.blocks, "QUERY_BLOCK", 5)
    monkeypatch.setattr(window.layer, "SEGMENT", 7)
    for module in (memsizer, performer):
        monkeypatch.setattr(module, "CHUNK", 2)
        monkeypatch.setattr(module, "SEGMENT", 5)
    torch.manual_seed(0)


def _qkv(batch=2, heads=2, seq=16, head_dim=4, *, kv_heads=None, key_len=None, dtype=torch.float64):
    """Three leaves with the memory layout (batch, seq, heads, head_dim), as made by projections."""
    shapes = [(heads, seq)] + 2 * [(kv_heads or heads, key_len or seq)]
    return [torch.randn(batch, n, h, head_dim, dtype=dtype).transpose(1, 2).requires_grad_() for h, n in shapes]


def _padding(seq):
    """First sequence: padding in the middle and at the end; second: padding in the first half."""
    mask = torch.ones(2, seq, dtype=torch.bool)
    mask[0, seq // 2 : seq // 2 + 1] = False
    mask[0, seq - seq // 3 :] = False
    mask[1, : (seq + 1) // 2] = False
    return mask


def _weights(config, query):
    """The weights that the variant's op takes as an argument, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        weights = config.make_weights(query.shape[-1])
    return {} if weights is None else {"weights": weights.to(query)}


def _attend(config, query, key, value, **options):
    return config.attend(query, key, value, **_weights(config, query), **options)


def _equals_the_loops(config, inputs, **options):
    weights = _weights(config, inputs[0])
    parameters = [p for module in weights.values() for p in module.parameters()]
    loops = getattr(naive, config.name)(*inputs, **options, **weights, **config.settings())
    _compare(config.attend(*inputs, **weights, **options), loops, [*inputs, *parameters])


def _compare(actual, expected, inputs):
    """Compare outputs, and the gradient of every input along one random direction."""
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(expected)
    gradients = [  # materialize_grads: if no key is visible, the loops never touch the keys
        torch.autograd.grad(out, inputs, direction, materialize_grads=True) for out in (actual, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_every_variant_is_tested_and_has_its_loops():
    assert {config.name for config in CONFIGS} == set(ATTENTION)
    for name, config in ATTENTION.items():
        assert config.name == name
        assert config.paper
        assert callable(getattr(naive, name))


@ops
@pytest.mark.parametrize(("seq", "padded"), slow_but([(1, False), (7, True), (16, False)], SHAPES), ids=str)
def test_equals_the_loops(config, is_causal, seq, padded):
    inputs = _qkv(seq=seq)
    options = {"is_causal": is_causal, "key_padding_mask": _padding(seq) if padded else None}
    _equals_the_loops(config, inputs, **options)


@ops
def test_grouped_queries_and_scale_equal_the_loops(config, is_causal):
    inputs = _qkv(heads=4, kv_heads=2, seq=12)
    options = {"is_causal": is_causal, "key_padding_mask": _padding(12), "scale": 0.7}
    _equals_the_loops(config, inputs, **options)


@pytest.mark.parametrize(("config", "is_causal"), list(_cases(OPS, FIRST)))
@pytest.mark.parametrize("padded", slow_but([True], [False, True]), ids=["full", "padded"])
def test_a_batch_in_several_groups_equals_the_loops(config, is_causal, padded):
    """Nineteen sequences: variants that cut the batch get groups of several, with a shorter last group."""
    inputs = _qkv(batch=19, heads=2, kv_heads=1, seq=9)
    mask = torch.rand(19, 9) < 0.7 if padded else None
    options = {"is_causal": is_causal, "key_padding_mask": mask}
    _equals_the_loops(config, inputs, **options)


@decoders
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("seq", [1, 3, 12])
def test_last_query_sees_last_key(config, seq, padded):
    inputs = _qkv(seq=seq, key_len=17)
    options = {"is_causal": True, "key_padding_mask": _padding(17) if padded else None}
    _equals_the_loops(config, inputs, **options)


@causal_ops
def test_no_future_leak(config):
    query, key, value = _qkv(seq=33)
    output = _attend(config, query, key, value, is_causal=True)
    gradients = torch.autograd.grad(output[:, :, :20].sum(), (query, key, value), materialize_grads=True)
    for gradient in gradients:
        assert gradient[:, :, 20:].abs().max() == 0


@ops
def test_batch_and_padding_do_not_matter(config, is_causal):
    query, key, value = _qkv(batch=3, seq=21)
    mask = torch.arange(21) < torch.tensor([[21], [13], [6]])
    together = _attend(config, query, key, value, is_causal=is_causal, key_padding_mask=mask)
    for row, length in enumerate((21, 13, 6)):
        alone = (t[row : row + 1, :, :length] for t in (query, key, value))
        torch.testing.assert_close(together[row : row + 1, :, :length], _attend(config, *alone, is_causal=is_causal))
    hidden = ~mask[:, None, :, None]
    other = (t.masked_fill(hidden, 1e3) for t in (query, key, value))
    again = _attend(config, *other, is_causal=is_causal, key_padding_mask=mask)
    # On some processors, the rounding of matrix products depends on the tensor's address.
    torch.testing.assert_close(again.masked_fill(hidden, 0.0), together.masked_fill(hidden, 0.0), rtol=0, atol=1e-13)


@ops
def test_rows_that_see_nothing_are_zero(config, is_causal):
    inputs = _qkv(seq=11)
    mask = torch.tensor([[False] * 11, [True] * 11])
    output = _attend(config, *inputs, is_causal=is_causal, key_padding_mask=mask)
    assert output[0].abs().max() == 0
    assert output[1].abs().min() > 0
    for gradient in torch.autograd.grad(output.sum(), inputs, materialize_grads=True):
        assert gradient[0].abs().max() == 0
        assert gradient.isfinite().all()


def _saved_elements(function, weights):
    """Elements of the distinct storages saved by autograd, without those at the addresses ``weights``."""
    kept = []  # holds the tensors, so that no storage is freed and its address reused
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = function()
    storages = {t.untyped_storage().data_ptr(): t for t in kept if t.numel()}
    del output
    return sum(t.untyped_storage().nbytes() // t.element_size() for at, t in storages.items() if at not in weights)


def _layer_and_input(config, is_causal, batch, heads, seq, head_dim, dtype=torch.float32):
    layer = config.module(heads * head_dim, heads, config, is_causal=is_causal).to(dtype)
    return layer, torch.randn(batch, seq, heads * head_dim, dtype=dtype, requires_grad=True)


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 3, 33, 8), (1, 4, 64, 16)], ids=str)
def test_saved_elements_are_those_that_autograd_keeps(config, is_causal, shape, dtype):
    layer, hidden_states = _layer_and_input(config, is_causal, *shape, dtype)
    weights = {t.untyped_storage().data_ptr() for t in layer.state_dict().values()}
    seen = _saved_elements(lambda: layer(hidden_states), weights)
    assert config.saved_elements(*shape, is_causal=is_causal) == seen


@keepers
def test_state_is_what_the_next_token_needs(config):
    query, key, value = _qkv(batch=1, heads=2, seq=1, key_len=33, head_dim=4)
    kept = config.state_elements(1, 2, 33, 4) // (2 * 2 * 4)  # tokens: keys and values, heads, dim
    torch.testing.assert_close(
        _attend(config, query, key[:, :, -kept:], value[:, :, -kept:], is_causal=True),
        _attend(config, query, key, value, is_causal=True),
    )


@plain_dropout_ops
def test_dropout_drops_weights_and_keeps_the_mean(config, is_causal):
    query, key, _ = (t.detach() for t in _qkv(batch=1, heads=1, seq=12, dtype=torch.float32))
    identity = torch.eye(12).expand(1, 1, 12, 12)  # with the identity as value, the output is the weights
    query, key = (torch.nn.functional.pad(t, (0, 8)) for t in (query, key))
    options = {"is_causal": is_causal, "scale": 0.5}
    weights = _attend(config, query, key, identity, **options)
    many = (t.expand(4000, -1, -1, -1) for t in (query, key, identity))
    dropped = _attend(config, *many, **options, dropout=0.25)
    torch.testing.assert_close(dropped.mean(0)[None], weights, rtol=0, atol=0.04)
    kept = (dropped[:, weights[0] > 0] > 0).float().mean(0)
    torch.testing.assert_close(kept, torch.full_like(kept, 0.75), rtol=0, atol=0.04)


@dropout_ops
def test_dropouts_gradient_is_that_of_the_weights_dropped(config, is_causal):
    def attend(*inputs):
        torch.manual_seed(1)
        return _attend(config, *inputs, is_causal=is_causal, dropout=0.3)

    assert torch.autograd.gradcheck(attend, _qkv(batch=1, heads=1, seq=6, head_dim=2))


@layers
def test_autocast_and_checkpointing(config, is_causal):
    hidden_states = torch.randn(2, 33, 32)
    layer = config.module(32, 4, config, is_causal=is_causal)
    expected = layer(hidden_states)
    direction = torch.randn_like(expected)  # a plain sum would be constant for a normalised output
    expected.backward(direction)
    gradients = [p.grad.clone() for p in layer.parameters()]

    layer.zero_grad()
    again = checkpoint(layer, hidden_states, use_reentrant=False)
    again.backward(direction)
    torch.testing.assert_close([p.grad for p in layer.parameters()], gradients)

    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(hidden_states)
    assert half.dtype == torch.bfloat16
    half.backward(direction.to(half.dtype))
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.02)
    all_gradients = torch.cat([p.grad.flatten() for p in layer.parameters()])
    expected_gradients = torch.cat([gradient.flatten() for gradient in gradients])
    assert all_gradients.dtype == torch.float32
    assert (all_gradients - expected_gradients).norm() < 0.02 * expected_gradients.norm()


@ops
def test_op_on_float32_under_autocast_is_half(config, is_causal):
    inputs = _qkv(seq=33, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = _attend(config, *inputs, is_causal=is_causal)
    assert output.dtype == torch.bfloat16
    for gradient in torch.autograd.grad(output.float().sum(), inputs, materialize_grads=True):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@layers
def test_selective_checkpointing_that_keeps_every_product_changes_nothing(config, is_causal):
    """No layer may write into a product, since checkpointing may keep it."""
    products = {getattr(torch.ops.aten, name) for name in ("mm", "bmm", "addmm", "baddbmm")}
    products.add(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)

    def policy(context, op, *args, **options):
        return CheckpointPolicy.MUST_SAVE if op.overloadpacket in products else CheckpointPolicy.PREFER_RECOMPUTE

    layer, hidden_states = _layer_and_input(config, is_causal, 2, 2, 33, 4, torch.float64)
    inputs = [hidden_states, *layer.parameters()]
    mask = _padding(33)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    again = checkpoint(layer, hidden_states, mask, use_reentrant=False, context_fn=contexts)
    _compare(again, layer(hidden_states, mask), inputs)


@around_ops
@pytest.mark.parametrize(("seq", "padded"), slow_but([(1, False), (16, True), (33, False)], SHAPES), ids=str)
def test_layer_is_the_op_between_its_projections(config, is_causal, seq, padded):
    layer, hidden_states = _layer_and_input(config, is_causal, 2, 2, seq, 4, torch.float64)
    mask = _padding(seq) if padded else None
    plain = copy.copy(layer)
    plain._modules = dict(layer._modules)
    plain.config = SoftmaxConfig() if config.name == "softmax" else config
    if config.name == "lsh":  # one projection for queries and keys
        plain.q_proj = plain.k_proj = plain.qk_proj
        plain.weights = None
    plain = SelfAttention.forward(plain, hidden_states, mask)
    _compare(layer(hidden_states, mask), plain, [hidden_states, *layer.parameters()])


@layers
def test_layer_gives_gradients_to_what_is_trained_only(config, is_causal):
    layer, hidden_states = _layer_and_input(config, is_causal, 2, 2, 33, 4, torch.float64)
    layer(hidden_states).sum().backward()
    expected = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    for number, parameter in enumerate(layer.parameters()):
        parameter.requires_grad_(number % 3 == 0)
    layer(hidden_states.detach()).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])
        else:
            assert parameter.grad is None


@layers
def test_layer_runs_padded(config, is_causal):
    layer = config.module(16, 2, config, is_causal=is_causal)
    hidden_states, mask = torch.randn(2, 9, 16), torch.arange(9) < torch.tensor([[9], [5]])
    output = layer(hidden_states, mask)
    assert output.shape == (2, 9, 16)
    torch.testing.assert_close(output[1:, :5], layer(hidden_states[1:, :5]))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("block", [3, 128, 1000])
def test_windows_blocks_do_not_matter(monkeypatch, is_causal, block):
    monkeypatch.setattr(window.blocks, "QUERY_BLOCK", block)
    inputs = _qkv(seq=300)
    distance = torch.arange(300)[:, None] - torch.arange(300)
    visible = (distance < 20) & ((distance >= 0) if is_causal else (distance > -20))
    _compare(
        window_attention(*inputs, window=20, is_causal=is_causal),
        scaled_dot_product_attention(*inputs, attn_mask=visible),
        inputs,
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [33, 64])
def test_window_as_long_as_the_sequence_is_exact_attention(is_causal, size):
    inputs = _qkv(seq=33)
    _compare(
        window_attention(*inputs, window=size, is_causal=is_causal),
        softmax_attention(*inputs, implementation="sdpa", is_causal=is_causal),
        inputs,
    )


def test_linformer_of_full_rank_and_identity_is_exact_attention():
    inputs, weights = _qkv(seq=16), LinformerConfig(16, 16).make_weights(4).double()
    with torch.no_grad():
        weights.key.copy_(torch.eye(16))
        weights.value.copy_(torch.eye(16))
    _compare(
        linformer_attention(*inputs, weights=weights, is_causal=False),
        softmax_attention(*inputs, implementation="sdpa", is_causal=False),
        inputs,
    )


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_linformers_layer_equals_its_op_with_projections(padded):
    layer = LinformerConfig(5, 64).module(12, 3, LinformerConfig(5, 64), is_causal=False).double()
    hidden_states = torch.randn(2, 11, 12, dtype=torch.float64, requires_grad=True)
    mask = _padding(11) if padded else None
    plain = SelfAttention.forward(layer, hidden_states, mask)  # keys and values of all positions
    _compare(layer(hidden_states, mask), plain, [hidden_states, *layer.parameters()])


@pytest.mark.parametrize("config", [SoftmaxConfig("sdpa"), SoftmaxConfig("eager")], ids=_id)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_bias_of_the_scores_is_added_before_softmax(config, padded, is_causal):
    inputs, bias = _qkv(heads=4, kv_heads=2, seq=9), torch.randn(1, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    query, key, value = (t.repeat_interleave(4 // t.shape[1], 1) for t in inputs)
    visible = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask = _padding(9) if padded else None
    if padded:
        mask[1, 0] = True  # every row sees something
        visible = visible & mask[:, None, None]
    if is_causal:
        visible = visible.tril()
    scores = (query @ key.transpose(-1, -2) * 0.5 + bias).masked_fill(~visible, -1e300)
    ours = config.attend(*inputs, is_causal=is_causal, key_padding_mask=mask, score_bias=bias)
    _compare(ours, scores.softmax(-1) @ value, [*inputs, bias])


@pytest.mark.parametrize("config", [SoftmaxConfig("sdpa"), SoftmaxConfig("eager")], ids=_id)
def test_with_a_bias_too_rows_that_see_nothing_are_zero(config):
    inputs, bias = _qkv(seq=5), torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False] * 5, [True] * 5])
    output = config.attend(*inputs, is_causal=False, key_padding_mask=mask, score_bias=bias)
    assert output[0].abs().max() == 0
    gradients = torch.autograd.grad(output.sum(), [*inputs, bias])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient[0].abs().max() == 0 for gradient in gradients[:3])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (7, 7)], ids=str)
def test_factors_of_full_rank_give_the_projection_and_fewer_its_best_approximation(shape, bias):
    linear = torch.nn.Linear(*shape, bias=bias, dtype=torch.float64)
    x = torch.randn(3, shape[0], dtype=torch.float64)
    for rank in (min(shape), 100):
        factored = low_rank(linear, rank)
        torch.testing.assert_close(factored(x), linear(x))
        assert factored[0].out_features == min(shape)
    factored = low_rank(linear, 2)
    assert [tuple(p.shape) for p in factored.parameters() if p.dim() == 2] == [(2, shape[0]), (shape[1], 2)]
    singular = torch.linalg.svdvals(linear.weight)
    error = torch.linalg.matrix_norm(factored[1].weight @ factored[0].weight - linear.weight)
    torch.testing.assert_close(error, singular[2:].norm())
    torch.testing.assert_close(*(torch.linalg.svdvals(f.weight) for f in factored))  # the square roots, in each factor
    assert (factored[1].bias is not None) == bias


def test_factors_keep_dtype_and_whether_they_are_trained():
    linear = torch.nn.Linear(8, 8, dtype=torch.bfloat16).requires_grad_(False)
    factored = low_rank(linear, 4)
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in factored.parameters())


def test_a_layer_of_full_rank_is_exact_attention():
    exact = SoftmaxConfig().module(12, 3, SoftmaxConfig(), is_causal=True).double()
    config = LowRankConfig(12)
    layer = config.module(12, 3, config, is_causal=True).double()
    for part in "qkvo":
        setattr(layer, f"{part}_proj", config.factor(part, getattr(exact, f"{part}_proj")))
    hidden_states = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    _compare(layer(hidden_states), exact(hidden_states), [hidden_states])


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (LowRankConfig(3, "qv"), 2 * 2 * 12 * 3 + 2 * 12**2),
        (LowRankConfig(5), 4 * 2 * 12 * 5),
        (LowRankConfig(100, "o"), 2 * 12 * 12 + 3 * 12**2),
    ],
)
def test_a_layer_has_two_factors_for_each_part_and_else_the_whole_projection(config, weights):
    layer = config.module(12, 3, config, is_causal=True)
    assert weights == sum(p.numel() for p in layer.parameters() if p.dim() == 2)


def test_nystrom_with_as_many_landmarks_as_real_tokens_is_exact_for_that_sequence_alone():
    inputs = _qkv(batch=3, seq=21)
    mask = torch.arange(21) < torch.tensor([[21], [8], [9]])
    ours = nystrom_attention(*inputs, landmarks=8, iterations=6, is_causal=False, key_padding_mask=mask)
    exact = softmax_attention(*inputs, implementation="sdpa", is_causal=False, key_padding_mask=mask)
    _compare(ours[1], exact[1], inputs)
    assert (ours[2] - exact[2]).abs().max() > 1e-3


def test_nystroms_iterations_approach_the_pseudo_inverse():
    query, key, value = (t.detach() for t in _qkv(seq=32))
    landmarks = [t.unflatten(2, (4, 8)).mean(3) for t in (query, key)]
    first, kernel, last = (
        (a * 0.5 @ b.transpose(-1, -2)).softmax(-1) for a, b in ((query, landmarks[1]), landmarks, (landmarks[0], key))
    )
    expected = first @ torch.linalg.pinv(kernel) @ last @ value
    ours = nystrom_attention(query, key, value, landmarks=4, iterations=40, is_causal=False)
    torch.testing.assert_close(ours, expected)


def test_windows_half_precision_error_is_near_the_fused_kernels():
    distance = torch.arange(200)[:, None] - torch.arange(200)
    visible = (distance >= 0) & (distance < 150)
    half = [t.detach().bfloat16().requires_grad_() for t in _qkv(seq=200, head_dim=32)]
    double = [t.detach().double().requires_grad_() for t in half]
    direction = torch.randn(2, 2, 200, 32).bfloat16()
    exact, fused, ours = (
        (output.detach(), *torch.autograd.grad(output, inputs, direction.to(output.dtype)))
        for inputs, output in (
            (double, scaled_dot_product_attention(*double, attn_mask=visible)),
            (half, scaled_dot_product_attention(*half, attn_mask=visible)),
            (half, window_attention(*half, window=150, is_causal=True)),
        )
    )
    for e, f, o in zip(exact, fused, ours, strict=True):
        assert (o - e).norm() < 2.5 * (f - e).norm()


@pytest.mark.parametrize("config", [SoftmaxConfig, WindowConfig], ids=["softmax", "window"])
def test_flash_attention_2_without_cuda_is_unavailable(config):
    with pytest.raises(Unavailable, match="needs CUDA, the tensors are on cpu"):
        config(implementation="flash_attention_2").attend(*_qkv(), is_causal=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowConfig(0), "window=0 tokens; take at least 1"),
        (lambda: WindowConfig(4, "sdpa"), "'sdpa'; one of"),
        (lambda: WindowConfig(4, "flash_attention_2", True), "chunked=True is not for implementation 'flash"),
        (lambda: SoftmaxConfig("flash"), "'flash'; one of"),
        (lambda: SoftmaxConfig("eager", recompute=True), "recompute=True with implementation='eager'"),
        (lambda: SoftmaxConfig(recompute=True).attend(*_qkv(), is_causal=True), "for the layer SoftmaxAttention"),
        (lambda: LSHConfig(0), "num_hashes=0; take at least 1"),
        (lambda: LSHConfig(chunk_length=0), "chunk_length=0"),
        (lambda: LSHConfig(num_buckets=12), "num_buckets=12; take a power of two"),
        (
            lambda: LSHConfig().attend(*_qkv(seq=3, key_len=5), is_causal=True),
            "3 queries against 5 keys; it attends within one sequence",
        ),
        (lambda: SoftmaxConfig().module(10, 4, SoftmaxConfig(), is_causal=True), "num_heads=4"),
        (lambda: window_attention(*_qkv(), window=0, is_causal=True), "window=0 tokens"),
        (
            lambda: window_attention(*_qkv(seq=3, key_len=5), window=2, is_causal=False),
            "3 queries against 5 keys",
        ),
        (
            lambda: softmax_attention(*_qkv(), implementation="x", is_causal=True),
            "unknown implementation 'x'",
        ),
        (
            lambda: softmax_attention(
                *_qkv(), implementation="flash_attention_2", is_causal=True, score_bias=torch.zeros(16, 16)
            ),
            "flash_attention_2 adds no bias",
        ),
        (lambda: LinformerConfig(0), "linformer: rank=0 tokens; take at least 1"),
        (lambda: LinformerConfig(4, 2.5), "linformer: max_len=2.5 tokens"),
        (lambda: LinformerConfig().module(8, 2, LinformerConfig(), is_causal=True), "linformer is bidirectional only"),
        (lambda: _attend(LinformerConfig(4, 64), *_qkv(), is_causal=True), "can't be causal"),
        (lambda: _attend(LinformerConfig(4, 8), *_qkv(seq=9), is_causal=False), "9 tokens, but .* end at max_len=8"),
        (lambda: LowRankConfig(0), "lowrank: rank=0; take at least 1"),
        (lambda: LowRankConfig(4, "qq"), "parts='qq'; take letters of 'qkvo'"),
        (lambda: LowRankConfig(4, "x"), "parts='x'"),
        (lambda: LowRankConfig(4, ""), "parts=''"),
        (lambda: NystromConfig(0), "nystrom: landmarks=0; take at least 1"),
        (lambda: NystromConfig(4, 0), "nystrom: iterations=0"),
        (lambda: NystromConfig(4).attend(*_qkv(), is_causal=True), "can't be causal"),
        (
            lambda: NystromConfig(4).attend(*_qkv(), is_causal=False, dropout=0.1),
            "dropout=0.1; set the model's attention dropout to 0",
        ),
        (
            lambda: NystromConfig(4).attend(*_qkv(seq=3, key_len=5), is_causal=False),
            "3 queries against 5 keys",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@ops
def test_bad_tensors_are_refused(config, is_causal):
    query, key, value = _qkv(seq=6)
    for tensors, mask, message in (
        ((query, key, value[:, :, :5]), None, "don't fit"),
        ((query, key[:, :, :, :2], value[:, :, :, :2]), None, "don't fit"),
        (_qkv(heads=3, kv_heads=2, seq=6), None, "3 query heads can't share 2"),
        ((query, key, value), torch.ones(2, 6), "expected \\(2, 6\\) torch.bool"),
        ((query, key, value), torch.ones(2, 5, dtype=torch.bool), "key_padding_mask is \\(2, 5\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            _attend(config, *tensors, is_causal=is_causal, key_padding_mask=mask)
    if is_causal:
        with pytest.raises(ValueError, match="6 queries to 4 keys"):
            _attend(config, query, key[:, :, :4], value[:, :, :4], is_causal=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@ops
def test_cuda_equals_cpu(config, is_causal):
    inputs = _qkv(seq=33)
    on_cuda = [t.detach().cuda().requires_grad_() for t in inputs]
    options = {"is_causal": is_causal, "key_padding_mask": _padding(33)}
    expected = _attend(config, *inputs, **options)
    options["key_padding_mask"] = options["key_padding_mask"].cuda()
    actual = _attend(config, *on_cuda, **options)
    torch.testing.assert_close(actual.cpu(), expected)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, on_cuda, direction.cuda())
    expected_gradients = torch.autograd.grad(expected, inputs, direction)
    torch.testing.assert_close([g.cpu() for g in gradients], list(expected_gradients))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 autocast"])
@layers
def test_a_layer_on_cuda_equals_the_cpu(config, is_causal, dtype):
    if config.name == "lsh" and dtype is torch.bfloat16:
        pytest.skip("a rounded query may fall into another bucket")
    layer = config.module(32, 4, config, is_causal=is_causal)
    on_cuda = copy.deepcopy(layer).cuda()
    x = torch.randn(2, 33, 32)
    expected = layer(x)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
        actual = on_cuda(x.cuda()).float()
    expected.square().mean().backward()
    actual.square().mean().backward()
    pairs = [(actual, expected)]
    pairs += [(other.grad, own.grad) for own, other in zip(layer.parameters(), on_cuda.parameters(), strict=True)]
    for other, own in pairs:
        if own is not None:  # a weight that another is drawn from has no gradient
            assert (other.cpu() - own).norm() < (0.05 if dtype is torch.bfloat16 else 1e-3) * (own.norm() + 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("config", [SoftmaxConfig("flash_attention_2"), WindowConfig(16, "flash_attention_2")], ids=_id)
def test_flash_attention_2_equals_our_own(config, is_causal):
    pytest.importorskip("flash_attn")
    inputs = [t.detach().cuda().bfloat16() for t in _qkv(seq=100, head_dim=32)]
    own = WindowConfig(16) if config.name == "window" else SoftmaxConfig("sdpa")
    torch.testing.assert_close(
        _attend(config, *inputs, is_causal=is_causal),
        own.attend(*inputs, is_causal=is_causal),
        rtol=0.02,
        atol=0.02,
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_buckets", [1, 4])
def test_lsh_of_one_bucket_or_one_chunk_is_exact_attention_with_tied_keys(is_causal, num_buckets):
    """Two chunks of one bucket see each other; a token that sees no other token sees itself."""
    query, _, value = _qkv(seq=16)
    key = query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    others = ~torch.eye(16, dtype=torch.bool)
    visible = others.tril() if is_causal else others
    visible = visible | (torch.eye(16, dtype=torch.bool) & ~visible.any(1))
    expected = scaled_dot_product_attention(query, key, value, attn_mask=visible)
    chunk_length = 8 if num_buckets == 1 else 16
    config = LSHConfig(1, chunk_length, num_buckets, hash_seed=0)
    _compare(config.attend(query, query, value, is_causal=is_causal), expected, (query, value))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_hashes", [1, 3])
def test_lsh_equals_transformers_layer_with_its_weights_and_buckets(is_causal, num_hashes, monkeypatch):
    """In float64: in float32, transformers' -1e5 for a token's own key costs 3e-3 if no round shows another key."""
    config = transformers.ReformerConfig(
        hidden_size=32,
        num_attention_heads=4,
        attention_head_size=8,
        attn_layers=["lsh"],
        is_decoder=is_causal,
        lsh_attn_chunk_length=8,
        num_buckets=[4, 2],
        num_hashes=num_hashes,
        hash_seed=1,
        lsh_attention_probs_dropout_prob=0.0,
        axial_pos_embds=False,
    )
    theirs = LSHSelfAttention(config).double()
    ours = LSHConfig(num_hashes, 8).module(32, 4, LSHConfig(num_hashes, 8), is_causal=is_causal).double()
    output = torch.nn.Linear(32, 32, bias=False).double()
    for mine, weight in ((ours.qk_proj, theirs.query_key), (ours.v_proj, theirs.value), (ours.o_proj, output)):
        mine.weight, mine.bias = weight.weight, torch.nn.Parameter(torch.zeros(32).double())
    hidden_states = torch.randn(2, 64, 32, dtype=torch.float64, requires_grad=True)
    attended = theirs(hidden_states)
    buckets = iter(attended.buckets.view(2, 4, num_hashes, 64).unbind(1))  # of each head
    rounds = 8 * torch.arange(num_hashes)[:, None]  # transformers numbers the buckets of all rounds consecutively
    monkeypatch.setattr(lsh, "hash_buckets", lambda vectors, rotations: (next(buckets) - rounds).int())
    weights = [theirs.query_key.weight, theirs.value.weight, output.weight]
    expected, actual = output(attended.hidden_states), ours(hidden_states)
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, [hidden_states, *weights], direction) for y in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_lsh_hashes_near_vectors_alike_and_draws_anew_without_a_seed():
    vectors = torch.randn(1, 200, 16)
    rotations = [torch.randn(50, 4, 16)]
    buckets = lsh.hash_buckets(vectors, rotations)
    assert buckets.shape == (1, 50, 200)
    assert buckets.unique().tolist() == list(range(8))
    near = lsh.hash_buckets(vectors + 0.1 * torch.randn_like(vectors), rotations)
    far = lsh.hash_buckets(torch.randn_like(vectors), rotations)
    assert (near == buckets).float().mean() > 0.8
    assert (far == buckets).float().mean() < 0.2
    opposite = lsh.hash_buckets(-vectors, rotations)
    assert torch.equal(opposite, (buckets + 4) % 8)
    inputs = _qkv(seq=64)
    one, other = (LSHConfig(1, 8).attend(*inputs, is_causal=False) for _ in range(2))
    assert not torch.equal(one, other)


def test_lshs_dropout_is_drawn_again_in_backward():
    query, _, value = _qkv(batch=2, heads=2, seq=24)

    def attend(query, value):
        torch.manual_seed(1)
        return LSHConfig(3, 8, 4).attend(query, query, value, is_causal=True, dropout=0.3)

    state = torch.get_rng_state()
    assert torch.autograd.gradcheck(attend, (query, value), fast_mode=True)
    output = attend(query, value)
    torch.set_rng_state(state)
    output.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
