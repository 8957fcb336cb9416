"""Sliding-window attention: a query sees only near keys.

Bidirectional after Longformer (Beltagy et al. 2020, arXiv:2004.05150, section 3.1), causal after
Mistral 7B (Jiang et al. 2023, arXiv:2310.06825, section 2). With window w, query i sees

    causal         i - w < j <= i     (w keys, its own included)
    bidirectional  |i - j| < w        (2 w - 1 keys; Longformer counts both sides together)

and the softmax runs over those keys alone. Time and memory are linear in the sequence: blocks of
queries against the slice of keys that the block can see, written into one output; backward computes
a block's weights once more instead of keeping them, so query, key, value and output are all that is
kept.

Not implemented: Longformer's dilation and global tokens; Mistral's rolling cache.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch.autograd.function import once_differentiable

from memstudy.attention.base import AttentionConfig, SelfAttention, check_inputs
from memstudy.attention.softmax import flash_attention_2, softmax_attention

IMPLEMENTATIONS = ("blocks", "flash_attention_2")
# Queries in a block. Small blocks waste few scores outside the window and need little room, large
# ones call few kernels; 128 was fastest of 64, 128, 256 with window 256 on two cores.
QUERY_BLOCK = 128
# Into how many groups a batch is cut at most, so that kernels don't get ever more numerous with it.
BATCH_GROUPS = 8


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    window: int,
    is_causal: bool,
    implementation: str = "blocks",
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend to the keys less than ``window`` away; see `AttentionConfig.attend` for the tensors.

    A window as long as the keys is exact attention, and computed as such. Differentiable once.
    Dropout keeps a boolean for every weight of a block for backward.

    Parameters
    ----------
    window : int [tokens]
        Visible keys to each side, the query's own included.
    implementation : {"blocks", "flash_attention_2"}
        "flash_attention_2" needs CUDA and the flash_attn package.

    Raises
    ------
    ValueError
        For a window below 1, an unknown implementation, or tensors that don't fit; when not causal,
        also for unequal numbers of queries and keys.
    Unavailable
        For "flash_attention_2" without CUDA or without the package.
    """
    check_inputs(query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask)
    _check_window(window, implementation)
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
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):  # as autocast does for SDPA
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(device_type, enabled=False):
        grouped = query.unflatten(1, (key.shape[1], -1))
        output = _Blocks.apply(grouped, key, value, key_padding_mask, window, is_causal, scale, dropout)
    return output.flatten(1, 2)


def _check_window(window: int, implementation: str) -> None:
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window: window={window!r} tokens; take at least 1 (the query itself), a whole number")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"window: unknown implementation {implementation!r}; one of {IMPLEMENTATIONS}")


def _blocks(
    batch: int, query_len: int, key_len: int, window: int, is_causal: bool
) -> Iterator[tuple[slice, slice, slice]]:
    """Yield by groups of sequences the blocks of queries, each with the keys that any of them sees.

    A group is one sequence as long as there are few: then the slices of keys stay views under the
    matrix products, and the scratch is an eighth of the batch's at most.
    """
    offset = key_len - query_len
    size = max(1, batch // BATCH_GROUPS)
    for sequence in range(0, batch, size):
        sequences = slice(sequence, sequence + size)
        for start in range(0, query_len, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, query_len)
            first = max(0, start + offset - window + 1)
            last = stop + offset if is_causal else min(key_len, stop + offset + window - 1)
            yield sequences, slice(start, stop), slice(first, last)


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    real: torch.Tensor | None,
    distance: int,
    window: int,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    """Softmax over a block's visible keys, at least float32.

    Parameters
    ----------
    query : torch.Tensor
        (batch, kv_heads, groups, rows, head_dim).
    key : torch.Tensor
        (batch, kv_heads, columns, head_dim).
    real : torch.Tensor, optional
        (batch, columns) bool, False for padding.
    distance : int [tokens]
        Position of the first query less that of the first key.

    Returns
    -------
    torch.Tensor
        (batch, kv_heads, groups, rows, columns).
    """
    (groups, rows), columns = query.shape[2:4], key.shape[2]
    apart = torch.arange(distance, distance + rows, device=key.device)[:, None]
    apart = apart - torch.arange(columns, device=key.device)  # (rows, columns)
    hidden = (apart < 0) | (apart >= window) if is_causal else apart.abs() >= window
    if real is not None:
        hidden = hidden | ~real[:, None, None, None]
    scores = (query * scale).flatten(2, 3) @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # The lowest finite number, not -inf: a row without visible keys must not turn into NaN.
    lowest = torch.finfo(scores.dtype).min
    # Not in place: selective checkpointing may be keeping the product.
    scores = scores.unflatten(2, (groups, rows)).masked_fill(hidden, lowest)
    torch.softmax(scores, dim=-1, out=scores)
    return scores if real is None else scores.masked_fill_(hidden, 0.0)


class _Blocks(torch.autograd.Function):
    """Windowed attention block by block; query (batch, kv_heads, groups, query_len, head_dim).

    Half precision is multiplied as such, so scores are rounded to it once, as in eager attention;
    softmax and sums of gradients are float32.
    """

    @staticmethod
    def forward(ctx, query, key, value, key_padding_mask, window, is_causal, scale, dropout):
        batch, kv_heads, groups, query_len, head_dim = query.shape
        # In memory (batch, seq, heads, head_dim): merging the heads afterwards copies nothing.
        output = query.new_empty(batch, query_len, kv_heads, groups, head_dim)
        output = output.permute(0, 2, 3, 1, 4)
        ctx.options, ctx.dropout, kept = (window, is_causal, scale), dropout, []
        for i, rows, columns in _blocks(batch, query_len, key.shape[2], window, is_causal):
            real = None if key_padding_mask is None else key_padding_mask[i, columns]
            distance = rows.start + key.shape[2] - query_len - columns.start
            weights = _weights(query[i, :, :, rows], key[i, :, columns], real, distance, *ctx.options)
            if dropout:
                kept.append(torch.empty_like(weights, dtype=torch.bool).bernoulli_(1 - dropout))
                weights.mul_(kept[-1]).div_(1 - dropout)
            context = weights.to(value.dtype).flatten(2, 3) @ value[i, :, columns]
            output[i, :, :, rows] = context.unflatten(2, (groups, -1))
        ctx.save_for_backward(query, key, value, output, key_padding_mask, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, output, key_padding_mask, *kept = ctx.saved_tensors
        window, is_causal, scale = ctx.options
        batch, _, groups, query_len, _ = query.shape
        dtype = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(t, dtype=dtype) for t in (key, value))
        blocks = _blocks(batch, query_len, key.shape[2], window, is_causal)
        with torch.autocast(query.device.type, enabled=False):
            for block, (i, rows, columns) in enumerate(blocks):
                q, k, v = query[i, :, :, rows], key[i, :, columns], value[i, :, columns]
                real = None if key_padding_mask is None else key_padding_mask[i, columns]
                distance = rows.start + key.shape[2] - query_len - columns.start
                weights = _weights(q, k, real, distance, *ctx.options)
                grad = grad_output[i, :, :, rows]
                # Softmax's backward; rowsum(weights * grad_weights) = rowsum(grad * output).
                rowsum = (grad.to(dtype) * output[i, :, :, rows]).sum(-1, keepdim=True)
                grad = grad.flatten(2, 3)
                grad_weights = (grad @ v.transpose(-1, -2)).to(dtype).unflatten(2, (groups, -1))
                used = weights
                if ctx.dropout:
                    used = (weights * kept[block]).div_(1 - ctx.dropout)
                    grad_weights.mul_(kept[block]).div_(1 - ctx.dropout)
                used = used.to(value.dtype).flatten(2, 3)
                grad_value[i, :, columns] += used.transpose(-1, -2) @ grad
                grad_scores = grad_weights.sub_(rowsum).mul_(weights).mul_(scale)
                grad_scores = grad_scores.to(query.dtype).flatten(2, 3)
                grad_query[i, :, :, rows] = (grad_scores @ k).unflatten(2, (groups, -1))
                grad_key[i, :, columns] += grad_scores.transpose(-1, -2) @ q.flatten(2, 3)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), *[None] * 5


class WindowAttention(SelfAttention):
    """Sliding-window attention with its projections."""


@dataclass(frozen=True)
class WindowConfig(AttentionConfig):
    """Sliding-window attention.

    Parameters
    ----------
    window : int [tokens]
        Visible keys to each side, the query's own included: w keys when causal, 2 w - 1 when not.
    implementation : {"blocks", "flash_attention_2"}
    """

    window: int = 256
    implementation: str = "blocks"

    name: ClassVar[str] = "window"
    paper: ClassVar[str] = "Beltagy et al. 2020, arXiv:2004.05150; Jiang et al. 2023, arXiv:2310.06825"
    causal: ClassVar[tuple[bool, ...]] = (False, True)
    parameter_free: ClassVar[bool] = True
    module: ClassVar[type[SelfAttention]] = WindowAttention

    def __post_init__(self) -> None:
        _check_window(self.window, self.implementation)

    def attend(self, query, key, value, **options) -> torch.Tensor:
        return window_attention(query, key, value, **asdict(self), **options)

    def saved_elements(self, batch: int, heads: int, seq: int, head_dim: int, *, is_causal: bool = True) -> int:
        tensors = 4 * batch * heads * seq * head_dim  # query, key, value, output
        if self.implementation == "flash_attention_2" or self.window >= seq:
            return tensors + batch * heads * seq  # the fused kernel's log-sum-exp
        return tensors

    def state_elements(self, batch: int, heads: int, seq: int, head_dim: int) -> int:
        return 2 * batch * heads * min(seq, self.window) * head_dim  # the window's keys and values
