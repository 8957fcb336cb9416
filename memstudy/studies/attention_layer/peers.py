"""Attention layers of other packages, by name, which a user could choose instead of memstudy's variants.

A peer is a layer with the same interface, ``layer(hidden_states)`` on ``(batch, seq, hidden)``, that does the work of
one variant at the same widths and heads, with its package's projections. A package that has only an op gets the four
projections of `SelfAttention` around the op. No study's model contains a peer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from memstudy.attention import Unavailable

if TYPE_CHECKING:
    from memstudy.studies.attention_layer.run import LayerRun


@dataclass(frozen=True)
class Peer:
    """An attention layer of another package.

    Attributes
    ----------
    variant : str
        The variant whose work the layer does, a name in ``ATTENTION``.
    make : callable
        ``make(run)`` returns the layer for a `LayerRun`, or raises `Unavailable`.
    """

    variant: str
    make: Callable[[LayerRun], nn.Module]


def installed(package: str, module: str) -> ModuleType:
    """Import ``module`` of ``package``; raises `Unavailable`, with the remedy, if the import fails."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package} cannot be imported ({error}); pip install 'memstudy[bench]'") from None


class _Projected(nn.Module):
    """Four projections around an op on (batch, heads, seq, head_dim)."""

    def __init__(self, hidden_size: int, n_heads: int, op: Callable[..., torch.Tensor]):
        super().__init__()
        self.n_heads, self.op = n_heads, op
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden_size, hidden_size) for _ in range(4))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        heads = (
            proj(hidden_states).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, heads, seq, head_dim)
        return self.o_proj(self.op(*heads).transpose(1, 2).flatten(2))


def _torch(run: LayerRun) -> nn.Module:
    """PyTorch's fused attention."""

    return _Projected(run.hidden_size, run.n_heads, partial(F.scaled_dot_product_attention, is_causal=run.is_causal))


def _local(run: LayerRun, **options) -> nn.Module:
    package = installed("local-attention", "local_attention")
    op = package.LocalAttention(window_size=run.mixer().window, causal=run.is_causal, autopad=True, **options)
    return _Projected(run.hidden_size, run.n_heads, op)


def _local_attention(run: LayerRun) -> nn.Module:
    """The variant's window plus one key on each side, without the package's rotary positions."""
    return _local(run, exact_windowsize=True)


def _local_attention_defaults(run: LayerRun) -> nn.Module:
    """The package's defaults: a query sees whole blocks, one to two windows back; rotary positions."""
    return _local(run, dim=run.hidden_size // run.n_heads)


def _reformer_pytorch(run: LayerRun) -> nn.Module:
    """The sequence length must be a multiple of two chunks."""
    package = installed("reformer-pytorch", "reformer_pytorch")
    options = {"bucket_size": run.mixer().chunk_length, "n_hashes": run.mixer().num_hashes, "causal": run.is_causal}
    return package.LSHSelfAttention(run.hidden_size, run.n_heads, **options)


class _ReformerAttention(nn.Module):
    """transformers' LSH attention with its output projection, without the layer norm before them."""

    def __init__(self, attention: nn.Module, output: nn.Module):
        super().__init__()
        self.attention, self.output = attention, output

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.output(self.attention(hidden_states).hidden_states)


def _transformers(run: LayerRun) -> nn.Module:
    from transformers import ReformerConfig
    from transformers.models.reformer import modeling_reformer

    config = run.mixer()
    # The number and factors of buckets that the layer itself would choose, with a warning.
    power = (2 * (run.seq_len // config.chunk_length)).bit_length() - 1
    whole = 2**power <= 2 * max(int((run.seq_len // config.chunk_length) ** 0.5), config.chunk_length)
    reformer = ReformerConfig(
        hidden_size=run.hidden_size,
        num_attention_heads=run.n_heads,
        attention_head_size=run.hidden_size // run.n_heads,
        lsh_attn_chunk_length=config.chunk_length,
        num_buckets=2**power if whole else [2 ** (power // 2), 2 ** (power - power // 2)],
        num_hashes=config.num_hashes,
        is_decoder=run.is_causal,
        lsh_attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        hash_seed=0,  # the same rotations each time
        max_position_embeddings=run.seq_len,
    )
    return _ReformerAttention(
        modeling_reformer.LSHSelfAttention(reformer), modeling_reformer.ReformerSelfOutput(reformer)
    )


def _linformer(run: LayerRun) -> nn.Module:
    package = installed("linformer", "linformer")
    return package.LinformerSelfAttention(run.hidden_size, run.seq_len, k=run.mixer().rank, heads=run.n_heads)


def _performer_pytorch(run: LayerRun) -> nn.Module:
    """Causal attention uses the package's own fallback for its CUDA extension."""
    package = installed("performer-pytorch", "performer_pytorch")
    sizes = {"heads": run.n_heads, "dim_head": run.hidden_size // run.n_heads, "nb_features": run.mixer().features}
    return package.SelfAttention(run.hidden_size, causal=run.is_causal, **sizes)


class _ReleasedMemSizer(nn.Module):
    """MemSizer in the plain form of its authors' released code (Zhang & Cai 2022, arXiv:2203.12644).

    The causal form materialises the product of each token's key and value, ``(seq, batch, slots, hidden)``, and sums
    with a ``(seq, seq)`` mask. The other form is S = k^T v / sqrt(n). Written from the description, not copied.
    """

    def __init__(self, hidden_size: int, n_heads: int, slots: int, is_causal: bool):
        super().__init__()
        self.n_heads, self.is_causal = n_heads, is_causal
        self.query_proj = nn.Linear(hidden_size, n_heads * slots)
        self.key_proj, self.key_norm = nn.Linear(hidden_size, slots), nn.LayerNorm(slots)
        self.value_proj, self.value_norm = nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size)

    def forward(self, hidden_states: torch.Tensor, *, memory: torch.Tensor | None = None) -> torch.Tensor:
        memory = hidden_states if memory is None else memory
        weights = self.query_proj(hidden_states).unflatten(-1, (self.n_heads, -1)).softmax(-1).mean(-2)
        key, value = self.key_norm(self.key_proj(memory)), self.value_norm(self.value_proj(memory))
        seq_len = memory.shape[1]
        if not self.is_causal:
            summary = torch.einsum("bsk,bsd->bkd", key, value) * seq_len**-0.5
            return torch.einsum("btk,bkd->btd", weights, summary)
        products = torch.einsum("bsk,bsd->sbkd", key, value)
        counts = torch.arange(1, seq_len + 1, dtype=value.dtype, device=value.device)
        mask = torch.ones(seq_len, seq_len, dtype=value.dtype, device=value.device).tril() * counts.rsqrt()[:, None]
        sums = (mask @ products.flatten(1)).view_as(products)  # (seq, batch, slots, hidden)
        return torch.einsum("btk,tbkd->btd", weights, sums)


def _released_memsizer(run: LayerRun) -> nn.Module:
    return _ReleasedMemSizer(run.hidden_size, run.n_heads, run.mixer().slots, run.is_causal)


PEERS: dict[str, Peer] = {
    "torch": Peer("softmax", _torch),
    "local-attention": Peer("window", _local_attention),
    "local-attention as it comes": Peer("window", _local_attention_defaults),
    "transformers": Peer("lsh", _transformers),
    "reformer-pytorch": Peer("lsh", _reformer_pytorch),
    "linformer": Peer("linformer", _linformer),
    "performer-pytorch": Peer("performer", _performer_pytorch),
    "MemSizer as released": Peer("memsizer", _released_memsizer),
}
