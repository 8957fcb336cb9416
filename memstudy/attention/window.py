"""Sliding-window attention: a query sees only near keys.

Bidirectional after Longformer (Beltagy et al. 2020, arXiv:2004.05150, section 3.1), causal after
Mistral 7B (Jiang et al. 2023, arXiv:2310.06825, section 2). With window w, query i sees::

    causal         i - w < j <= i     (w keys, its own included)
    bidirectional  |i - j| < w        (2 w - 1 keys; Longformer counts both sides together)

Chunked (the local attention of Reformer, Kitaev et al. 2020, in its authors' code) the sequence is cut into chunks of w
tokens, and a query sees its own chunk and the one before, causal up to itself; when not causal, the one behind too.

The softmax runs over those keys alone. Time and memory are linear in the sequence: blocks of
queries against the slice of keys that the block can see, written into one output; backward computes
a block's weights once more instead of keeping them. The op keeps query, key, value and output; the
layer its input, the queries and what the heads give, and projects keys and values again, a segment
of the sequence at a time.

Not implemented: Longformer's dilation and global tokens; Mistral's rolling cache.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from memstudy.attention.base import AttentionConfig, SelfAttention, check_inputs, check_padding
from memstudy.attention.softmax import flash_attention_2, softmax_attention

IMPLEMENTATIONS = ("blocks", "flash_attention_2")
# Queries in a block. Small blocks waste few scores outside the window and need little room, large
# ones call few kernels; 64 was fastest of 32, 64, 128, 256 with window 256 on two cores.
QUERY_BLOCK = 64
# Chunks are computed several at once, as long as a head has no more pairs of a query and a key among them.
PAIRS = 2**18
# Into how many groups a batch is cut at most, so that kernels don't get ever more numerous with it.
BATCH_GROUPS = 8
# Tokens that the layer projects at once, at least as many as the window reaches back. In sequences of more than eight
# such segments half of it is as fast.
SEGMENT = 1024


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

    A window as long as the keys is exact attention, and computed as such. Differentiable once.
    Dropout keeps a boolean for every weight of a block for backward.

    Parameters
    ----------
    window : int [tokens]
        Visible keys to each side, the query's own included.
    implementation : {"blocks", "flash_attention_2"}
        "flash_attention_2" needs CUDA and the flash_attn package.
    chunked : bool
        Whether a query sees its own chunk of ``window`` tokens and those next to it, instead of a window around itself.

    Raises
    ------
    ValueError
        For a window below 1, an unknown implementation, or tensors that don't fit; when not causal, also for unequal
        numbers of queries and keys.
    Unavailable
        For "flash_attention_2" without CUDA or without the package.
    """
    check_inputs(query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask)
    _check_window(window, implementation, chunked)
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
        pattern = window, is_causal, chunked
        output = _Blocks.apply(grouped, key, value, key_padding_mask, pattern, scale, dropout)
    return output.flatten(1, 2)


def _check_window(window: int, implementation: str, chunked: bool) -> None:
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window: window={window!r} tokens; take at least 1 (the query itself), a whole number")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"window: unknown implementation {implementation!r}; one of {IMPLEMENTATIONS}")
    if chunked and implementation != "blocks":
        raise ValueError(f"window: chunked=True is not for implementation {implementation!r}; take 'blocks'")


def _groups(batch: int) -> Iterator[slice]:
    """Cut a batch into groups of sequences.

    A group is one sequence as long as there are few: then the slices of keys stay views under the
    matrix products, and the scratch is an eighth of the batch's at most.
    """
    size = max(1, batch // BATCH_GROUPS)
    for start in range(0, batch, size):
        yield slice(start, start + size)


def _blocks(
    query_len: int, key_len: int, offset: int, window: int, is_causal: bool, chunked: bool, like: torch.Tensor
) -> Iterator[tuple[slice, slice, int, torch.Tensor]]:
    """Cut the queries into blocks; query i has the position i + ``offset`` among the keys.

    Returns
    -------
    rows, columns : slice
        The queries, and the keys that any of them sees.
    chunks : int
        How many chunks of one shape the block is made of: each as many queries and keys behind the one before as there
        are queries in it.
    bias : torch.Tensor
        (rows, columns) of a chunk, of ``like``'s dtype and device: 0 where a query sees a key. Elsewhere far below any
        score but finite, not -inf: a row without visible keys must not turn into NaN.
    """
    starts, most = range(0, query_len, QUERY_BLOCK), 1
    if chunked:
        starts = [max(0, start) for start in range(-(offset % window), query_len, window)]
        most = max(1, PAIRS // (window * window * (2 if is_causal else 3)))
    cuts = []
    for first, stop in zip(starts, [*starts[1:], query_len], strict=True):
        last = stop + offset
        if chunked:
            chunk = (first + offset) // window * window
            sees = chunk - window, chunk + 2 * window
        else:
            sees = first + offset - window + 1, last + window - 1
        cuts.append((slice(first, stop), slice(max(0, sees[0]), last if is_causal else min(key_len, sees[1]))))
    for shape, alike in itertools.groupby(cuts, lambda cut: _shape(*cut, offset)):
        n_rows, n_columns, distance = shape
        apart = torch.arange(distance, distance + n_rows, device=like.device)[:, None]
        apart = apart - torch.arange(n_columns, device=like.device)
        hidden = torch.zeros_like(apart, dtype=torch.bool) if chunked else apart.abs() >= window
        if is_causal:
            hidden |= apart < 0
        bias = torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, torch.finfo(like.dtype).min / 2)
        while block := list(itertools.islice(alike, most)):
            (rows, columns), (last_rows, last_columns) = block[0], block[-1]
            yield slice(rows.start, last_rows.stop), slice(columns.start, last_columns.stop), len(block), bias


def _shape(rows: slice, columns: slice, offset: int) -> tuple[int, int, int]:
    """Numbers of queries and keys, and how far the first query is behind the first key."""
    return rows.stop - rows.start, columns.stop - columns.start, rows.start + offset - columns.start


def _weights(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, hidden: torch.Tensor | None, scale: float):
    """Softmax over a block's visible keys, at least float32.

    Parameters
    ----------
    query : torch.Tensor
        (batch * kv_heads * chunks, groups * rows, head_dim), from `_queries`.
    key : torch.Tensor
        (batch * kv_heads * chunks, columns, head_dim), from `_keys`.
    bias : torch.Tensor
        (rows, columns), from `_blocks`.
    hidden : torch.Tensor, optional
        (batch * kv_heads * chunks, 1, columns) bool, True for padding, from `_padding`.

    Returns
    -------
    torch.Tensor
        (batch * kv_heads * chunks, groups * rows, columns).
    """
    bias = bias.repeat(query.shape[1] // len(bias), 1)
    bias = (
        bias.expand(len(query), -1, -1) if hidden is None else bias.masked_fill(hidden, torch.finfo(bias.dtype).min / 2)
    )
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights if hidden is None else weights.masked_fill_(bias < 0, 0.0)


def _queries(tensor: torch.Tensor, chunks: int) -> torch.Tensor:
    """(batch, kv_heads, groups, rows, dim) as (batch * kv_heads * chunks, groups * rows of a chunk, dim)."""
    if chunks == 1:
        return tensor.flatten(2, 3).flatten(0, 1)
    return tensor.unflatten(3, (chunks, -1)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _write(total: torch.Tensor, block: torch.Tensor, chunks: int) -> None:
    """Write ``block``, of `_queries`' shape, to ``total`` (batch, kv_heads, groups, rows, dim)."""
    if chunks > 1:
        total = total.unflatten(3, (chunks, -1)).transpose(2, 3)
    total.copy_(block.view(total.shape))


def _keys(tensor: torch.Tensor, chunks: int, step: int) -> torch.Tensor:
    """(batch, kv_heads, columns, dim) as (batch * kv_heads * chunks, columns of a chunk, dim).

    A chunk is ``step`` behind the one before. One chunk of one sequence is not copied.
    """
    if chunks == 1:
        return tensor.flatten(0, 1)
    width = tensor.shape[2] - (chunks - 1) * step
    return tensor.unfold(2, width, step).transpose(-1, -2).flatten(0, 2)


def _padding(real: torch.Tensor | None, kv_heads: int, chunks: int, step: int) -> torch.Tensor | None:
    """(batch, columns), True for a real token, as `_weights` takes it."""
    if real is None:
        return None
    width = real.shape[1] - (chunks - 1) * step
    hidden = ~real.unfold(1, width, step)  # (batch, chunks, columns of a chunk)
    return hidden[:, None, :, None].expand(-1, kv_heads, -1, -1, -1).flatten(0, 2)


def _add_to_keys(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, chunks: int, step: int, scale: float = 1.0
):
    """Add ``scale * left @ right``, of `_keys`' shape, to ``total`` (batch, kv_heads, columns, dim)."""
    if chunks == 1:
        _add_product(total, left, right, scale)
        return
    product = (left @ right).view(*total.shape[:2], chunks, -1, total.shape[-1])
    for start in range(0, product.shape[3], step):
        part = total[:, :, start : start + chunks * step].unflatten(2, (chunks, step))
        part.add_(product[:, :, :, start : start + step], alpha=scale)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
    """Add ``scale * left @ right`` in place; ``total`` has the product's shape, or its first axis in two."""
    if total.dtype == left.dtype and total.dim() == 2:
        total.addmm_(left, right, alpha=scale)
    elif total.dtype == left.dtype and len(total) == 1:
        total[0].baddbmm_(left, right, alpha=scale)
    else:
        total.add_((left @ right).view(total.shape), alpha=scale)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    output: torch.Tensor,
    options: tuple[int, int, bool, bool, float],
    dropout: float = 0.0,
) -> list[torch.Tensor]:
    """Write what queries attend to into ``output``, block by block.

    Parameters
    ----------
    query, output : torch.Tensor
        (batch, kv_heads, groups, query_len, head_dim).
    key, value : torch.Tensor
        (batch, kv_heads, key_len, head_dim).
    key_padding_mask : torch.Tensor, optional
        (batch, key_len) bool, True for a real token.
    options : tuple
        offset [tokens] (how many keys lie before the first query's own), window, is_causal, chunked, scale.

    Returns
    -------
    list of torch.Tensor
        Of each block, which weights dropout kept; empty without dropout.
    """
    *pattern, scale = options
    kept = []
    for i in _groups(len(query)):
        q, k, v, out = query[i], key[i], value[i], output[i]
        for rows, columns, chunks, bias in _blocks(q.shape[3], k.shape[2], *pattern, q):
            real = None if key_padding_mask is None else key_padding_mask[i, columns]
            hidden = _padding(real, k.shape[1], chunks, len(bias))
            k_block, v_block = (_keys(t[:, :, columns], chunks, len(bias)) for t in (k, v))
            weights = _weights(_queries(q[:, :, :, rows], chunks), k_block, bias, hidden, scale)
            if dropout:
                kept.append(torch.empty_like(weights, dtype=torch.bool).bernoulli_(1 - dropout))
                weights.mul_(kept[-1]).div_(1 - dropout)
            _write(out[:, :, :, rows], weights.to(v.dtype) @ v_block, chunks)
    return kept


def _differentiate(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    output: torch.Tensor,
    grad_output: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    options: tuple[int, int, bool, bool, float],
    dropout: float = 0.0,
    kept: tuple[torch.Tensor, ...] = (),
) -> None:
    """Write the gradient of `_attend`'s query into ``grads[0]``, and add those of key and value to the other two."""
    *pattern, scale = options
    kept = iter(kept)
    for i in _groups(len(query)):
        q, k, v, out, grad_out, grad_q, grad_k, grad_v = (
            t[i] for t in (query, key, value, output, grad_output, *grads)
        )
        for rows, columns, chunks, bias in _blocks(q.shape[3], k.shape[2], *pattern, q):
            real = None if key_padding_mask is None else key_padding_mask[i, columns]
            hidden = _padding(real, k.shape[1], chunks, len(bias))
            q_block, grad = (_queries(t[:, :, :, rows], chunks) for t in (q, grad_out))
            k_block, v_block = (_keys(t[:, :, columns], chunks, len(bias)) for t in (k, v))
            weights = used = _weights(q_block, k_block, bias, hidden, scale)
            # Softmax's backward; rowsum(weights * grad_weights) = rowsum(grad * output).
            rowsum = (grad.to(weights.dtype) * _queries(out[:, :, :, rows], chunks)).sum(-1, keepdim=True)
            grad_weights = (grad @ v_block.transpose(1, 2)).to(weights.dtype)
            if dropout:
                dropped = next(kept)
                used = (weights * dropped).div_(1 - dropout)
                grad_weights.mul_(dropped).div_(1 - dropout)
            _add_to_keys(grad_v[:, :, columns], used.to(v.dtype).transpose(1, 2), grad, chunks, len(bias))
            grad_scores = grad_weights.sub_(rowsum).mul_(weights).to(q.dtype)
            _write(grad_q[:, :, :, rows], (grad_scores @ k_block).mul_(scale), chunks)
            _add_to_keys(grad_k[:, :, columns], grad_scores.transpose(1, 2), q_block, chunks, len(bias), scale)


class _Blocks(torch.autograd.Function):
    """Windowed attention block by block; query (batch, kv_heads, groups, query_len, head_dim).

    Half precision is multiplied as such, so scores are rounded to it once, as in eager attention;
    softmax and sums of gradients are float32.
    """

    @staticmethod
    def forward(ctx, query, key, value, key_padding_mask, pattern, scale, dropout):
        batch, kv_heads, groups, query_len, head_dim = query.shape
        # In memory (batch, seq, heads, head_dim): merging the heads afterwards copies nothing.
        output = query.new_empty(batch, query_len, kv_heads, groups, head_dim)
        output = output.permute(0, 2, 3, 1, 4)
        ctx.options, ctx.dropout = (key.shape[2] - query_len, *pattern, scale), dropout
        kept = _attend(query, key, value, key_padding_mask, output, ctx.options, dropout)
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
            _differentiate(*tensors, grads, ctx.options, ctx.dropout, kept)
        return grads[0], grads[1].to(key.dtype), grads[2].to(value.dtype), *[None] * 4


class _Layer(torch.autograd.Function):
    """The whole layer: keys and values are projected a segment of the sequence at a time, again in backward.

    hidden_states (batch, seq, hidden_size); four weights (hidden_size, hidden_size), each with its bias; a mask
    (batch, seq) or None; heads, window, is_causal.
    """

    @staticmethod
    def forward(ctx, hidden_states, q, q_bias, k, k_bias, v, v_bias, o, o_bias, key_padding_mask, *options):
        ctx.options = heads, window, is_causal = options
        scale = (hidden_states.shape[-1] // heads) ** -0.5
        query = F.linear(hidden_states, q, q_bias)
        context = torch.empty_like(query)
        for i, x in enumerate(hidden_states):
            keys, values = (_Rows(x, window, is_causal, x.dtype) for _ in range(2))
            for segment, queries, columns in _segments(len(x), window, is_causal):
                # Copied, not written there: selective checkpointing may be keeping the products.
                keys.advance(segment).copy_(F.linear(x[segment], k, k_bias))
                values.advance(segment).copy_(F.linear(x[segment], v, v_bias))
                real = None if key_padding_mask is None else key_padding_mask[i : i + 1, columns]
                q_heads, k_heads, v_heads, out = (
                    _heads(t, heads) for t in (query[i, queries], keys[columns], values[columns], context[i, queries])
                )
                pattern = queries.start - columns.start, window, is_causal, False, scale
                _attend(q_heads[:, :, None], k_heads, v_heads, real, out[:, :, None], pattern)
        ctx.save_for_backward(hidden_states, query, context, key_padding_mask, q, k, k_bias, v, v_bias, o)
        return F.linear(context, o, o_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden_states, query, context, key_padding_mask, q, k, k_bias, v, v_bias, o = ctx.saved_tensors
        heads, window, is_causal = ctx.options
        scale = (hidden_states.shape[-1] // heads) ** -0.5
        dtype = torch.promote_types(query.dtype, torch.float32)
        # In the order of forward's arguments; None for what needs no gradient.
        grads = [
            torch.zeros_like(t, dtype=t.dtype if n == 0 else dtype) if ctx.needs_input_grad[n] else None
            for n, t in enumerate((hidden_states, q, k_bias, k, k_bias, v, v_bias))
        ]
        for i, x in enumerate(hidden_states):

            def project_back(grad, positions, number, weight, i=i):
                projected = grad.to(query.dtype)
                if grads[0] is not None:
                    _add_product(grads[0][i, positions], projected, weight)
                if grads[number] is not None:
                    _add_product(grads[number], projected.t(), hidden_states[i, positions])
                if grads[number + 1] is not None:
                    grads[number + 1].add_(grad.sum(0))

            keys, values = (_Rows(x, window, is_causal, x.dtype) for _ in range(2))
            grad_keys, grad_values = (_Rows(x, window, is_causal, dtype) for _ in range(2))
            done = 0
            for segment, queries, columns in _segments(len(x), window, is_causal):
                torch.addmm(k_bias, x[segment], k.t(), out=keys.advance(segment))
                torch.addmm(v_bias, x[segment], v.t(), out=values.advance(segment))
                grad_keys.advance(segment).zero_()
                grad_values.advance(segment).zero_()
                real = None if key_padding_mask is None else key_padding_mask[i : i + 1, columns]
                grad_context = grad_output[i, queries] @ o
                q_heads, out, grad = (
                    _heads(t, heads)[:, :, None] for t in (query[i, queries], context[i, queries], grad_context)
                )
                k_heads, v_heads, grad_k, grad_v = (
                    _heads(t[columns], heads) for t in (keys, values, grad_keys, grad_values)
                )
                pattern = queries.start - columns.start, window, is_causal, False, scale
                # A block's gradient of the queries takes the place of that of its output, which no other block needs.
                _differentiate(q_heads, k_heads, v_heads, real, out, grad, (grad, grad_k, grad_v), pattern)
                project_back(grad_context, queries, 1, q)
                # No later query sees the keys before this one.
                last = len(x) if queries.stop == len(x) else max(0, queries.stop - window + 1)
                project_back(grad_keys[slice(done, last)], slice(done, last), 3, k)
                project_back(grad_values[slice(done, last)], slice(done, last), 5, v)
                done = last
        grads = [grad if grad is None else grad.to(query.dtype) for grad in grads]
        grad_o = grad_output.flatten(0, 1).t() @ context.flatten(0, 1) if ctx.needs_input_grad[7] else None
        grad_o_bias = grad_output.sum((0, 1)) if ctx.needs_input_grad[8] else None
        return *grads, grad_o, grad_o_bias, *[None] * 4


def _reach(window: int, is_causal: bool) -> int:
    """How many keys before a segment its queries see [tokens].

    When not causal the queries lag behind the keys, so that a segment's last query finds all keys that it sees.
    """
    return (window - 1) * (1 if is_causal else 2)


def _size(seq: int, reach: int) -> int:
    """Tokens in a segment."""
    return max(SEGMENT if seq <= 8 * SEGMENT else SEGMENT // 2, reach)


def _segments(seq: int, window: int, is_causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Cut a sequence: yield the keys of a segment, the queries answered with it, and the keys that these see."""
    reach = _reach(window, is_causal)
    lag = 0 if is_causal else window - 1
    size = _size(seq, reach)
    for start in range(0, seq, size):
        stop = min(start + size, seq)
        queries = slice(max(0, start - lag), stop if stop == seq else stop - lag)
        yield slice(start, stop), queries, slice(max(0, start - reach), stop)


class _Rows:
    """Rows of one sequence: those of the segment at hand, and before it as many as its queries reach back."""

    def __init__(self, hidden_states: torch.Tensor, window: int, is_causal: bool, dtype: torch.dtype) -> None:
        self.reach = _reach(window, is_causal)
        size = min(len(hidden_states), _size(len(hidden_states), self.reach))
        self.rows = hidden_states.new_zeros(self.reach + size, hidden_states.shape[-1], dtype=dtype)

    def advance(self, segment: slice) -> torch.Tensor:
        """Go on to the next segment; give its rows, with what stood there before."""
        self.first = segment.start - self.reach
        if segment.start:
            self.rows[: self.reach] = self.rows[len(self.rows) - self.reach :]
        return self[segment]

    def __getitem__(self, positions: slice) -> torch.Tensor:
        return self.rows[positions.start - self.first : positions.stop - self.first]


def _heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """(seq, hidden_size) as (1, heads, seq, head_dim)."""
    return rows.unflatten(-1, (heads, -1)).transpose(0, 1)[None]


class WindowAttention(SelfAttention):
    """Sliding-window attention with its projections; keeps less than projections around the op would."""

    def forward(self, hidden_states: torch.Tensor, key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        window = self.config.window
        if self.config.implementation != "blocks" or self.config.chunked or window >= hidden_states.shape[1]:
            return super().forward(hidden_states, key_padding_mask)
        check_padding(key_padding_mask, hidden_states.shape[:2])
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        tensors = [hidden_states, *(t for projection in projections for t in (projection.weight, projection.bias))]
        device_type = hidden_states.device.type
        if torch.is_autocast_enabled(device_type):
            tensors = [t.to(torch.get_autocast_dtype(device_type)) for t in tensors]
        with torch.autocast(device_type, enabled=False):
            return _Layer.apply(*tensors, key_padding_mask, self.num_heads, window, self.is_causal)


@dataclass(frozen=True)
class WindowConfig(AttentionConfig):
    """Sliding-window attention.

    Parameters
    ----------
    window : int [tokens]
        Visible keys to each side, the query's own included: w keys when causal, 2 w - 1 when not.
    implementation : {"blocks", "flash_attention_2"}
    chunked : bool
        A query sees its own chunk of ``window`` tokens and the one before, when not causal the one behind too.
    """

    window: int = 256
    implementation: str = "blocks"
    chunked: bool = False

    name: ClassVar[str] = "window"
    paper: ClassVar[str] = "Beltagy et al. 2020, arXiv:2004.05150; Jiang et al. 2023, arXiv:2310.06825"
    causal: ClassVar[tuple[bool, ...]] = (False, True)
    parameter_free: ClassVar[bool] = True
    module: ClassVar[type[SelfAttention]] = WindowAttention

    def __post_init__(self) -> None:
        _check_window(self.window, self.implementation, self.chunked)

    def attend(self, query, key, value, **options) -> torch.Tensor:
        return window_attention(query, key, value, **asdict(self), **options)

    def saved_elements(self, batch: int, heads: int, seq: int, head_dim: int, *, is_causal: bool = True) -> int:
        tokens = batch * heads * seq * head_dim
        if self.implementation == "flash_attention_2" or self.window >= seq:
            return 5 * tokens + batch * heads * seq  # as exact attention
        if self.chunked:
            return 5 * tokens  # input, query, key, value, what the heads give
        return 3 * tokens  # input, query, what the heads give

    def state_elements(self, batch: int, heads: int, seq: int, head_dim: int) -> int:
        reach = 2 * self.window if self.chunked else self.window
        return 2 * batch * heads * min(seq, reach) * head_dim  # the visible keys and values
