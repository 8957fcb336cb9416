"""The contract of an attention variant: its configuration, its layer, what it keeps in memory."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import nn


class Unavailable(RuntimeError):
    """A variant or technique can't run on this machine; the message says why."""


class SelfAttention(nn.Module):
    """Multi-head self-attention: four projections around a parameter-free op.

    Parameters
    ----------
    hidden_size : int
        Width of the layer, a multiple of ``num_heads``.
    num_heads : int
    config : AttentionConfig
        The variant; it must be parameter-free.
    is_causal : bool
        Whether a token sees only itself and the tokens before it.

    Raises
    ------
    ValueError
        If ``hidden_size`` is no multiple of ``num_heads``.
    """

    def __init__(self, hidden_size: int, num_heads: int, config: "AttentionConfig", *, is_causal: bool) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} can't be shared among num_heads={num_heads}; take a multiple")
        self.num_heads = num_heads
        self.config = config
        self.is_causal = is_causal
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within each sequence.

        Parameters
        ----------
        hidden_states : torch.Tensor
            (batch, seq, hidden_size).
        key_padding_mask : torch.Tensor, optional
            (batch, seq) bool, True for a real token.

        Returns
        -------
        torch.Tensor
            (batch, seq, hidden_size).
        """
        query, key, value = (
            proj(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, heads, seq, head_dim)
        context = self.config.attend(query, key, value, is_causal=self.is_causal, key_padding_mask=key_padding_mask)
        return self.o_proj(context.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class AttentionConfig:
    """A variant's own hyper-parameters, checked in ``__post_init__`` (`ValueError`).

    Attributes
    ----------
    name : str
        The key in ``ATTENTION``.
    paper : str
        Authors, year, arXiv id.
    causal : tuple of bool
        The values of ``is_causal`` that the variant can do.
    parameter_free : bool
        Whether the op has no weights of its own, so that it fits any trained model.
    module : type
        The layer, built as ``module(hidden_size, num_heads, config, is_causal=...)``.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    causal: ClassVar[tuple[bool, ...]]
    parameter_free: ClassVar[bool]
    module: ClassVar[type[nn.Module]]

    def settings(self) -> dict:
        """Give name and hyper-parameters as plain values, ``{"variant": ..., ...}``."""
        return {"variant": self.name, **asdict(self)}

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        is_causal: bool,
        key_padding_mask: torch.Tensor | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Run the variant's op with these hyper-parameters (parameter-free variants only).

        Parameters
        ----------
        query : torch.Tensor
            (batch, heads, query_len, head_dim).
        key, value : torch.Tensor
            (batch, kv_heads, key_len, head_dim), kv_heads a divisor of heads (grouped queries).
        is_causal : bool
            A query sees no later key; with fewer queries than keys (decoding with a cache) the last
            query sees the last key.
        key_padding_mask : torch.Tensor, optional
            (batch, key_len) bool, True for a real token. A query that sees no key gives zeros.
        scale : float, optional
            Factor on the scores; head_dim ** -0.5 by default.
        dropout : float
            Probability with which an attention weight is dropped.

        Returns
        -------
        torch.Tensor
            (batch, heads, query_len, head_dim).
        """
        raise NotImplementedError

    def saved_elements(self, batch: int, heads: int, seq: int, head_dim: int, *, is_causal: bool = True) -> int:
        """Count what autograd keeps for the op's backward [elements].

        Every distinct storage once, the inputs query, key, value included, each in elements of its
        own dtype; without padding, dropout or autocast, as many keys as queries, as many key heads
        as query heads.
        """
        raise NotImplementedError

    def state_elements(self, batch: int, heads: int, seq: int, head_dim: int) -> int:
        """Count what decoding must keep after ``seq`` tokens to make the next one [elements]."""
        raise NotImplementedError


def check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool,
    key_padding_mask: torch.Tensor | None,
) -> None:
    """Refuse tensors that break the contract of `AttentionConfig.attend`.

    Raises
    ------
    ValueError
        Naming the tensor, its shape or dtype, and what was expected.
    """
    batch, heads, query_len, head_dim = query.shape
    kv_heads, key_len = key.shape[1:3]
    if key.shape != value.shape or (key.shape[0], key.shape[3]) != (batch, head_dim):
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} don't "
            "fit; expected (batch, heads, seq, head_dim) each, key and value of one shape"
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads can't share {kv_heads} key heads; take a multiple")
    if is_causal and query_len > key_len:
        raise ValueError(
            f"causal attention of {query_len} queries to {key_len} keys: the first queries would "
            "see nothing; give at least as many keys as queries"
        )
    if key_padding_mask is not None and (
        key_padding_mask.dtype != torch.bool or key_padding_mask.shape != (batch, key_len)
    ):
        raise ValueError(
            f"key_padding_mask is {tuple(key_padding_mask.shape)} {key_padding_mask.dtype}; "
            f"expected {(batch, key_len)} torch.bool, True for a real token"
        )
