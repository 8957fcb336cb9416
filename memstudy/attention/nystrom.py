"""Nyströmformer: softmax attention approximated through landmarks (Xiong et al. 2021, arXiv:2102.03902)::

    Attention(Q, K, V) = softmax(Q K̃ᵀ s) · softmax(Q̃ K̃ᵀ s)⁺ · softmax(Q̃ Kᵀ s) V          (equation 13)

Q̃ and K̃ are the landmarks, the means of m segments of queries and keys; s is the scale. The paper's iteration
approximates the pseudo-inverse of A = softmax(Q̃ K̃ᵀ s) (equation 11, section 3.2), from Z₀ = Aᵀ / (‖A‖₁ ‖A‖∞)::

    Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z)))

Time and memory are linear in the sequence length: in the outer factors the queries attend to m landmarks, and m
landmarks attend to the keys. Backward recomputes the (m, m) part, so that no tensor of the iterations is kept.

Segments are cut by the real tokens of each sequence, so neither padding nor the rest of the batch changes anything;
their lengths differ by one token at most. With no more real tokens than landmarks attention is exact, as in the
authors' code.

Not implemented: the depth-wise convolution of the values that the authors' layer adds to the output. There is no
causal form: landmarks hold later tokens.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch.autograd.function import once_differentiable

from memstudy.attention.base import AttentionConfig, SelfAttention, check_inputs
from memstudy.attention.softmax import softmax_attention


def nystrom_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    landmarks: int,
    iterations: int,
    is_causal: bool,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend through landmarks; see `AttentionConfig.attend` for the tensors. Differentiable once.

    Parameters
    ----------
    landmarks : int [tokens]
    iterations : int
        Iterations for the pseudo-inverse.

    Raises
    ------
    ValueError
        If causal, with dropout, for unequal numbers of queries and keys, or tensors that don't fit.
    """
    check_inputs(query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask)
    _check(landmarks, iterations)
    if is_causal:
        raise ValueError("nystrom's landmarks hold later tokens, so it can't be causal; take another variant")
    if dropout:
        raise ValueError(
            f"nystrom has no weights to drop, got dropout={dropout}; set the model's attention dropout to 0"
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"nystrom: {query.shape[2]} queries against {key.shape[2]} keys; landmarks are those of one sequence, "
            "use softmax between two"
        )
    exact = {"implementation": "sdpa", "is_causal": False, "scale": scale}
    if key.shape[2] <= landmarks:
        return softmax_attention(query, key, value, key_padding_mask=key_padding_mask, **exact)
    groups = query.shape[1] // key.shape[1]
    members, real_tokens = _segments(key, landmarks, key_padding_mask)
    sizes = members.sum(-1, keepdim=True)
    means = members.to(query.dtype) / sizes.clamp(min=1)
    query_landmarks, key_landmarks = _landmarks(means, query), _landmarks(means, key)
    context = softmax_attention(query_landmarks, key, value, key_padding_mask=key_padding_mask, **exact)
    if groups > 1:
        key_landmarks = key_landmarks.repeat_interleave(groups, dim=1)
    filled = None if key_padding_mask is None else members.any(-1)  # (batch, landmarks)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    solved = _Solve.apply(query_landmarks, key_landmarks, context, filled, iterations, factor)
    if filled is not None:
        # With no more tokens than landmarks a segment is one token or empty: attention to the segments is exact.
        tokens = _landmarks(means, value).repeat_interleave(groups, dim=1)
        solved = torch.where((real_tokens <= landmarks)[:, None, None, None], tokens.to(solved.dtype), solved)
    return softmax_attention(query, key_landmarks.to(query.dtype), solved, key_padding_mask=filled, **exact)


def _check(landmarks: int, iterations: int) -> None:
    for name, value in (("landmarks", landmarks), ("iterations", iterations)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"nystrom: {name}={value!r}; take at least 1, a whole number")


def _segments(
    key: torch.Tensor, landmarks: int, key_padding_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Assign the tokens to segments, and count the real tokens.

    Returns
    -------
    members : torch.Tensor
        bool, (batch or 1, landmarks, seq).
    real_tokens : torch.Tensor or None
        (batch), None without padding.
    """
    seq, numbers = key.shape[2], torch.arange(landmarks, device=key.device)[:, None]
    if key_padding_mask is None:
        position = torch.arange(seq, device=key.device)[None]
        return (position * landmarks // seq)[:, None] == numbers, None
    position = key_padding_mask.cumsum(-1) - 1  # among the real tokens
    real_tokens = key_padding_mask.sum(-1)
    segment = position * landmarks // real_tokens.clamp(min=1)[:, None]
    return (segment[:, None] == numbers) & key_padding_mask[:, None], real_tokens


def _landmarks(means: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Average (batch, heads, seq, head_dim) over each segment: (batch, heads, landmarks, head_dim)."""
    batch, heads = tokens.shape[:2]
    averaged = torch.bmm(means.expand(batch, -1, -1), tokens.transpose(1, 2).flatten(2))
    return averaged.unflatten(-1, (heads, -1)).transpose(1, 2)


class _Solve(torch.autograd.Function):
    """softmax(Q̃ K̃ᵀ s)⁺ times the landmarks' context, all (batch, heads, landmarks, head_dim); at least in float32."""

    @staticmethod
    def forward(ctx, query, key, context, filled, iterations, scale):
        ctx.save_for_backward(query, key, context, filled)
        ctx.options = iterations, scale
        return _solve(query, key, context, filled, iterations, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        *tensors, filled = ctx.saved_tensors
        with torch.enable_grad():
            tensors = [t.detach().requires_grad_() for t in tensors]
            solved = _solve(*tensors, filled, *ctx.options)
        return *torch.autograd.grad(solved, tensors, gradient), None, None, None


def _solve(query, key, context, filled, iterations, scale):
    dtype = torch.promote_types(context.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(dtype) * scale @ key.to(dtype).transpose(-1, -2)
        if filled is not None:
            # The lowest finite number, not -inf: a row without landmarks must not turn into NaN.
            scores = scores.masked_fill(~filled[:, None, None], torch.finfo(dtype).min)
        kernel = scores.softmax(-1)
        # The norms of Z₀, for each head: rows sum to 1, so ‖A‖∞ = 1 and only ‖A‖₁, the largest column sum, is left.
        inverse = kernel.transpose(-1, -2) / kernel.sum(-2).amax(-1)[..., None, None]
        identity = torch.eye(kernel.shape[-1], dtype=dtype, device=kernel.device)
        for _ in range(iterations):
            product = kernel @ inverse
            inner = 15 * identity - product @ (7 * identity - product)
            inverse = 0.25 * inverse @ (13 * identity - product @ inner)
        return (inverse @ context.to(dtype)).to(context.dtype)


class NystromAttention(SelfAttention):
    """Nyström attention with its projections."""


@dataclass(frozen=True)
class NystromConfig(AttentionConfig):
    """Nyström attention.

    Parameters
    ----------
    landmarks : int [tokens]
        Number of segments, whose means stand for queries and keys; the paper's m.
    iterations : int
        Iterations for the pseudo-inverse.
    """

    landmarks: int = 64
    iterations: int = 6

    name: ClassVar[str] = "nystrom"
    paper: ClassVar[str] = "Xiong et al. 2021, arXiv:2102.03902"
    causal: ClassVar[tuple[bool, ...]] = (False,)
    parameter_free: ClassVar[bool] = True
    drops_weights: ClassVar[bool] = False
    module: ClassVar[type[SelfAttention]] = NystromAttention

    def __post_init__(self) -> None:
        _check(self.landmarks, self.iterations)

    def attend(self, query, key, value, **options) -> torch.Tensor:
        return nystrom_attention(query, key, value, **asdict(self), **options)

    def saved_elements(self, batch: int, heads: int, seq: int, head_dim: int, *, is_causal: bool = True) -> int:
        tensors = 5 * batch * heads * seq * head_dim + batch * heads * seq  # as in exact attention
        if seq <= self.landmarks:
            return tensors
        # Landmarks of queries and keys, their context, ``solved``, a log-sum-exp for each landmark; the means.
        return tensors + batch * heads * self.landmarks * (4 * head_dim + 1) + self.landmarks * seq

    def state_elements(self, batch: int, heads: int, seq: int, head_dim: int) -> int:
        return 3 * batch * heads * seq * head_dim  # queries too: a new token moves the segments
