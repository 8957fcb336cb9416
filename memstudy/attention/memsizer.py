"""MemSizer: attention to a key-value memory of fixed size (Zhang & Cai 2022, arXiv:2203.12644).

With k slots, r heads, and the mean over the heads of a softmax over the slots::

    a_t = mean_r dropout(softmax(Φ x_t))                                      (slots,)
    k_s = LayerNorm(W_l x_s)    (slots,)       v_s = LayerNorm(W_r x_s)       (hidden,)
    not causal, and cross       S = n^(-1/2) Σ_s k_s v_sᵀ                     out_t = a_t S
    causal                      S_t = t^(-1/2) Σ_{s≤t} k_s v_sᵀ               out_t = a_t S_t

n and t count the real tokens; padded tokens are left out of the sums. There is no output projection.
Training is linear in the sequence length. The causal form keeps its input and the state before each
segment (see `scan`). A segment is cut into chunks: a masked (chunk, chunk) product within a chunk, a
running sum between chunks. The other forms also keep W_r x, but never compute v: LayerNorm is linear
except for two numbers per token. Decoding keeps only the sum and the count.

Not implemented: the authors' released code where it departs from the paper (its causal path ignores
padding and its counter has the values' dtype).
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from memstudy.attention.base import AttentionConfig, check_padding
from memstudy.attention.scan import scan

# Tokens of a chunk, whose weights for each other are computed: 64 x 64 weights cost an eighth of a projection.
CHUNK = 64
# Tokens of a segment, which backward recomputes at once: long ones need more scratch, short ones more kernels.
SEGMENT = 512


class MemSizerState(NamedTuple):
    """State of decoding.

    Attributes
    ----------
    sum : torch.Tensor
        (batch, slots, hidden), Σ k_s v_sᵀ over the tokens so far, float32 or wider.
    count : torch.Tensor
        (batch,) int64, the number of tokens so far.
    """

    sum: torch.Tensor
    count: torch.Tensor


class MemSizerAttention(nn.Module):
    """MemSizer on hidden states: causal, bidirectional, or across two sequences.

    Parameters
    ----------
    hidden_size : int
    num_heads : int
        Number of softmaxes over which the slots' weights are averaged.
    config : MemSizerConfig
    is_causal : bool
        Whether a token sees only itself and the tokens before it.
    """

    def __init__(self, hidden_size: int, num_heads: int, config: "MemSizerConfig", *, is_causal: bool) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads={num_heads}; take at least 1")
        config.check_causal(is_causal)
        self.num_heads = num_heads
        self.config = config
        self.is_causal = is_causal
        self.query_proj = nn.Linear(hidden_size, num_heads * config.slots)
        self.key_proj = nn.Linear(hidden_size, config.slots)
        self.value_proj = nn.Linear(hidden_size, hidden_size)
        self.key_norm = nn.LayerNorm(config.slots)
        self.value_norm = nn.LayerNorm(hidden_size)
        for proj, scale in (
            (self.query_proj, config.q_init_scale),
            (self.key_proj, config.kv_init_scale),
            (self.value_proj, config.kv_init_scale),
        ):
            nn.init.xavier_uniform_(proj.weight, gain=scale**-0.5)
            nn.init.zeros_(proj.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        *,
        memory: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within each sequence, or to ``memory``.

        Parameters
        ----------
        hidden_states : torch.Tensor
            (batch, seq, hidden_size).
        key_padding_mask : torch.Tensor, optional
            (batch, seq), or (batch, memory_len) with ``memory``; bool, True for a real token. Where no
            real token is seen, the output is zero.
        memory : torch.Tensor, optional
            (batch, memory_len, hidden_size).

        Returns
        -------
        torch.Tensor
            (batch, seq, hidden_size).

        Raises
        ------
        ValueError
            For a mask that doesn't fit, or ``memory`` when causal.
        """
        if not self.is_causal:
            summary = self.summarise(hidden_states if memory is None else memory, key_padding_mask)
            return self.read(hidden_states, summary)
        if memory is not None:
            raise ValueError("memsizer: a causal layer has no memory beside its own tokens; make it is_causal=False")
        check_padding(key_padding_mask, hidden_states.shape[:2])
        dropout = self.config.dropout if self.training else 0.0
        step = partial(_causal, heads=self.num_heads, dropout=dropout)
        state, params = (
            self._no_tokens(hidden_states),
            (self.query_proj.weight, self.query_proj.bias, *self._of_memory()),
        )
        inputs = (hidden_states, key_padding_mask)
        return scan(step, inputs, state, params, segment=SEGMENT, random=dropout > 0)[0]

    def summarise(self, memory: torch.Tensor, key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the summary S of a sequence once for all tokens that `read` it.

        Parameters
        ----------
        memory : torch.Tensor
            (batch, memory_len, hidden_size).
        key_padding_mask : torch.Tensor, optional
            (batch, memory_len) bool, True for a real token.

        Returns
        -------
        torch.Tensor
            S, (batch, slots, hidden_size), float32 or wider.
        """
        check_padding(key_padding_mask, memory.shape[:2])
        key, value = self.key_norm(self.key_proj(memory)), self.value_proj(memory)
        count = torch.full(memory.shape[:1], memory.shape[1], device=memory.device)
        if key_padding_mask is not None:
            key, count = key.masked_fill(~key_padding_mask[..., None], 0.0), key_padding_mask.sum(1)
        norm = self.value_norm
        with torch.autocast(memory.device.type, enabled=False):
            total = _NormalisedSum.apply(key.to(value.dtype), value, norm.weight, norm.bias, norm.eps)
            return total * _root(count, total.dtype)[:, None, None]

    def read(self, hidden_states: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        """Read the slots for each token: a_t S.

        Parameters
        ----------
        hidden_states : torch.Tensor
            (batch, seq, hidden_size).
        summary : torch.Tensor
            (batch, slots, hidden_size), from `summarise`.

        Returns
        -------
        torch.Tensor
            (batch, seq, hidden_size).
        """
        dropout = self.config.dropout if self.training else 0.0
        weights = _weights(self.query_proj(hidden_states), self.num_heads, dropout)
        return weights @ summary.to(weights.dtype)

    def step(
        self, hidden_states: torch.Tensor, state: MemSizerState | None = None
    ) -> tuple[torch.Tensor, MemSizerState]:
        """Decode one token (causal).

        Parameters
        ----------
        hidden_states : torch.Tensor
            (batch, 1, hidden_size).
        state : MemSizerState, optional
            State from the previous step; None before the first token.

        Returns
        -------
        torch.Tensor, MemSizerState
            (batch, 1, hidden_size), equal to the last token of `forward` on the whole sequence; the new state.
        """
        if not self.is_causal or hidden_states.shape[1] != 1:
            raise ValueError(
                f"memsizer: step takes (batch, 1, hidden) in a causal layer, got {tuple(hidden_states.shape)} in one "
                f"with is_causal={self.is_causal}; use forward"
            )
        total, count = self._no_tokens(hidden_states) if state is None else state
        dropout = self.config.dropout if self.training else 0.0
        weights = _weights(self.query_proj(hidden_states), self.num_heads, dropout)
        key, value = self.key_norm(self.key_proj(hidden_states)), self.value_norm(self.value_proj(hidden_states))
        count = count + 1
        total = torch.baddbmm(total, key.transpose(1, 2).to(total.dtype), value.to(total.dtype))
        output = (weights.to(total.dtype) @ total) * _root(count, total.dtype)[:, None, None]
        return output.to(value.dtype), MemSizerState(total, count)

    def _of_memory(self) -> tuple[torch.Tensor, ...]:
        """List weight and bias of key_proj, key_norm, value_proj and value_norm."""
        layers = (self.key_proj, self.key_norm, self.value_proj, self.value_norm)
        return tuple(t for layer in layers for t in (layer.weight, layer.bias))

    def _no_tokens(self, hidden_states: torch.Tensor) -> MemSizerState:
        batch, _, hidden_size = hidden_states.shape
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        total = hidden_states.new_zeros(batch, self.config.slots, hidden_size, dtype=dtype)
        return MemSizerState(total, torch.zeros(batch, dtype=torch.int64, device=total.device))


def _weights(logits: torch.Tensor, heads: int, dropout: float) -> torch.Tensor:
    """Average the heads' softmax over the slots, (batch, seq, slots)."""
    return F.dropout(logits.unflatten(-1, (heads, -1)).softmax(-1), dropout).mean(-2)


def _memory(key, hidden_states, key_padding_mask, params) -> tuple[torch.Tensor, torch.Tensor]:
    """Make keys (batch, seq, slots), zero for padded tokens, and values (batch, seq, hidden)."""
    key_scale, key_shift, value_weight, value_bias, value_scale, value_shift = params
    key = F.layer_norm(key, key_scale.shape, key_scale, key_shift)
    value = F.linear(hidden_states, value_weight, value_bias)
    value = F.layer_norm(value, value_scale.shape, value_scale, value_shift)
    return key if key_padding_mask is None else key.masked_fill(~key_padding_mask[..., None], 0.0), value


def _counts(hidden_states, key_padding_mask, before: torch.Tensor) -> torch.Tensor:
    """Count the real tokens up to each token, (batch, seq); ``before``, (batch,), counts earlier segments."""
    if key_padding_mask is None:
        return before[:, None] + torch.arange(1, hidden_states.shape[1] + 1, device=before.device)
    return before[:, None] + key_padding_mask.cumsum(1)


def _root(count: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give count ** -0.5, and 1 for a count of 0, where the sum is zero."""
    return count.clamp(min=1).to(dtype).rsqrt()


class _NormalisedSum(torch.autograd.Function):
    """Σ_s k_s LayerNorm(u_s)ᵀ without computing LayerNorm(u).

    LayerNorm(u) = (u - mean) rstd γ + β, so the sum is (Σ k rstd (u - mean)ᵀ) γ + (Σ k) βᵀ: products of (slots, seq)
    with u itself. key (batch, seq, slots), u (batch, seq, hidden); gives (batch, slots, hidden), float32 or wider.
    """

    @staticmethod
    def forward(ctx, key, value, scale, shift, eps):
        dtype = torch.promote_types(value.dtype, torch.float32)
        # Only mean and rstd are used; `var_mean` takes ten times as long on a CPU.
        _, mean, rstd = torch.native_layer_norm(value.to(dtype), value.shape[-1:], None, None, eps)
        scaled = key * rstd
        total = (scaled.to(value.dtype).transpose(1, 2) @ value).to(dtype)
        total = total - (scaled * mean).sum(1)[..., None]  # not in place: selective checkpointing may keep the product
        ctx.save_for_backward(key, value, scale, shift, mean, rstd, total)
        return total * scale + key.sum(1, dtype=dtype)[..., None] * shift

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        key, value, scale, shift, mean, rstd, total = ctx.saved_tensors
        grad_scale = (grad * total).sum((0, 1)).to(scale.dtype)
        grad_shift = (grad * key.sum(1, dtype=grad.dtype)[..., None]).sum((0, 1)).to(shift.dtype)
        scaled = grad * scale  # the gradient of ``total``
        # The key's gradient through ``total``, which LayerNorm's backward needs too.
        found = (value @ scaled.to(value.dtype).transpose(1, 2)).to(grad.dtype)
        found.sub_(mean * scaled.sum(-1)[:, None]).mul_(rstd)
        grad_key = found + (grad @ shift.to(grad.dtype))[:, None]
        along = (key * found).sum(-1, keepdim=True).mul_(rstd.square()).div_(-value.shape[-1])
        constant = -rstd * (key.to(grad.dtype) @ scaled.mean(-1)[..., None]) - along * mean
        # The constant is added as one more slot, which saves a pass over u.
        left = torch.cat([key * rstd, constant], -1).to(value.dtype)
        right = torch.cat([scaled, torch.ones_like(scaled[:, :1])], 1).to(value.dtype)
        grad_value = torch.bmm(left, right).addcmul_(value, along.to(value.dtype))
        return grad_key.to(key.dtype), grad_value, grad_scale, grad_shift, None


def _causal(inputs, state, params, *, heads: int, dropout: float):
    """Run a segment of the causal form in chunks; a step of `scan`."""
    hidden_states, mask = inputs
    query_weight, query_bias, key_weight, key_bias, *of_memory = params
    slots = key_bias.shape[0]
    # Φ and W_l are narrow: one product for both, forward and backward.
    weight, bias = torch.cat([query_weight, key_weight]), torch.cat([query_bias, key_bias])
    logits, key = F.linear(hidden_states, weight, bias).split([query_bias.shape[0], slots], -1)
    weights = _weights(logits, heads, dropout)
    key, value = _memory(key, hidden_states, mask, of_memory)
    total, count = state
    counts = _counts(hidden_states, mask, count)
    weights = (weights * _root(counts, weights.dtype)[..., None]).to(value.dtype)
    batch, seq, hidden_size = value.shape
    chunk = min(CHUNK, seq)
    if seq % chunk:  # the last chunk is filled up with zeros
        weights, key, value = (F.pad(t, (0, 0, 0, -seq % chunk)) for t in (weights, key, value))
    # (batch * chunks, chunk, slots or hidden)
    weights, key, value = (t.reshape(-1, chunk, t.shape[-1]) for t in (weights, key, value))
    sums = (key.transpose(1, 2) @ value).to(total.dtype).view(batch, -1, slots, hidden_size)
    sums = torch.cat([total[:, None], sums], 1).cumsum(1)  # the sum before each chunk, and after the last
    before = sums[:, :-1].to(value.dtype).flatten(0, 1)
    scores = (weights @ key.transpose(1, 2)).tril()
    output = torch.baddbmm(weights @ before, scores, value)
    # Copies: views would keep the sums and counts of all chunks.
    state = sums[:, -1].clone(), counts[:, -1].clone()
    return output.view(batch, -1, hidden_size)[:, :seq], state


@dataclass(frozen=True)
class MemSizerConfig(AttentionConfig):
    """A key-value memory of fixed size in place of attention.

    Parameters
    ----------
    slots : int
        Slots of the memory, k; the paper takes 4 for causal attention in translation, 32 elsewhere.
    q_init_scale, kv_init_scale : float
        The initial weights have Xavier gain scale ** -0.5; the paper takes 8 and 8 in translation,
        32 and 1 in language modelling.
    dropout : float
        Probability of dropping a head's weight of a slot in training.
    """

    slots: int = 4
    q_init_scale: float = 8.0
    kv_init_scale: float = 8.0
    dropout: float = 0.0

    name: ClassVar[str] = "memsizer"
    paper: ClassVar[str] = "Zhang & Cai 2022, arXiv:2203.12644"
    causal: ClassVar[tuple[bool, ...]] = (False, True)
    parameter_free: ClassVar[bool] = False
    module: ClassVar[type[nn.Module]] = MemSizerAttention

    def __post_init__(self) -> None:
        if not isinstance(self.slots, int) or self.slots < 2:
            raise ValueError(
                f"memsizer: slots={self.slots!r}; take at least 2, a whole number (LayerNorm makes one slot's key zero)"
            )
        for name in ("q_init_scale", "kv_init_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"memsizer: {name}={getattr(self, name)}; take a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"memsizer: dropout={self.dropout}; take a probability from 0 to below 1")

    def attend(self, *tensors, **options) -> torch.Tensor:
        raise NotImplementedError(
            "memsizer has no queries, keys and values of its own; use its layer, config.module(hidden_size, num_heads, "
            "config, is_causal=...)"
        )

    def saved_elements(self, batch: int, heads: int, seq: int, head_dim: int, *, is_causal: bool = True) -> int:
        hidden = heads * head_dim
        if is_causal:  # the input; the sum and the count before each segment
            return batch * (seq * hidden + -(-seq // SEGMENT) * (self.slots * hidden + 1))
        # Input and values; softmax, weights, keys before and after their norm; two norms' mean and rstd.
        tokens = 2 * hidden + (heads + 3) * self.slots + 4
        return batch * (seq * tokens + 2 * self.slots * hidden + 1)  # the sum, the summary, n^(-1/2)

    def state_elements(self, batch: int, heads: int, seq: int, head_dim: int) -> int:
        return batch * (self.slots * heads * head_dim + 1)  # the sum and the count
