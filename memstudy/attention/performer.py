"""Performer: softmax attention by positive random features (Choromanski et al. 2021, arXiv:2009.14794).

With m random vectors w_i and q, k scaled by the square root of the softmax's scale (FAVOR+, section 2.3-2.4)::

    φ(x)_i = exp(w_iᵀ x - |x|²/2) / √m,      E[φ(q)ᵀ φ(k)] = exp(qᵀ k)
    out_t  = φ(q_t)ᵀ Σ_s φ(k_s) v_sᵀ / φ(q_t)ᵀ Σ_s φ(k_s)

with s over all keys, or over the keys up to t when causal. The random vectors are orthogonal in
blocks of head_dim and have the norms of Gaussian vectors; they are drawn once. A column of ones in
the values makes both sums one product. The sequence runs in segments (see `scan`): besides the input,
memory holds one segment's features and the state before each segment.

Features are at least float32. A query's features are divided by their largest, which cancels. A key's features are
not: their exponents are bounded (``w·k - |k|²/2 <= |w|²/2``), and a division by the largest of all keys would leak
later keys into earlier outputs. A key so long that all its features underflow is not seen.

Not implemented: redrawing the features in training, kernels other than the softmax.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from memstudy.attention.base import AttentionConfig, SelfAttention, check_inputs, check_padding
from memstudy.attention.scan import scan

# Tokens of a segment, whose features exist at once; each keeps a state of num_features x (head_dim + 1) per head.
SEGMENT = 256
# Tokens of a chunk, whose scores for each other are computed.
CHUNK = 64


class PerformerFeatures(nn.Module):
    """The random vectors w_i, block-orthogonal.

    Attributes
    ----------
    features : torch.Tensor
        (num_features, head_dim), a buffer, float32.
    """

    def __init__(self, num_features: int, head_dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-num_features // head_dim)
        gaussian = torch.randn(blocks, head_dim, head_dim, dtype=torch.float64, generator=generator)
        norms = torch.randn(num_features, head_dim, dtype=torch.float64, generator=generator).norm(dim=1)
        directions, triangular = torch.linalg.qr(gaussian)
        # QR gives uniformly random orthogonal matrices only with the signs of the triangular factor's diagonal.
        directions = directions * triangular.diagonal(dim1=1, dim2=2).sign()[:, None]
        rows = directions.transpose(1, 2).reshape(-1, head_dim)[:num_features]
        self.register_buffer("features", (rows * norms[:, None]).float())


def performer_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    weights: PerformerFeatures,
    is_causal: bool,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend by random features; see `AttentionConfig.attend` for the tensors. Differentiable once when causal.

    Parameters
    ----------
    weights : PerformerFeatures
        From `PerformerConfig.make_weights`.

    Raises
    ------
    ValueError
        For tensors that don't fit, or ``dropout``.
    """
    check_inputs(query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask)
    if dropout:
        raise ValueError(f"performer: dropout={dropout}; there are no attention weights to drop, set it to 0")
    device_type, features = query.device.type, weights.features
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else query.dtype
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # (batch, seq, heads, head_dim)
    state, params = _no_keys(key, features), (features,)
    summarise, inputs = partial(_summarise, scale=scale), (key, value, key_padding_mask)
    with torch.autocast(device_type, enabled=False):
        if is_causal:
            early = key.shape[1] - query.shape[1]
            if early:  # keys that every query sees
                first = (None if t is None else t[:, :early] for t in inputs)
                _, state = scan(summarise, tuple(first), state, params, segment=SEGMENT)
            rest = (None if t is None else t[:, early:] for t in inputs)
            output, _ = scan(partial(_causal, scale=scale), (query, *rest), state, params, segment=SEGMENT)
        else:
            _, state = scan(summarise, inputs, state, params, segment=SEGMENT)
            output, _ = scan(partial(_read, scale=scale), (query,), state, params, segment=SEGMENT)
    return output.transpose(1, 2).to(dtype)


def _of_queries(query, features, scale: float, groups: int) -> torch.Tensor:
    """Features of queries (batch, seq, heads, head_dim): (batch, kv_heads, groups, seq, num_features).

    A query's features are divided by their largest, which cancels the factor exp(-|q|²/2).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    logs = query.transpose(1, 2).to(dtype) @ (features.to(dtype).t() * scale**0.5)
    return logs.sub_(logs.detach().amax(-1, keepdim=True)).exp_().unflatten(1, (-1, groups))


def _of_keys(key, value, mask, features, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of keys (batch, kv_heads, seq, num_features), zero where padded; values with a column of ones."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    key, value = (t.transpose(1, 2).to(dtype) for t in (key, value))
    logs = key @ (features.to(dtype).t() * scale**0.5)
    logs = logs.sub_(key.square().sum(-1, keepdim=True) * (scale / 2)).exp_()
    if mask is not None:
        logs = logs.masked_fill(~mask[:, None, :, None], 0.0)
    return logs, F.pad(value, (0, 1), value=1.0)


def _quotient(sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Divide by the last column; zero where no key was seen.

    From (batch, kv_heads, groups, seq, head_dim + 1) to (batch, seq, heads, head_dim).
    """
    total = sums[..., -1:]
    return (sums[..., :-1] / total.masked_fill(total == 0, 1.0)).flatten(1, 2).transpose(1, 2).to(dtype)


def _no_keys(key: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor]:
    """Give the state before the first key, (batch, kv_heads, num_features, head_dim + 1)."""
    batch, _, kv_heads, head_dim = key.shape
    dtype = torch.promote_types(key.dtype, torch.float32)
    return (key.new_zeros(batch, kv_heads, features.shape[0], head_dim + 1, dtype=dtype),)


def _summarise(inputs, state, params, *, scale: float):
    """Add a segment's Σ φ(k) (v, 1)ᵀ to the state; a step of `scan`."""
    key, value, mask = inputs
    phi, value = _of_keys(key, value, mask, *params, scale)
    return None, (state[0] + phi.transpose(2, 3) @ value,)


def _read(inputs, state, params, *, scale: float):
    """Attend from a segment of queries to all keys in the state; a step of `scan`."""
    (query,) = inputs
    phi = _of_queries(query, *params, scale, query.shape[2] // state[0].shape[1])
    return _quotient(phi @ state[0][:, :, None], query.dtype), state


def _causal(inputs, state, params, *, scale: float):
    """Attend from a segment of queries to the keys up to each query, in chunks; a step of `scan`."""
    query, key, value, mask = inputs
    groups = query.shape[2] // key.shape[2]
    phi_query = _of_queries(query, *params, scale, groups)
    phi_key, value = _of_keys(key, value, mask, *params, scale)
    total, sums = state[0].flatten(0, 1), []
    pieces = (t.flatten(0, 1).split(CHUNK, dim=-2) for t in (phi_query, phi_key, value))
    for q, k, v in zip(*pieces, strict=True):  # (batch * kv_heads, [groups,] chunk, ...)
        scores = q.flatten(1, 2) @ k.transpose(1, 2)
        scores = scores.unflatten(1, (groups, -1)).tril().flatten(1, 2)
        sums.append(torch.baddbmm(q.flatten(1, 2) @ total, scores, v).unflatten(1, (groups, -1)))
        total = torch.baddbmm(total, k.transpose(1, 2), v)
    sums = torch.cat(sums, dim=2).unflatten(0, state[0].shape[:2])
    return _quotient(sums, query.dtype), (total.view_as(state[0]),)


def _projected(hidden_states, weight, bias, num_heads: int) -> torch.Tensor:
    return F.linear(hidden_states, weight, bias).unflatten(-1, (num_heads, -1))


def _layer_summarise(inputs, state, params, *, num_heads: int, scale: float):
    hidden_states, mask = inputs
    features, *projections = params
    key, value = (_projected(hidden_states, *projections[at : at + 2], num_heads) for at in (0, 2))
    return _summarise((key, value, mask), state, (features,), scale=scale)


def _layer_read(inputs, state, params, *, num_heads: int, scale: float):
    features, query_weight, query_bias, out_weight, out_bias = params
    query = _projected(inputs[0], query_weight, query_bias, num_heads)
    context, state = _read((query,), state, (features,), scale=scale)
    return F.linear(context.flatten(2), out_weight, out_bias), state


def _layer_causal(inputs, state, params, *, num_heads: int, scale: float):
    hidden_states, mask = inputs
    features, *projections, out_weight, out_bias = params
    tokens = (_projected(hidden_states, *projections[at : at + 2], num_heads) for at in (0, 2, 4))
    context, state = _causal((*tokens, mask), state, (features,), scale=scale)
    return F.linear(context.flatten(2), out_weight, out_bias), state


class PerformerAttention(SelfAttention):
    """Attention by random features with its projections, which backward recomputes."""

    def forward(self, hidden_states: torch.Tensor, key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        check_padding(key_padding_mask, hidden_states.shape[:2])
        features, head_dim = self.weights.features, hidden_states.shape[-1] // self.num_heads
        options = {"num_heads": self.num_heads, "scale": head_dim**-0.5}
        query, key, value, out = (
            (proj.weight, proj.bias) for proj in (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        )
        state = _no_keys(hidden_states.unflatten(-1, (self.num_heads, -1)), features)
        inputs = (hidden_states, key_padding_mask)
        if self.is_causal:
            step, params = partial(_layer_causal, **options), (features, *query, *key, *value, *out)
            return scan(step, inputs, state, params, segment=SEGMENT)[0]
        step, params = partial(_layer_summarise, **options), (features, *key, *value)
        _, state = scan(step, inputs, state, params, segment=SEGMENT)
        step, params = partial(_layer_read, **options), (features, *query, *out)
        return scan(step, (hidden_states,), state, params, segment=SEGMENT)[0]


@dataclass(frozen=True)
class PerformerConfig(AttentionConfig):
    """Attention by positive orthogonal random features.

    Parameters
    ----------
    features : int
        Random vectors per head, m; more are closer to exact attention.
    seed : int
        Seed of the generator that draws them.
    """

    features: int = 256
    seed: int = 0

    name: ClassVar[str] = "performer"
    paper: ClassVar[str] = "Choromanski et al. 2021, arXiv:2009.14794"
    causal: ClassVar[tuple[bool, ...]] = (False, True)
    # The random vectors are not trained, but they are stored with the model.
    parameter_free: ClassVar[bool] = False
    drops_weights: ClassVar[bool] = False
    cross: ClassVar[bool] = True
    module: ClassVar[type[SelfAttention]] = PerformerAttention

    def __post_init__(self) -> None:
        if not isinstance(self.features, int) or self.features < 1:
            raise ValueError(f"performer: features={self.features!r}; take at least 1, a whole number")

    def make_weights(self, head_dim: int) -> PerformerFeatures:
        return PerformerFeatures(self.features, head_dim, self.seed)

    def attend(self, query, key, value, **options) -> torch.Tensor:
        return performer_attention(query, key, value, **options)

    def saved_elements(self, batch: int, heads: int, seq: int, head_dim: int, *, is_causal: bool = True) -> int:
        state = self.state_elements(batch, heads, seq, head_dim)
        # The input; the state before each segment; when not causal also the state after the last, which is read.
        return batch * heads * seq * head_dim + (-(-seq // SEGMENT) + (not is_causal)) * state

    def state_elements(self, batch: int, heads: int, seq: int, head_dim: int) -> int:
        return batch * heads * self.features * (head_dim + 1)  # the sum of φ(k) (v, 1)ᵀ
