"""Low-rank projections around exact attention: W ≈ A B, from the truncated singular value decomposition.

With the decomposition W = U S Vᵀ of a (d_out, d_in) weight, the best approximation of rank r (Eckart and Young 1936,
doi:10.1007/BF02288367) keeps the r largest singular values::

    W ≈ (U_r S_r^½) (S_r^½ V_rᵀ)

The two factors have r (d_in + d_out) weights instead of d_in d_out: fewer only if r < d_in d_out / (d_in + d_out),
which is half the width of a square projection. The bias stays on the second factor.

A layer made from scratch draws its factors as `nn.Linear` does and decomposes nothing. Not implemented: scores computed
within the rank, or a cache of r numbers for each token in place of keys and values.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from memstudy.attention.base import AttentionConfig, SelfAttention
from memstudy.attention.softmax import softmax_attention

PARTS = "qkvo"


def _factors(in_features: int, out_features: int, rank: int, *, bias: bool, **options) -> nn.Sequential:
    rank = min(rank, in_features, out_features)
    first = nn.Linear(in_features, rank, bias=False, **options)
    return nn.Sequential(first, nn.Linear(rank, out_features, bias=bias, **options))


@torch.no_grad()
def low_rank(linear: nn.Linear, rank: int) -> nn.Sequential:
    """Replace a projection by two, whose product is the best approximation of rank ``rank``.

    Parameters
    ----------
    linear : nn.Linear
        (d_out, d_in) weight, any dtype and device; not modified.
    rank : int
        At min(d_in, d_out) or above the product equals the weight, up to rounding.

    Returns
    -------
    nn.Sequential
        Linear layers from d_in to rank and from rank to d_out, the second with the bias.
    """
    weight = linear.weight
    options = {"dtype": weight.dtype, "device": weight.device}
    factors = _factors(*weight.shape[::-1], rank, bias=linear.bias is not None, **options)
    left, singular, right = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), False)
    kept = len(factors[0].weight)
    root = singular[:kept].sqrt()
    factors[0].weight.copy_(root[:, None] * right[:kept])
    factors[1].weight.copy_(left[:, :kept] * root)
    if linear.bias is not None:
        factors[1].bias.copy_(linear.bias)
    for factor in factors.parameters():
        factor.requires_grad_(weight.requires_grad)
    return factors


class LowRankAttention(SelfAttention):
    """Exact attention with factored projections."""

    def __init__(self, hidden_size: int, num_heads: int, config: "LowRankConfig", *, is_causal: bool) -> None:
        super().__init__(hidden_size, num_heads, config, is_causal=is_causal)
        for part in config.parts:
            setattr(self, f"{part}_proj", _factors(hidden_size, hidden_size, config.rank, bias=True))


@dataclass(frozen=True)
class LowRankConfig(AttentionConfig):
    """Low-rank projections.

    Parameters
    ----------
    rank : int
        Rank of each factored projection, at most its full rank.
    parts : str
        Projections to factor: letters of "qkvo", each at most once.
    """

    rank: int = 16
    parts: str = PARTS

    name: ClassVar[str] = "lowrank"
    paper: ClassVar[str] = "Eckart and Young 1936, doi:10.1007/BF02288367"
    causal: ClassVar[tuple[bool, ...]] = (False, True)
    parameter_free: ClassVar[bool] = False
    cross: ClassVar[bool] = True
    projections: ClassVar[bool] = True
    module: ClassVar[type[SelfAttention]] = LowRankAttention

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"lowrank: rank={self.rank!r}; take at least 1, a whole number")
        if not self.parts or set(self.parts) - set(PARTS) or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"lowrank: parts={self.parts!r}; take letters of {PARTS!r}, each at most once")

    def factor(self, part: str, linear: nn.Linear) -> nn.Module:
        """Factor a trained projection, ``part`` of "qkvo"; return ``linear`` itself if ``part`` isn't in ``parts``."""
        return low_rank(linear, self.rank) if part in self.parts else linear

    def attend(self, query, key, value, **options) -> torch.Tensor:
        return softmax_attention(query, key, value, implementation="sdpa", **options)

    def saved_elements(self, batch: int, heads: int, seq: int, head_dim: int, *, is_causal: bool = True) -> int:
        tensors = 5 * batch * heads * seq * head_dim + batch * heads * seq  # as in exact attention
        return tensors + len(self.parts) * batch * seq * min(self.rank, heads * head_dim)  # between the factors
