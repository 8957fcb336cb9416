"""Performer: the error of its features against exact attention, its layer, its memory."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memstudy.attention import PerformerConfig, performer, performer_attention, softmax_attention
from memstudy.profiler import measure, predict


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """Let even short sequences span several segments."""
    monkeypatch.setattr(performer, "CHUNK", 2)
    monkeypatch.setattr(performer, "SEGMENT", 5)
    torch.manual_seed(0)


def _layer(config, *, is_causal, hidden_size=8, dtype=torch.float64):
    layer = config.module(hidden_size, 2, config, is_causal=is_causal).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def _tokens(batch, seq, hidden_size=8):
    return torch.randn(batch, seq, hidden_size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("is_causal", [False, True])
def test_performer_comes_closer_with_more_features_and_is_right_on_average(is_causal):
    query, key, value = torch.randn(3, 1, 2, 12, 8, dtype=torch.float64)
    query, key = query / 2, key / 2
    exact = softmax_attention(query, key, value, implementation="eager", is_causal=is_causal)

    def errors(features):
        """The error of a single draw, and the error of the mean of twenty draws."""
        outputs = []
        for seed in range(20):
            config = PerformerConfig(features, seed)
            outputs.append(config.attend(query, key, value, weights=config.make_weights(8), is_causal=is_causal))
        outputs = torch.stack(outputs)
        return (outputs - exact).square().mean().sqrt(), (outputs.mean(0) - exact).square().mean().sqrt()

    (few, _), (many, of_mean) = errors(32), errors(2048)
    assert many < few / 5  # 64 times the features: expected sqrt(64) = 8
    assert of_mean < many / 3  # 20 draws: expected sqrt(20) = 4.5
    assert of_mean < 0.01


def test_performers_kernel_is_unbiased():
    """E[φ(q)ᵀ φ(k)] = exp(qᵀ k)."""
    features = torch.stack([PerformerConfig(8, seed).make_weights(8).features for seed in range(5000)]).double()
    query, key = 0.5 * torch.randn(2, 8, dtype=torch.float64)
    phi = [(features @ x - x.square().sum() / 2).exp() for x in (query, key)]
    estimates = (phi[0] * phi[1]).mean(1)
    assert (estimates.mean() - (query @ key).exp()).abs() < 4 * estimates.std() / 5000**0.5


def test_performers_vectors_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones():
    features = PerformerConfig(300).make_weights(64).features
    for block in features.split(64):
        products = block @ block.T
        torch.testing.assert_close(products, products.diagonal().diag(), rtol=0, atol=1e-3)
    torch.testing.assert_close(features.square().sum(1).mean().item(), 64.0, rtol=0.05, atol=0)
    assert torch.equal(features, PerformerConfig(300).make_weights(64).features)
    assert not torch.equal(features, PerformerConfig(300, seed=1).make_weights(64).features)


def test_performers_long_keys_stay_finite():
    query, key, value = (30 * torch.randn(1, 2, 12, 64) for _ in range(3))
    config = PerformerConfig()
    output = config.attend(query, key, value, weights=config.make_weights(64), is_causal=True)
    assert output.isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_performers_layer_is_its_op_between_projections(is_causal):
    layer, hidden_states = _layer(PerformerConfig(6), is_causal=is_causal), _tokens(3, 13)
    mask = torch.rand(3, 13) < 0.7
    query, key, value = (
        proj(hidden_states).unflatten(-1, (2, 4)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    context = performer_attention(query, key, value, weights=layer.weights, is_causal=is_causal, key_padding_mask=mask)
    expected = layer.o_proj(context.transpose(1, 2).flatten(2))
    actual = layer(hidden_states, mask)
    torch.testing.assert_close(actual, expected)
    inputs, direction = (hidden_states, *layer.parameters()), torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, inputs, direction) for y in (actual, expected)))


@pytest.mark.parametrize("is_causal", [False, True])
def test_runs_on_fake_tensors(is_causal):
    config = PerformerConfig(6)
    with FakeTensorMode():
        layer, hidden_states = config.module(8, 2, config, is_causal=is_causal), torch.randn(2, 11, 8)
        layer(hidden_states).sum().backward()
        assert all(p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_predicted_peak_is_the_measured(is_causal):
    config = PerformerConfig(6)

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
        (lambda: PerformerConfig(0), "features=0; take at least 1"),
        (
            lambda: PerformerConfig().attend(
                *3 * [torch.ones(1, 1, 2, 4)], weights=PerformerConfig().make_weights(4), is_causal=True, dropout=0.1
            ),
            "dropout=0.1; there are no attention weights",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
