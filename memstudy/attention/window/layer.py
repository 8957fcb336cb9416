"""The layer, which projects keys and values one segment of the sequence at a time, and once more in backward."""

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from memstudy.attention.base import SelfAttention, check_padding, in_autocasts_dtype
from memstudy.attention.window.blocks import add_product, attend, differentiate

# Tokens that the layer projects at once, or the window's reach if that is longer. In sequences of more than eight
# segments, half of this size is as fast.
SEGMENT = 1024


class WindowAttention(SelfAttention):
    """Sliding-window attention with its projections; saves fewer tensors than projections around the op."""

    def forward(self, hidden_states: torch.Tensor, key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        window = self.config.window
        if self.config.implementation != "blocks" or self.config.chunked or window >= hidden_states.shape[1]:
            return super().forward(hidden_states, key_padding_mask)
        check_padding(key_padding_mask, hidden_states.shape[:2])
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        tensors = in_autocasts_dtype(
            hidden_states, *(t for projection in projections for t in (projection.weight, projection.bias))
        )
        with torch.autocast(hidden_states.device.type, enabled=False):
            return _Layer.apply(*tensors, key_padding_mask, self.num_heads, window, self.is_causal)


class _Layer(torch.autograd.Function):
    """The whole layer, with keys and values projected by segments in forward and again in backward.

    Arguments: hidden_states (batch, seq, hidden_size); four weights (hidden_size, hidden_size), each followed by its
    bias; a mask (batch, seq) or None; heads, window, is_causal.
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
                # Copied, not written with out=: selective checkpointing may be keeping the products.
                keys.advance(segment).copy_(F.linear(x[segment], k, k_bias))
                values.advance(segment).copy_(F.linear(x[segment], v, v_bias))
                real = None if key_padding_mask is None else key_padding_mask[i : i + 1, columns]
                q_heads, k_heads, v_heads, out = (
                    _heads(t, heads) for t in (query[i, queries], keys[columns], values[columns], context[i, queries])
                )
                pattern = queries.start - columns.start, window, is_causal, False, scale
                attend(q_heads[:, :, None], k_heads, v_heads, real, out[:, :, None], pattern)
        ctx.save_for_backward(hidden_states, query, context, key_padding_mask, q, k, k_bias, v, v_bias, o)
        return F.linear(context, o, o_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden_states, query, context, key_padding_mask, q, k, k_bias, v, v_bias, o = ctx.saved_tensors
        heads, window, is_causal = ctx.options
        scale = (hidden_states.shape[-1] // heads) ** -0.5
        dtype = torch.promote_types(query.dtype, torch.float32)
        # In the order of forward's arguments; None for an argument without gradient.
        grads = [
            torch.zeros_like(t, dtype=t.dtype if n == 0 else dtype) if ctx.needs_input_grad[n] else None
            for n, t in enumerate((hidden_states, q, k_bias, k, k_bias, v, v_bias))
        ]
        for i, x in enumerate(hidden_states):

            def project_back(grad, positions, number, weight, i=i):
                projected = grad.to(query.dtype)
                if grads[0] is not None:
                    add_product(grads[0][i, positions], projected, weight)
                if grads[number] is not None:
                    add_product(grads[number], projected.t(), hidden_states[i, positions])
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
                # A block's query gradient overwrites its output gradient, which no other block needs.
                differentiate(q_heads, k_heads, v_heads, real, out, grad, (grad, grad_k, grad_v), pattern)
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
    """Number of keys before a segment that the segment's queries see [tokens].

    If not causal, the queries lag behind the keys, so that a segment's last query finds all of its keys.
    """
    return (window - 1) * (1 if is_causal else 2)


def _size(seq: int, reach: int) -> int:
    """Tokens in a segment."""
    return max(SEGMENT if seq <= 8 * SEGMENT else SEGMENT // 2, reach)


def _segments(seq: int, window: int, is_causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Cut a sequence: yield a segment's keys, the queries computed with this segment, and the keys they see."""
    reach = _reach(window, is_causal)
    lag = 0 if is_causal else window - 1
    size = _size(seq, reach)
    for start in range(0, seq, size):
        stop = min(start + size, seq)
        queries = slice(max(0, start - lag), stop if stop == seq else stop - lag)
        yield slice(start, stop), queries, slice(max(0, start - reach), stop)


class _Rows:
    """Rows of one sequence: the current segment's rows, and before them as many as the queries reach back."""

    def __init__(self, hidden_states: torch.Tensor, window: int, is_causal: bool, dtype: torch.dtype) -> None:
        self.reach = _reach(window, is_causal)
        size = min(len(hidden_states), _size(len(hidden_states), self.reach))
        self.rows = hidden_states.new_zeros(self.reach + size, hidden_states.shape[-1], dtype=dtype)

    def advance(self, segment: slice) -> torch.Tensor:
        """Move to the next segment and return its rows, which still hold old values."""
        self.first = segment.start - self.reach
        if segment.start:
            self.rows[: self.reach] = self.rows[len(self.rows) - self.reach :]
        return self[segment]

    def __getitem__(self, positions: slice) -> torch.Tensor:
        return self.rows[positions.start - self.first : positions.stop - self.first]


def _heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """(seq, hidden_size) -> (1, heads, seq, head_dim)."""
    return rows.unflatten(-1, (heads, -1)).transpose(0, 1)[None]
