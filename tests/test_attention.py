"""Every variant of `ATTENTION` under one contract; then what is particular to each."""

import naive
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention

from memstudy.attention import (
    ATTENTION,
    SoftmaxConfig,
    Unavailable,
    WindowConfig,
    softmax_attention,
    window,
    window_attention,
)

CONFIGS = [
    SoftmaxConfig("eager"),
    SoftmaxConfig("sdpa"),
    WindowConfig(1),
    WindowConfig(4),
    WindowConfig(16),
    WindowConfig(64),
]
LENGTHS = (1, 7, 16, 33)


def _id(config):
    return "-".join(str(value) for value in config.settings().values())


def _cases():
    for config in CONFIGS:
        for is_causal in config.causal:
            direction = "causal" if is_causal else "bidirectional"
            yield pytest.param(config, is_causal, id=f"{_id(config)}-{direction}")


cases = pytest.mark.parametrize(("config", "is_causal"), list(_cases()))
causal_configs = pytest.mark.parametrize("config", [config for config in CONFIGS if True in config.causal], ids=_id)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let even short sequences span several blocks."""
    monkeypatch.setattr(window, "QUERY_BLOCK", 5)
    torch.manual_seed(0)


def _qkv(batch=2, heads=2, seq=16, head_dim=4, *, kv_heads=None, key_len=None, dtype=torch.float64):
    """Three leaves whose memory is (batch, seq, heads, head_dim), as projections make them."""
    shapes = [(heads, seq)] + 2 * [(kv_heads or heads, key_len or seq)]
    return [torch.randn(batch, n, h, head_dim, dtype=dtype).transpose(1, 2).requires_grad_() for h, n in shapes]


def _padding(seq):
    """First sequence: a hole and the end padded; second: nothing but padding at its start."""
    mask = torch.ones(2, seq, dtype=torch.bool)
    mask[0, seq // 2 : seq // 2 + 1] = False
    mask[0, seq - seq // 3 :] = False
    mask[1, : (seq + 1) // 2] = False
    return mask


def _compare(actual, expected, inputs):
    """Outputs and the gradient of every input, for one random direction."""
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(expected)
    gradients = [  # where nothing is visible, the loops never touch the keys
        torch.autograd.grad(out, inputs, direction, materialize_grads=True) for out in (actual, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_every_variant_is_tested_and_has_its_loops():
    assert {config.name for config in CONFIGS} == set(ATTENTION)
    for name, config in ATTENTION.items():
        assert config.name == name
        assert config.paper
        assert callable(getattr(naive, name))


@cases
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("seq", LENGTHS)
def test_equals_the_loops(config, is_causal, seq, padded):
    inputs = _qkv(seq=seq)
    options = {"is_causal": is_causal, "key_padding_mask": _padding(seq) if padded else None}
    loops = getattr(naive, config.name)(*inputs, **options, **config.settings())
    _compare(config.attend(*inputs, **options), loops, inputs)


@cases
def test_grouped_queries_and_scale_equal_the_loops(config, is_causal):
    inputs = _qkv(heads=4, kv_heads=2, seq=12)
    options = {"is_causal": is_causal, "key_padding_mask": _padding(12), "scale": 0.7}
    loops = getattr(naive, config.name)(*inputs, **options, **config.settings())
    _compare(config.attend(*inputs, **options), loops, inputs)


@cases
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_batch_in_several_groups_equals_the_loops(config, is_causal, padded):
    """Nineteen sequences: more than one to a group where a variant cuts the batch, and a shorter last group."""
    inputs = _qkv(batch=19, heads=4, kv_heads=2, seq=12)
    mask = torch.rand(19, 12) < 0.7 if padded else None
    options = {"is_causal": is_causal, "key_padding_mask": mask}
    loops = getattr(naive, config.name)(*inputs, **options, **config.settings())
    _compare(config.attend(*inputs, **options), loops, inputs)


@causal_configs
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("seq", [1, 3, 12])
def test_last_query_sees_last_key(config, seq, padded):
    inputs = _qkv(seq=seq, key_len=17)
    options = {"is_causal": True, "key_padding_mask": _padding(17) if padded else None}
    loops = getattr(naive, config.name)(*inputs, **options, **config.settings())
    _compare(config.attend(*inputs, **options), loops, inputs)


@causal_configs
def test_no_future_leak(config):
    query, key, value = _qkv(seq=33)
    output = config.attend(query, key, value, is_causal=True)
    gradients = torch.autograd.grad(output[:, :, :20].sum(), (query, key, value))
    for gradient in gradients:
        assert gradient[:, :, 20:].abs().max() == 0


@cases
def test_batch_and_padding_do_not_matter(config, is_causal):
    query, key, value = _qkv(batch=3, seq=21)
    mask = torch.arange(21) < torch.tensor([[21], [13], [6]])
    together = config.attend(query, key, value, is_causal=is_causal, key_padding_mask=mask)
    for row, length in enumerate((21, 13, 6)):
        alone = (t[row : row + 1, :, :length] for t in (query, key, value))
        torch.testing.assert_close(together[row : row + 1, :, :length], config.attend(*alone, is_causal=is_causal))
    hidden = ~mask[:, None, :, None]
    other = (t.masked_fill(hidden, 1e3) for t in (query, key, value))
    again = config.attend(*other, is_causal=is_causal, key_padding_mask=mask)
    # Some processors' products round by where a tensor lies in memory.
    torch.testing.assert_close(again.masked_fill(hidden, 0.0), together.masked_fill(hidden, 0.0), rtol=0, atol=1e-13)


@cases
def test_rows_that_see_nothing_are_zero(config, is_causal):
    inputs = _qkv(seq=11)
    mask = torch.tensor([[False] * 11, [True] * 11])
    output = config.attend(*inputs, is_causal=is_causal, key_padding_mask=mask)
    assert output[0].abs().max() == 0
    assert output[1].abs().min() > 0
    for gradient in torch.autograd.grad(output.sum(), inputs):
        assert gradient[0].abs().max() == 0
        assert gradient.isfinite().all()


def _saved_elements(function):
    """Elements of the distinct storages that autograd keeps, and their bytes."""
    kept = []  # the tensors, so that no storage is freed and its address used again
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    storages = {t.untyped_storage().data_ptr(): t for t in kept}.values()
    return sum(t.untyped_storage().nbytes() // t.element_size() for t in storages)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 3, 33, 8), (1, 4, 64, 16)], ids=str)
def test_saved_elements_are_those_that_autograd_keeps(config, is_causal, shape, dtype):
    inputs = _qkv(*shape, dtype=dtype)
    seen = _saved_elements(lambda: config.attend(*inputs, is_causal=is_causal))
    assert config.saved_elements(*shape, is_causal=is_causal) == seen


def test_windows_room_is_linear_and_no_score_is_kept():
    shape = (2, 4, 640, 8)
    inputs = _qkv(*shape, dtype=torch.float32)
    mask = torch.rand(2, 640) < 0.9
    attend = WindowConfig(16).attend
    seen = _saved_elements(lambda: attend(*inputs, is_causal=True, key_padding_mask=mask))
    assert seen == WindowConfig(16).saved_elements(*shape) + mask.numel()
    assert WindowConfig(16).saved_elements(2, 4, 6400, 8) == 10 * 4 * 2 * 4 * 640 * 8


@causal_configs
def test_state_is_what_the_next_token_needs(config):
    query, key, value = _qkv(batch=1, heads=2, seq=1, key_len=33, head_dim=4)
    kept = config.state_elements(1, 2, 33, 4) // (2 * 2 * 4)  # tokens: keys and values, heads, dim
    torch.testing.assert_close(
        config.attend(query, key[:, :, -kept:], value[:, :, -kept:], is_causal=True),
        config.attend(query, key, value, is_causal=True),
    )


@cases
def test_dropout_drops_weights_and_keeps_the_mean(config, is_causal):
    query, key, _ = (t.detach() for t in _qkv(batch=1, heads=1, seq=12, dtype=torch.float32))
    identity = torch.eye(12).expand(1, 1, 12, 12)  # as the value: the output is the weights
    query, key = (torch.nn.functional.pad(t, (0, 8)) for t in (query, key))
    options = {"is_causal": is_causal, "scale": 0.5}
    weights = config.attend(query, key, identity, **options)
    many = (t.expand(4000, -1, -1, -1) for t in (query, key, identity))
    dropped = config.attend(*many, **options, dropout=0.25)
    torch.testing.assert_close(dropped.mean(0)[None], weights, rtol=0, atol=0.04)
    kept = (dropped[:, weights[0] > 0] > 0).float().mean(0)
    torch.testing.assert_close(kept, torch.full_like(kept, 0.75), rtol=0, atol=0.04)


@cases
def test_dropouts_gradient_is_that_of_the_weights_dropped(config, is_causal):
    def attend(*inputs):
        torch.manual_seed(1)
        return config.attend(*inputs, is_causal=is_causal, dropout=0.3)

    assert torch.autograd.gradcheck(attend, _qkv(batch=1, heads=1, seq=6, head_dim=2))


@cases
def test_autocast_and_checkpointing(config, is_causal):
    hidden_states = torch.randn(2, 33, 32)
    layer = config.module(32, 4, config, is_causal=is_causal)
    expected = layer(hidden_states)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]

    layer.zero_grad()
    again = torch.utils.checkpoint.checkpoint(layer, hidden_states, use_reentrant=False)
    again.sum().backward()
    torch.testing.assert_close([p.grad for p in layer.parameters()], gradients)

    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(hidden_states)
    assert half.dtype == torch.bfloat16
    half.float().sum().backward()
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.02)
    all_gradients = torch.cat([p.grad.flatten() for p in layer.parameters()])
    expected_gradients = torch.cat([gradient.flatten() for gradient in gradients])
    assert all_gradients.dtype == torch.float32
    assert (all_gradients - expected_gradients).norm() < 0.02 * expected_gradients.norm()


@cases
def test_op_on_float32_under_autocast_is_half(config, is_causal):
    inputs = _qkv(seq=33, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = config.attend(*inputs, is_causal=is_causal)
    assert output.dtype == torch.bfloat16
    for gradient in torch.autograd.grad(output.float().sum(), inputs):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@cases
def test_layer_runs_padded(config, is_causal):
    layer = config.module(16, 2, config, is_causal=is_causal)
    hidden_states, mask = torch.randn(2, 9, 16), torch.arange(9) < torch.tensor([[9], [5]])
    output = layer(hidden_states, mask)
    assert output.shape == (2, 9, 16)
    torch.testing.assert_close(output[1:, :5], layer(hidden_states[1:, :5]))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("block", [3, 128, 1000])
def test_windows_blocks_do_not_matter(monkeypatch, is_causal, block):
    monkeypatch.setattr(window, "QUERY_BLOCK", block)
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
        (lambda: SoftmaxConfig("flash"), "'flash'; one of"),
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
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@cases
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
            config.attend(*tensors, is_causal=is_causal, key_padding_mask=mask)
    if is_causal:
        with pytest.raises(ValueError, match="6 queries to 4 keys"):
            config.attend(query, key[:, :, :4], value[:, :, :4], is_causal=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@cases
def test_cuda_equals_cpu(config, is_causal):
    inputs = _qkv(seq=33)
    on_cuda = [t.detach().cuda().requires_grad_() for t in inputs]
    options = {"is_causal": is_causal, "key_padding_mask": _padding(33)}
    expected = config.attend(*inputs, **options)
    options["key_padding_mask"] = options["key_padding_mask"].cuda()
    actual = config.attend(*on_cuda, **options)
    torch.testing.assert_close(actual.cpu(), expected)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, on_cuda, direction.cuda())
    expected_gradients = torch.autograd.grad(expected, inputs, direction)
    torch.testing.assert_close([g.cpu() for g in gradients], list(expected_gradients))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("config", [SoftmaxConfig("flash_attention_2"), WindowConfig(16, "flash_attention_2")], ids=_id)
def test_flash_attention_2_equals_our_own(config, is_causal):
    pytest.importorskip("flash_attn")
    inputs = [t.detach().cuda().bfloat16() for t in _qkv(seq=100, head_dim=32)]
    own = WindowConfig(16) if config.name == "window" else SoftmaxConfig("sdpa")
    torch.testing.assert_close(
        config.attend(*inputs, is_causal=is_causal),
        own.attend(*inputs, is_causal=is_causal),
        rtol=0.02,
        atol=0.02,
    )
