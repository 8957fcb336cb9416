"""The attention variants by name: each has its own file and one line in ``ATTENTION``.

``config.attend(query, key, value, ...)`` runs a variant's op with the hyper-parameters of its configuration (MemSizer
has a layer only: it has no queries and keys of its own); ``config.module(hidden_size, num_heads, config,
is_causal=...)`` makes its layer. Several layers are built on `heads` and `scan`, which recompute large tensors in
backward instead of keeping them.
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
