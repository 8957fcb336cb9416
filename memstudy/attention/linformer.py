"""Linformer: attention to a fixed number of mixtures of the keys (Wang et al. 2020, arXiv:2006.04768)::

    Attention(Q, K, V) = softmax(Q (E K)ᵀ / √d) (F V)                      (equation 7)

E and F, (rank, seq), are learned. The scores are (seq, rank), so time and memory are linear in the sequence length. All
heads share E and F: the paper's "headwise sharing" (section 4). Shorter sequences use the first columns.

The layer never computes the keys and values of all positions. With hidden states x and a projection's weight W and
bias b, E (x Wᵀ + 1 bᵀ) = (E x) Wᵀ + (E 1) bᵀ, which projects rank rows instead of seq.

Not implemented: a separate E for each head, one matrix for keys and values or for all layers, ranks that differ by
layer, pooling and convolution in place of E. There is no causal form: each mixture holds later tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from memstudy.attention.base import AttentionConfig, SelfAttention, check_inputs
from memstudy.attention.softmax import softmax_attention


class LinformerWeights(nn.Module):
    """E and F of one layer.

    Drawn from a normal distribution with standard deviation rank ** -0.5, as the random projection of the paper's
    theorem 2, which preserves lengths in expectation.

    Parameters
    ----------
    rank, max_len : int [tokens]
    """

    def __init__(self, rank: int, max_len: int) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.randn(rank, max_len) * rank**-0.5)
        self.value = nn.Parameter(torch.randn(rank, max_len) * rank**-0.5)


def linformer_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    weights: nn.Module,
    is_causal: bool,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend to mixtures of the keys; see `AttentionConfig.attend` for the tensors.

    Padded keys and values count as zero in the mixtures.

    Parameters
    ----------
    weights : nn.Module
        Module with ``key`` (E) and ``value`` (F), (rank, max_len) each.

    Raises
    ------
    ValueError
        If causal, for more keys than ``max_len``, or tensors that don't fit.
    """
    check_inputs(query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask)
    if is_causal:
        raise ValueError("linformer mixes all keys, later ones too, so it can't be causal; take another variant")
    if key_padding_mask is not None:
        key, value = (t.masked_fill(~key_padding_mask[:, None, :, None], 0.0) for t in (key, value))
    kv_heads = key.shape[1]
    key, value = (
        _mix(matrix, t.transpose(1, 2).flatten(2)).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
        for matrix, t in ((weights.key, key), (weights.value, value))
    )  # (batch, kv_heads, rank, head_dim)
    return softmax_attention(query, key, value, implementation="sdpa", is_causal=False, scale=scale, dropout=dropout)


def _mix(matrix: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Apply the first columns of (rank, max_len) to (batch, seq, width)."""
    batch, seq, _ = tokens.shape
    if seq > matrix.shape[1]:
        raise ValueError(
            f"linformer: {seq} tokens, but its projections end at max_len={matrix.shape[1]}; raise max_len"
        )
    # Not `matmul`, which copies the tokens of all sequences to fold the batch into one product.
    return torch.bmm(matrix[:, :seq].expand(batch, -1, -1), tokens)


class LinformerAttention(SelfAttention):
    """Linformer with its projections; keys and values are projected after mixing."""

    def forward(self, hidden_states: torch.Tensor, key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        tokens = hidden_states
        if key_padding_mask is not None:
            tokens = tokens.masked_fill(~key_padding_mask[..., None], 0.0)
        heads = (
            self.q_proj(hidden_states),
            self._mixtures(self.k_proj, self.weights.key, tokens, key_padding_mask),
            self._mixtures(self.v_proj, self.weights.value, tokens, key_padding_mask),
        )
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in heads)
        context = F.scaled_dot_product_attention(query, key, value)
        return self.o_proj(context.transpose(1, 2).flatten(2))

    @staticmethod
    def _mixtures(proj, matrix, tokens, real):
        """Project the mixtures of (batch, seq, hidden_size) tokens: (batch, rank, hidden_size)."""
        mixed = F.linear(_mix(matrix, tokens), proj.weight)
        matrix = matrix[:, : tokens.shape[1]]
        ones = matrix.sum(1) if real is None else real.to(matrix.dtype) @ matrix.t()  # (rank) or (batch, rank)
        return mixed + ones[..., None] * proj.bias


@dataclass(frozen=True)
class LinformerConfig(AttentionConfig):
    """Linformer.

    Parameters
    ----------
    rank : int [tokens]
        Number of mixtures in place of the keys; the paper's k.
    max_len : int [tokens]
        Longest sequence: the columns of E and F.
    """

    rank: int = 128
    max_len: int = 512

    name: ClassVar[str] = "linformer"
    paper: ClassVar[str] = "Wang et al. 2020, arXiv:2006.04768"
    causal: ClassVar[tuple[bool, ...]] = (False,)
    parameter_free: ClassVar[bool] = False
    cross: ClassVar[bool] = True
    module: ClassVar[type[SelfAttention]] = LinformerAttention

    def __post_init__(self) -> None:
        for field in ("rank", "max_len"):
            if not isinstance(value := getattr(self, field), int) or value < 1:
                raise ValueError(f"linformer: {field}={value!r} tokens; take at least 1, a whole number")

    def make_weights(self, head_dim: int) -> LinformerWeights:
        return LinformerWeights(self.rank, self.max_len)

    def attend(self, query, key, value, **options) -> torch.Tensor:
        return linformer_attention(query, key, value, **options)

    def saved_elements(self, batch: int, heads: int, seq: int, head_dim: int, *, is_causal: bool = True) -> int:
        tokens = 3 * batch * heads * seq * head_dim  # input, query, heads' outputs
        mixtures = 4 * batch * heads * self.rank * head_dim  # E x and F x; the key and value projected from them
        # E 1 and F 1; a log-sum-exp for each query.
        return tokens + mixtures + 2 * self.rank + batch * heads * seq

    def state_elements(self, batch: int, heads: int, seq: int, head_dim: int) -> int:
        return 2 * batch * heads * self.rank * head_dim  # the mixtures: a new token is added to each
