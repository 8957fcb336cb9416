"""MemSizer equals the paper's definition, in training and decoding."""

import itertools

import pytest
import torch
from support import naive
from support.tiers import pairwise, slow_but
from torch._subclasses.fake_tensor import FakeTensorMode

from memstudy.attention import MemSizerConfig, MemSizerState, memsizer
from memstudy.profiler import measure, predict


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """Let even short sequences span several segments."""
    monkeypatch.setattr(memsizer, "CHUNK", 2)
    monkeypatch.setattr(memsizer, "SEGMENT", 5)
    torch.manual_seed(0)


def _layer(config, *, is_causal, hidden_size=8, dtype=torch.float64):
    layer = config.module(hidden_size, 2, config, is_causal=is_causal).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def _tokens(batch, seq, hidden_size=8):
    return torch.randn(batch, seq, hidden_size, dtype=torch.float64, requires_grad=True)


def _memsizer_weights(layer):
    layers = (layer.query_proj, layer.key_proj, layer.value_proj, layer.key_norm, layer.value_norm)
    return [(module.weight, module.bias) for module in layers]


def _mask(batch, seq, side):
    """Padding on one side and one token inside; the last sequence is all padding."""
    lengths = torch.arange(batch)[:, None] * seq // max(1, batch - 1)
    mask = torch.arange(seq) < seq - lengths
    mask[:, seq // 3] = False
    return mask.flip(1) if side == "left" else mask


CASES = (["causal", "bidirectional", "cross"], [3, 19], [1, 4, 7, 11], [None, "left", "right"])


@pytest.mark.parametrize(("form", "batch", "seq", "side"), slow_but(pairwise(*CASES), itertools.product(*CASES)))
def test_memsizer_equals_the_loops(form, batch, seq, side):
    layer = _layer(MemSizerConfig(3), is_causal=form == "causal")
    hidden_states = _tokens(batch, seq)
    memory = _tokens(batch, 6) if form == "cross" else hidden_states
    mask = None if side is None else _mask(batch, memory.shape[1], side)
    expected = naive.memsizer(
        hidden_states, memory, _memsizer_weights(layer), heads=2, is_causal=form == "causal", key_padding_mask=mask
    )
    actual = layer(hidden_states, mask, memory=memory if form == "cross" else None)
    torch.testing.assert_close(actual, expected)
    inputs = (hidden_states, *([memory] if form == "cross" else []), *layer.parameters())
    direction = torch.randn_like(expected)
    # materialize_grads: if no token is visible, the loops never touch the tokens.
    gradients = [torch.autograd.grad(y, inputs, direction, materialize_grads=True) for y in (actual, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("is_causal", [False, True])
def test_memsizer_ignores_padding_and_batch(is_causal):
    layer, hidden_states = _layer(MemSizerConfig(3), is_causal=is_causal), _tokens(2, 11)
    mask = torch.arange(11) < torch.tensor([[11], [6]])
    output = layer(hidden_states, mask)
    torch.testing.assert_close(output[1:, :6], layer(hidden_states[1:, :6]))
    torch.testing.assert_close(layer(hidden_states.flip(1), mask.flip(1))[1:, 5:], layer(hidden_states.flip(1)[1:, 5:]))
    if is_causal:
        (gradient,) = torch.autograd.grad(layer(hidden_states)[:, :7].sum(), hidden_states)
        assert gradient[:, 7:].abs().max() == 0


def test_memsizer_decodes_as_it_trains():
    layer, hidden_states = _layer(MemSizerConfig(4), is_causal=True), _tokens(3, 23)
    outputs, state = [], None
    for token in hidden_states.split(1, 1):
        output, state = layer.step(token, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), layer(hidden_states), rtol=0, atol=1e-12)
    assert state.sum.numel() + state.count.numel() == layer.config.state_elements(3, 2, 23, 4)
    assert state.count.dtype == torch.int64


def test_memsizers_beams_take_their_state_along():
    layer, hidden_states = _layer(MemSizerConfig(4), is_causal=True), _tokens(3, 2)
    _, state = layer.step(hidden_states[:, :1])
    beams = torch.tensor([2, 0, 0])
    output, _ = layer.step(hidden_states[:, 1:], MemSizerState(state.sum[beams], state.count[beams]))
    whole = torch.cat([hidden_states[beams, :1], hidden_states[:, 1:]], 1)
    torch.testing.assert_close(output, layer(whole)[:, 1:])


@pytest.mark.parametrize("is_causal", [False, True])
def test_memsizers_dropout_drops_and_keeps_the_mean(is_causal):
    """Every output varies between draws, around its value without dropout."""
    layer = _layer(MemSizerConfig(4, dropout=0.25), is_causal=is_causal)
    hidden_states = _tokens(1, 7).detach()
    expected = layer.eval()(hidden_states)
    with torch.no_grad():
        many = layer.train()(hidden_states.expand(4000, -1, -1))
    deviation = many.std(0)
    assert deviation.min() > 0
    assert ((many.mean(0) - expected[0]).abs() < 5 * deviation / 4000**0.5).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_memsizers_dropout_is_the_same_in_backward(is_causal):
    layer = _layer(MemSizerConfig(2, dropout=0.3), is_causal=is_causal, hidden_size=4)

    def attend(hidden_states):
        torch.manual_seed(1)
        return layer(hidden_states)

    assert torch.autograd.gradcheck(attend, _tokens(2, 6, 4))
    hidden_states = _tokens(2, 6, 4)
    output = attend(hidden_states)
    before = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_memsizer_starts_with_the_papers_gains():
    layer = MemSizerConfig(32, q_init_scale=32, kv_init_scale=1).module(
        512, 8, MemSizerConfig(32, 32, 1), is_causal=True
    )
    for proj, scale in ((layer.query_proj, 32), (layer.key_proj, 1), (layer.value_proj, 1)):
        bound = (6 / sum(proj.weight.shape)) ** 0.5 * scale**-0.5
        torch.testing.assert_close(proj.weight.abs().max().item(), bound, rtol=0.01, atol=0)
        assert proj.bias.abs().max() == 0


def test_scan_computes_only_the_gradients_asked_for():
    layer, hidden_states = _layer(MemSizerConfig(3), is_causal=True), _tokens(2, 11)
    expected = torch.autograd.grad(layer(hidden_states).sum(), (layer.value_proj.weight, hidden_states))
    layer.requires_grad_(False).value_proj.weight.requires_grad_()
    layer(hidden_states.detach()).sum().backward()
    torch.testing.assert_close(layer.value_proj.weight.grad, expected[0])
    assert layer.key_proj.weight.grad is None
    layer.requires_grad_(False)(hidden_states).sum().backward()
    torch.testing.assert_close(hidden_states.grad, expected[1])
    assert layer(hidden_states.detach()).grad_fn is None
    with torch.no_grad():
        assert layer(hidden_states).grad_fn is None


@pytest.mark.parametrize("is_causal", [False, True])
def test_runs_on_fake_tensors(is_causal):
    config = MemSizerConfig(3)
    with FakeTensorMode():
        layer, hidden_states = config.module(8, 2, config, is_causal=is_causal), torch.randn(2, 11, 8)
        layer(hidden_states).sum().backward()
        assert all(p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.usefixtures("one_thread", "young_garbage_only")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_predicted_peak_is_the_measured(dropout, is_causal):
    config = MemSizerConfig(3, dropout=dropout)

    def build():
        layer, hidden_states = config.module(32, 4, config, is_causal=is_causal), torch.randn(3, 33, 32)
        updates = torch.optim.AdamW(layer.parameters())

        def step():
            layer(hidden_states).square().mean().backward()
            updates.step()
            updates.zero_grad()

        return step

    assert predict(build).peak_bytes == measure(build).peak_bytes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MemSizerConfig(1), "slots=1; take at least 2"),
        (lambda: MemSizerConfig(q_init_scale=0), "q_init_scale=0"),
        (lambda: MemSizerConfig(dropout=1.0), "dropout=1.0"),
        (lambda: MemSizerConfig().module(8, 0, MemSizerConfig(), is_causal=True), "num_heads=0"),
        (lambda: _layer(MemSizerConfig(), is_causal=True)(_tokens(1, 3), memory=_tokens(1, 3)), "no memory beside"),
        (lambda: _layer(MemSizerConfig(), is_causal=True)(_tokens(1, 3), torch.ones(1, 4).bool()), r"\(1, 3\)"),
        (lambda: _layer(MemSizerConfig(), is_causal=False).step(_tokens(1, 1)), "is_causal=False; use forward"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_memsizer_has_no_op():
    with pytest.raises(NotImplementedError, match="use its layer"):
        MemSizerConfig().attend(*3 * [torch.ones(1, 1, 2, 4)], is_causal=True)
