"""Softmax over a window, forward and backward: blocks of queries against the slice of keys that each block sees."""

import itertools
from collections.abc import Iterator

import torch

# Queries in a block. Small blocks waste few scores outside the window and need little memory, large
# blocks launch few kernels; 64 was fastest of 32, 64, 128, 256 with window 256 on two cores.
QUERY_BLOCK = 64
# Several chunks are computed at once, up to this number of query-key pairs per head.
PAIRS = 2**18
# A group has an eighth of the batch's sequences, so that the number of kernels stays bounded as the batch grows.
BATCH_GROUPS = 8


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    output: torch.Tensor,
    options: tuple[int, int, bool, bool, float],
    dropout: float = 0.0,
) -> list[torch.Tensor]:
    """Write the attention's result into ``output``, block by block.

    Parameters
    ----------
    query, output : torch.Tensor
        (batch, kv_heads, groups, query_len, head_dim).
    key, value : torch.Tensor
        (batch, kv_heads, key_len, head_dim).
    key_padding_mask : torch.Tensor, optional
        (batch, key_len) bool, True for a real token.
    options : tuple
        offset [tokens] (number of keys before the first query's own key), window, is_causal, chunked, scale.

    Returns
    -------
    list of torch.Tensor
        For each block, a bool mask of the weights that dropout kept; empty without dropout.
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


def differentiate(
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
    """Write the query's gradient into ``grads[0]``; add the key's and the value's to ``grads[1]`` and ``grads[2]``."""
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


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
    """Add ``scale * left @ right`` to ``total`` in place; ``total`` may have the product's first axis split in two."""
    if total.dtype == left.dtype and total.dim() == 2:
        total.addmm_(left, right, alpha=scale)
    elif total.dtype == left.dtype and len(total) == 1:
        total[0].baddbmm_(left, right, alpha=scale)
    else:
        total.add_((left @ right).view(total.shape), alpha=scale)


def _groups(batch: int) -> Iterator[slice]:
    """Cut a batch into groups of sequences, each an eighth of the batch but at least one sequence.

    With one sequence per group, the slices of keys stay views in the matrix products. Scratch is for one group only.
    """
    size = max(1, batch // BATCH_GROUPS)
    for start in range(0, batch, size):
        yield slice(start, start + size)


def _blocks(
    query_len: int, key_len: int, offset: int, window: int, is_causal: bool, chunked: bool, like: torch.Tensor
) -> Iterator[tuple[slice, slice, int, torch.Tensor]]:
    """Cut the queries into blocks; query i has the position i + ``offset`` among the keys.

    Yields
    ------
    rows, columns : slice
        The queries, and the keys that any of these queries sees.
    chunks : int
        Number of chunks in the block. All have the same shape; each starts one chunk's number of queries after the one
        before, among the queries and among the keys.
    bias : torch.Tensor
        (rows, columns) of a chunk, in ``like``'s dtype and device: 0 where a query sees a key, elsewhere far below any
        score but finite, since -inf would turn a row without visible keys into NaN.
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
    """Number of queries, number of keys, and distance of the first query after the first key [tokens]."""
    return rows.stop - rows.start, columns.stop - columns.start, rows.start + offset - columns.start


def _weights(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, hidden: torch.Tensor | None, scale: float):
    """Softmax over a block's visible keys, in float32 or wider.

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
    """(batch, kv_heads, groups, rows, dim) -> (batch * kv_heads * chunks, groups * rows of a chunk, dim)."""
    if chunks == 1:
        return tensor.flatten(2, 3).flatten(0, 1)
    return tensor.unflatten(3, (chunks, -1)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _write(total: torch.Tensor, block: torch.Tensor, chunks: int) -> None:
    """Write ``block``, in the shape given by `_queries`, to ``total`` (batch, kv_heads, groups, rows, dim)."""
    if chunks > 1:
        total = total.unflatten(3, (chunks, -1)).transpose(2, 3)
    total.copy_(block.view(total.shape))


def _keys(tensor: torch.Tensor, chunks: int, step: int) -> torch.Tensor:
    """(batch, kv_heads, columns, dim) -> (batch * kv_heads * chunks, columns of a chunk, dim).

    Each chunk starts ``step`` columns after the one before. A single chunk of one sequence is not copied.
    """
    if chunks == 1:
        return tensor.flatten(0, 1)
    width = tensor.shape[2] - (chunks - 1) * step
    return tensor.unfold(2, width, step).transpose(-1, -2).flatten(0, 2)


def _padding(real: torch.Tensor | None, kv_heads: int, chunks: int, step: int) -> torch.Tensor | None:
    """``hidden`` of `_weights` from ``real`` (batch, columns), True for a real token."""
    if real is None:
        return None
    width = real.shape[1] - (chunks - 1) * step
    hidden = ~real.unfold(1, width, step)  # (batch, chunks, columns of a chunk)
    return hidden[:, None, :, None].expand(-1, kv_heads, -1, -1, -1).flatten(0, 2)


def _add_to_keys(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, chunks: int, step: int, scale: float = 1.0
):
    """Add ``scale * left @ right``, in the shape given by `_keys`, to ``total`` (batch, kv_heads, columns, dim)."""
    if chunks == 1:
        add_product(total, left, right, scale)
        return
    product = (left @ right).view(*total.shape[:2], chunks, -1, total.shape[-1])
    for start in range(0, product.shape[3], step):
        part = total[:, :, start : start + chunks * step].unflatten(2, (chunks, step))
        part.add_(product[:, :, :, start : start + step], alpha=scale)
