"""Base classes of the attention variants: configuration, layer, and the number of elements kept in memory."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import nn


class Unavailable(RuntimeError):
    """A variant or technique can't run on this machine; the message says why."""


class SelfAttention(nn.Module):
    """Multi-head self-attention: four projections around an op on (batch, heads, seq, head_dim).

    Parameters
    ----------
    hidden_size : int
        Width of the layer, a multiple of ``num_heads``.
    num_heads : int
    config : AttentionConfig
        The variant.
    is_causal : bool
        Whether a token sees only itself and the tokens before it.

    Raises
    ------
    ValueError
        If ``hidden_size`` is not a multiple of ``num_heads``, or the variant does not support ``is_causal``.
    """

    def __init__(self, hidden_size: int, num_heads: int, config: "AttentionConfig", *, is_causal: bool) -> None:
        super().__init__()
        check_heads(hidden_size, num_heads)
        config.check_causal(is_causal)
        self.num_heads = num_heads
        self.config = config
        self.is_causal = is_causal
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.weights = config.make_weights(hidden_size // num_heads)

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
        options = {} if self.weights is None else {"weights": self.weights}
        context = self.config.attend(
            query, key, value, is_causal=self.is_causal, key_padding_mask=key_padding_mask, **options
        )
        return self.o_proj(context.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class AttentionConfig:
    """Hyper-parameters of an attention variant; ``__post_init__`` raises `ValueError` for invalid ones.

    Attributes
    ----------
    name : str
        The key in ``ATTENTION``.
    paper : str
        Authors, year, arXiv id.
    causal : tuple of bool
        The values of ``is_causal`` that the variant supports.
    parameter_free : bool
        Whether the op works on query, key and value alone, without weights, so that it fits any trained model.
    cross : bool
        Whether queries of one sequence can attend to the keys of another.
    score_bias : bool
        Whether the op can add a bias for each pair of positions to the scores, as T5 needs.
    drops_weights : bool
        Whether the op can drop attention weights.
    projections : bool
        Whether the variant replaces the projections (`factor`) around exact attention.
    module : type
        The layer, built as ``module(hidden_size, num_heads, config, is_causal=...)``.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    causal: ClassVar[tuple[bool, ...]]
    parameter_free: ClassVar[bool]
    cross: ClassVar[bool] = False
    score_bias: ClassVar[bool] = False
    drops_weights: ClassVar[bool] = True
    projections: ClassVar[bool] = False
    module: ClassVar[type[nn.Module]]

    def settings(self) -> dict:
        """Return name and hyper-parameters as plain values, ``{"variant": ..., ...}``."""
        return {"variant": self.name, **asdict(self)}

    def check_causal(self, is_causal: bool) -> None:
        """Raise if the variant does not support ``is_causal``.

        Raises
        ------
        ValueError
            Naming the variant and the direction that it supports.
        """
        if is_causal not in self.causal:
            able = "causal" if self.causal == (True,) else "bidirectional"
            raise ValueError(f"{self.name} is {able} only, asked for is_causal={is_causal}; take another variant")

    def make_weights(self, head_dim: int) -> nn.Module | None:
        """Make the module that `attend` takes as ``weights``; None for an op without weights."""
        return None

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
        """Run the variant's op with these hyper-parameters.

        Variants with `make_weights` also take its module as ``weights``; variants with `score_bias` also take
        ``score_bias``, a tensor that broadcasts to (batch, heads, query_len, key_len).

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
            Probability of dropping an attention weight.

        Returns
        -------
        torch.Tensor
            (batch, heads, query_len, head_dim).
        """
        raise NotImplementedError

    def saved_elements(self, batch: int, heads: int, seq: int, head_dim: int, *, is_causal: bool = True) -> int:
        """Count the elements that autograd keeps for the backward of the layer `module`.

        Counts each distinct storage once, in elements of its own dtype: the input included, the layer's
        parameters excluded. Assumes no padding, dropout or autocast. A model that `huggingface.convert` gives the op
        alone keeps its own projections, and so the query, key and value too that some layers project again.
        """
        raise NotImplementedError

    def state_elements(self, batch: int, heads: int, seq: int, head_dim: int) -> int:
        """Count the elements that decoding must keep after ``seq`` tokens to make the next token.

        Here the keys and values of all tokens.
        """
        return 2 * batch * heads * seq * head_dim


def check_heads(hidden_size: int, num_heads: int) -> None:
    """Refuse a width that the heads can't share equally.

    Raises
    ------
    ValueError
        Naming both.
    """
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"hidden_size={hidden_size} can't be shared among num_heads={num_heads}; take a multiple")


def in_autocasts_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``tensors`` in autocast's dtype where autocast is on, as autocast casts SDPA's arguments."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device_type)) for tensor in tensors)


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
    check_padding(key_padding_mask, (batch, key_len))


def check_padding(key_padding_mask: torch.Tensor | None, shape: tuple[int, int]) -> None:
    """Refuse a mask that isn't bool of ``shape`` (batch, key_len).

    Raises
    ------
    ValueError
        Naming the mask's shape and dtype, and what was expected.
    """
    if key_padding_mask is not None and (key_padding_mask.dtype != torch.bool or key_padding_mask.shape != shape):
        raise ValueError(
            f"key_padding_mask is {tuple(key_padding_mask.shape)} {key_padding_mask.dtype}; "
            f"expected {tuple(shape)} torch.bool, True for a real token"
        )
