"""The op: windowed attention block by block; it saves query, key, value and output for backward."""

import torch
from torch.autograd.function import once_differentiable

from memstudy.attention.base import check_inputs, in_autocasts_dtype
from memstudy.attention.softmax import flash_attention_2, softmax_attention
from memstudy.attention.window.blocks import attend, differentiate

IMPLEMENTATIONS = ("blocks", "flash_attention_2")


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    window: int,
    is_causal: bool,
    implementation: str = "blocks",
    chunked: bool = False,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend to the keys less than ``window`` away; see `AttentionConfig.attend` for the tensors.

    A window at least as long as the keys is exact attention and computed by the softmax variant. Differentiable
    once. With dropout, a boolean for every weight of each block is saved for backward.

    Parameters
    ----------
    window : int [tokens]
        Visible keys to each side, including the query's own.
    implementation : {"blocks", "flash_attention_2"}
        "flash_attention_2" needs CUDA and the flash_attn package.
    chunked : bool
        If true, a query sees its own chunk of ``window`` tokens and the adjacent chunks, not a window around itself.

    Raises
    ------
    ValueError
        For a window below 1, an unknown implementation, or tensors whose shapes do not match; if not causal, also for
        unequal numbers of queries and keys.
    Unavailable
        For "flash_attention_2" without CUDA or without the package.
    """
    check_inputs(query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask)
    check_window(window, implementation, chunked)
    query_len, key_len = query.shape[2], key.shape[2]
    if not is_causal and query_len != key_len:
        raise ValueError(
            f"window: {query_len} queries against {key_len} keys, not causal; a window between two "
            "sequences has no meaning, use softmax there"
        )
    options = {
        "is_causal": is_causal,
        "key_padding_mask": key_padding_mask,
        "scale": scale,
        "dropout": dropout,
    }
    if implementation == "flash_attention_2":
        return flash_attention_2(query, key, value, window=window, **options)
    if window >= key_len:
        return softmax_attention(query, key, value, implementation="sdpa", **options)
    query, key, value = in_autocasts_dtype(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.unflatten(1, (key.shape[1], -1))
        pattern = window, is_causal, chunked
        output = _Blocks.apply(grouped, key, value, key_padding_mask, pattern, scale, dropout)
    return output.flatten(1, 2)


def check_window(window: int, implementation: str, chunked: bool) -> None:
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window: window={window!r} tokens; take at least 1 (the query itself), a whole number")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"window: unknown implementation {implementation!r}; one of {IMPLEMENTATIONS}")
    if chunked and implementation != "blocks":
        raise ValueError(f"window: chunked=True is not for implementation {implementation!r}; take 'blocks'")


class _Blocks(torch.autograd.Function):
    """Windowed attention block by block; query (batch, kv_heads, groups, query_len, head_dim).

    Half precision is multiplied in half precision, so scores are rounded once, as in eager attention;
    softmax and sums of gradients are float32.
    """

    @staticmethod
    def forward(ctx, query, key, value, key_padding_mask, pattern, scale, dropout):
        batch, kv_heads, groups, query_len, head_dim = query.shape
        # Laid out as (batch, seq, heads, head_dim), so that merging the heads afterwards copies nothing.
        output = query.new_empty(batch, query_len, kv_heads, groups, head_dim)
        output = output.permute(0, 2, 3, 1, 4)
        ctx.options, ctx.dropout = (key.shape[2] - query_len, *pattern, scale), dropout
        kept = attend(query, key, value, key_padding_mask, output, ctx.options, dropout)
        ctx.save_for_backward(query, key, value, key_padding_mask, output, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, key_padding_mask, output, *kept = ctx.saved_tensors
        dtype = torch.promote_types(query.dtype, torch.float32)
        grads = torch.empty_like(query), *(torch.zeros_like(t, dtype=dtype) for t in (key, value))
        tensors = query, key, value, key_padding_mask, output, grad_output
        with torch.autocast(query.device.type, enabled=False):
            differentiate(*tensors, grads, ctx.options, ctx.dropout, kept)
        return grads[0], grads[1].to(key.dtype), grads[2].to(value.dtype), *[None] * 4
