"""Attention layers that work on a few heads at a time and project again in backward.

Between forward and backward a layer keeps its input, the heads' outputs and the tensors that the kernel asks for (such
as a log-sum-exp for each query). Queries, keys and values exist for a few heads at a time; the price is to project
each twice.
"""

from typing import Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from memstudy.attention.base import in_autocasts_dtype


class Kernel(Protocol):
    """Attention with a backward of its own, on tensors (batch, heads, seq, head_dim)."""

    def forward(self, output: torch.Tensor, *projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Write ``output``; return the tensors that backward needs besides ``output`` and ``projected``."""

    def backward(
        self, grad_output: torch.Tensor, output: torch.Tensor, kept: tuple[torch.Tensor, ...], *projected: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return the gradient of each of ``projected``."""


def attend_by_heads(
    kernel: Kernel,
    hidden_states: torch.Tensor,
    projections: tuple[nn.Linear, ...],
    o_proj: nn.Linear,
    *,
    heads: int,
    at_once: int,
    recompute: bool = True,
) -> torch.Tensor:
    """Project, attend and project the heads' outputs, ``at_once`` heads at a time.

    Parameters
    ----------
    kernel : Kernel
        Attention of ``at_once`` heads.
    hidden_states : torch.Tensor
        (batch, seq, hidden_size).
    projections : tuple of nn.Linear
        One for each tensor that the kernel takes, (hidden_size, hidden_size) each.
    heads, at_once : int
        ``at_once`` divides ``heads``.
    recompute : bool
        Whether to project again in backward; if False the projected tensors are kept.

    Returns
    -------
    torch.Tensor
        (batch, seq, hidden_size).
    """
    tensors = [t for p in (o_proj, *projections) for t in (p.weight, p.bias)]
    hidden_states, *tensors = in_autocasts_dtype(hidden_states, *tensors)
    with torch.autocast(hidden_states.device.type, enabled=False):
        return _ByHeads.apply(kernel, heads, at_once, recompute, hidden_states, *tensors)


def _split(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(batch, seq, heads * head_dim) as (batch, heads, seq, head_dim)."""
    return tensor.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class _ByHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, heads, at_once, recompute, hidden_states, o, o_bias, *projections):
        ctx.kernel, ctx.at_once, ctx.recompute = kernel, at_once, recompute
        ctx.head_dim = hidden_states.shape[-1] // heads
        context = torch.empty_like(hidden_states)
        kept = []
        for span in _spans(context.shape[-1], ctx.head_dim * at_once):
            output = _split(context[..., span], ctx.head_dim)
            projected = _project(hidden_states, projections, span, ctx.head_dim)
            kept += kernel.forward(output, *projected)
            if not recompute:
                kept += projected
        ctx.save_for_backward(hidden_states, context, o, *projections, *kept)
        ctx.tensors = len(projections)
        return F.linear(context, o, o_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden_states, context, o, *rest = ctx.saved_tensors
        projections, kept = rest[: ctx.tensors], rest[ctx.tensors :]
        spans = list(_spans(context.shape[-1], ctx.head_dim * ctx.at_once))
        per_span = len(kept) // len(spans)
        needed = ctx.needs_input_grad[4:]
        grad_input = torch.zeros_like(hidden_states) if needed[0] else None
        grads = [torch.empty_like(t) if n else None for t, n in zip(projections, needed[3:], strict=True)]

        def differentiate(span, more):  # a function, to free one span's tensors before the next
            if ctx.recompute:
                projected = _project(hidden_states, projections, span, ctx.head_dim)
            else:
                count = len(projections) // 2
                more, projected = more[:-count], more[-count:]
            grad = _split(grad_output @ o[:, span], ctx.head_dim)
            output = _split(context[..., span], ctx.head_dim)
            for place, grad_projected in enumerate(ctx.kernel.backward(grad, output, more, *projected)):
                flat = grad_projected.transpose(1, 2).flatten(2).flatten(0, 1)  # (batch * seq, at_once * head_dim)
                if grad_input is not None:
                    grad_input.flatten(0, 1).addmm_(flat, projections[2 * place][span])
                if grads[2 * place] is not None:
                    torch.mm(flat.t(), hidden_states.flatten(0, 1), out=grads[2 * place][span])
                if grads[2 * place + 1] is not None:
                    torch.sum(flat, 0, out=grads[2 * place + 1][span])

        for number, span in enumerate(spans):
            differentiate(span, kept[number * per_span : (number + 1) * per_span])
        grad_o = grad_output.flatten(0, 1).t() @ context.flatten(0, 1) if needed[1] else None
        grad_o_bias = grad_output.sum((0, 1)) if needed[2] else None
        return None, None, None, None, grad_input, grad_o, grad_o_bias, *grads


def _spans(hidden_size: int, width: int) -> list[slice]:
    """List the columns of each group of heads that is attended at once."""
    return [slice(start, start + width) for start in range(0, hidden_size, width)]


def _project(
    hidden_states: torch.Tensor, projections: tuple[torch.Tensor, ...], span: slice, head_dim: int
) -> list[torch.Tensor]:
    """Queries, keys, ... of the heads in the columns ``span``, (batch, heads, seq, head_dim) each."""
    pairs = zip(projections[::2], projections[1::2], strict=True)
    return [_split(F.linear(hidden_states, w[span], b[span]), head_dim) for w, b in pairs]
