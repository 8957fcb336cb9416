"""The attention variants by name: one file a variant, one line a variant here.

From a configuration to what it describes: ``config.attend(query, key, value, ...)`` is the op with
its hyper-parameters filled in (all but MemSizer, which has no queries and keys of its own),
``config.module(hidden_size, num_heads, config, is_causal=...)`` the layer. `heads` and `scan` are what
several layers are made of: both compute again in backward what would be too large to keep.
"""

from memstudy.attention.base import AttentionConfig, SelfAttention, Unavailable
from memstudy.attention.linformer import LinformerAttention, LinformerConfig, linformer_attention
from memstudy.attention.lowrank import LowRankAttention, LowRankConfig, low_rank
from memstudy.attention.lsh import LSHAttention, LSHConfig, lsh_attention
from memstudy.attention.memsizer import MemSizerAttention, MemSizerConfig, MemSizerState
from memstudy.attention.nystrom import NystromAttention, NystromConfig, nystrom_attention
from memstudy.attention.performer import PerformerAttention, PerformerConfig, performer_attention
from memstudy.attention.softmax import SoftmaxAttention, SoftmaxConfig, softmax_attention
from memstudy.attention.window import WindowAttention, WindowConfig, window_attention

ATTENTION: dict[str, type[AttentionConfig]] = {
    "softmax": SoftmaxConfig,
    "window": WindowConfig,
    "linformer": LinformerConfig,
    "lowrank": LowRankConfig,
    "lsh": LSHConfig,
    "memsizer": MemSizerConfig,
    "performer": PerformerConfig,
    "nystrom": NystromConfig,
}

__all__ = [
    "ATTENTION",
    "AttentionConfig",
    "LSHAttention",
    "LSHConfig",
    "LinformerAttention",
    "LinformerConfig",
    "LowRankAttention",
    "LowRankConfig",
    "MemSizerAttention",
    "MemSizerConfig",
    "MemSizerState",
    "NystromAttention",
    "NystromConfig",
    "PerformerAttention",
    "PerformerConfig",
    "SelfAttention",
    "SoftmaxAttention",
    "SoftmaxConfig",
    "Unavailable",
    "WindowAttention",
    "WindowConfig",
    "linformer_attention",
    "low_rank",
    "lsh_attention",
    "nystrom_attention",
    "performer_attention",
    "softmax_attention",
    "window_attention",
]
