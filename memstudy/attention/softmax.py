"""Exact softmax attention (Vaswani et al. 2017, arXiv:1706.03762, equation 1)::

    Attention(Q, K, V) = softmax(Q Kᵀ / √d) V

Three implementations of the same equation:

eager
    matmul, softmax, matmul; keeps the (seq, seq) weights of every head for the backward pass.
sdpa
    PyTorch's fused kernels. Without padding no mask is made, so PyTorch chooses the flash kernel (Dao
    et al. 2022, arXiv:2205.14135), which keeps the output and a log-sum-exp per query instead of the
    weights. On CPU PyTorch chooses it with padding too, but its unfused kernel with dropout.
flash_attention_2
    The flash_attn package on CUDA (Dao 2023, arXiv:2307.08691), fp16 and bf16, without padding.

With ``recompute`` the layer keeps only its input, the heads' outputs and the log-sum-exps, and projects
queries, keys and values again in backward.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from memstudy.attention.base import AttentionConfig, SelfAttention, Unavailable, check_inputs, check_padding
from memstudy.attention.heads import attend_by_heads

IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")


def softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    implementation: str,
    is_causal: bool,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    score_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend exactly; see `AttentionConfig.attend` for the tensors.

    Parameters
    ----------
    implementation : {"eager", "sdpa", "flash_attention_2"}
    score_bias : torch.Tensor, optional
        Added to the scaled scores; broadcasts to (batch, heads, query_len, key_len).

    Raises
    ------
    ValueError
        For an unknown implementation, tensors that don't fit, or "flash_attention_2" with a ``score_bias``.
    Unavailable
        For "flash_attention_2" without CUDA or without the flash_attn package.
    """
    check_inputs(query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask)
    if implementation == "flash_attention_2":
        if score_bias is not None:
            raise ValueError("flash_attention_2 adds no bias to the scores; use another implementation")
        return flash_attention_2(
            query,
            key,
            value,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            scale=scale,
            dropout=dropout,
        )
    if implementation == "eager":
        visible = _visible(query, key, is_causal, key_padding_mask)
        return _eager(query, key, value, visible, score_bias, scale, dropout)
    if implementation != "sdpa":
        raise ValueError(f"unknown implementation {implementation!r}; one of {IMPLEMENTATIONS}")
    # SDPA's own is_causal aligns the first query with the first key: right only for equal lengths.
    plain = key_padding_mask is None and score_bias is None
    plain_causal = is_causal and plain and query.shape[2] == key.shape[2]
    mask = None if plain_causal else _visible(query, key, is_causal, key_padding_mask)
    if score_bias is not None:
        # One mask holds both; a query that sees no key gives zeros, as with a boolean mask.
        mask = score_bias if mask is None else torch.where(mask, score_bias, -torch.inf)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=plain_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _visible(
    query: torch.Tensor,
    key: torch.Tensor,
    is_causal: bool,
    key_padding_mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """Mask of the keys that each query sees; None for all.

    Returns
    -------
    torch.Tensor or None
        bool, broadcasts to (batch, heads, query_len, key_len).
    """
    visible = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    query_len, key_len = query.shape[2], key.shape[2]
    if is_causal and query_len > 1:
        triangle = torch.ones(query_len, key_len, dtype=torch.bool, device=query.device)
        triangle = triangle.tril(key_len - query_len)
        visible = triangle if visible is None else visible & triangle
    return visible


def _eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    score_bias: torch.Tensor | None,
    scale: float | None,
    dropout: float,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-1, -2) * scale  # (batch, heads, query_len, key_len)
    if score_bias is not None:
        scores = scores + score_bias
    if visible is not None:
        # The lowest finite number, not -inf: a row without visible keys must not turn into NaN.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if visible is not None and visible.dim() == 4:  # only padding can hide all keys of a row
        weights = weights * visible.any(dim=-1, keepdim=True)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ value


def flash_attention_2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool,
    key_padding_mask: torch.Tensor | None,
    scale: float | None,
    dropout: float,
    window: int | None = None,
) -> torch.Tensor:
    """Call the flash_attn package; ``window`` as in `window_attention`, None for no window.

    Raises
    ------
    ValueError
        For padding or a dtype other than float16 and bfloat16.
    Unavailable
        Without CUDA or without the package.
    """
    if not query.is_cuda and type(query) is torch.Tensor:  # a fake tensor may stand for a GPU's
        raise Unavailable(f"implementation='flash_attention_2' needs CUDA, the tensors are on {query.device.type}")
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Unavailable(
            f"implementation='flash_attention_2' needs the flash_attn package ({error}); pip install 'memstudy[cuda]'"
        ) from error
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"flash_attention_2 takes float16 or bfloat16, not {query.dtype}; use bf16 precision")
    if key_padding_mask is not None:
        raise ValueError("flash_attention_2 takes no padding here; use another implementation")
    left = -1 if window is None else window - 1
    context = flash_attn_func(  # takes and gives (batch, seq, heads, head_dim)
        *(t.transpose(1, 2) for t in (query, key, value)),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=is_causal,
        window_size=(left, 0 if is_causal and window is not None else left),
    )
    return context.transpose(1, 2)


class _Fused:
    """PyTorch's fused kernels, with separate calls for forward and backward; a `memstudy.attention.heads.Kernel`."""

    def __init__(self, is_causal: bool, key_padding_mask: torch.Tensor | None) -> None:
        self.is_causal = is_causal
        self.key_padding_mask = key_padding_mask

    def _mask(self, query: torch.Tensor, key: torch.Tensor) -> dict:
        if self.key_padding_mask is None:
            return {"is_causal": self.is_causal}
        visible = _visible(query, key, self.is_causal, self.key_padding_mask)
        hidden = torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
        return {"is_causal": False, "attn_mask": hidden}

    def forward(self, output, query, key, value):
        if query.is_cuda:
            attended, *kept = torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, None, True, is_causal=self.is_causal
            )
        else:
            options = self._mask(query, key)
            attended, *kept = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, **options)
        output.copy_(attended)
        return kept

    def backward(self, grad_output, output, kept, query, key, value):
        if query.is_cuda:
            return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
                grad_output, query, key, value, None, output, *kept, 0.0, [True, True, True, False], self.is_causal
            )[:3]
        options = self._mask(query, key)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output, query, key, value, output, *kept, 0.0, **options
        )


class SoftmaxAttention(SelfAttention):
    """Exact attention with its projections."""

    def forward(self, hidden_states: torch.Tensor, key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        if not self.config.recompute:
            return super().forward(hidden_states, key_padding_mask)
        check_padding(key_padding_mask, hidden_states.shape[:2])
        if hidden_states.is_cuda and key_padding_mask is not None:
            raise ValueError("softmax: recompute=True takes no padding on CUDA; use recompute=False")
        return attend_by_heads(
            _Fused(self.is_causal, key_padding_mask),
            hidden_states,
            (self.q_proj, self.k_proj, self.v_proj),
            self.o_proj,
            heads=self.num_heads,
            # Two: the CPU's kernel gives each thread its own head.
            at_once=2 if self.num_heads % 2 == 0 else 1,
        )


@dataclass(frozen=True)
class SoftmaxConfig(AttentionConfig):
    """Exact attention.

    Parameters
    ----------
    implementation : {"sdpa", "eager", "flash_attention_2"}
        How the equation is computed.
    recompute : bool
        Whether the layer projects again in backward, two heads at a time; needs "sdpa".
    """

    implementation: str = "sdpa"
    recompute: bool = False

    name: ClassVar[str] = "softmax"
    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv:1706.03762"
    causal: ClassVar[tuple[bool, ...]] = (False, True)
    parameter_free: ClassVar[bool] = True
    cross: ClassVar[bool] = True
    score_bias: ClassVar[bool] = True
    module: ClassVar[type[SelfAttention]] = SoftmaxAttention

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(f"softmax: implementation={self.implementation!r}; one of {IMPLEMENTATIONS}")
        if self.recompute and self.implementation != "sdpa":
            raise ValueError(f"softmax: recompute=True with implementation={self.implementation!r}; take 'sdpa'")

    def attend(self, query, key, value, **options) -> torch.Tensor:
        if self.recompute:
            raise ValueError(
                "softmax: recompute=True is for the layer SoftmaxAttention, which has the projections; "
                "for the op, or a converted model, take recompute=False"
            )
        return softmax_attention(query, key, value, implementation=self.implementation, **options)

    def saved_elements(self, batch: int, heads: int, seq: int, head_dim: int, *, is_causal: bool = True) -> int:
        # Input and heads' outputs; without recompute also query, key and value.
        tensors = (2 if self.recompute else 5) * batch * heads * seq * head_dim
        if self.implementation == "eager":  # the weights; a boolean causal mask
            return tensors + (batch * heads + (is_causal and seq > 1)) * seq**2
        return tensors + batch * heads * seq  # a log-sum-exp for each query
