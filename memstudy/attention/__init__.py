"""The attention variants by name: one file a variant, one line a variant here.

From a configuration to what it describes: ``config.attend(query, key, value, ...)`` is the op with
its hyper-parameters filled in (parameter-free variants), ``config.module(hidden_size, num_heads,
config, is_causal=...)`` the layer.
"""

from memstudy.attention.base import AttentionConfig, SelfAttention, Unavailable
from memstudy.attention.softmax import SoftmaxAttention, SoftmaxConfig, softmax_attention
from memstudy.attention.window import WindowAttention, WindowConfig, window_attention

ATTENTION: dict[str, type[AttentionConfig]] = {
    "softmax": SoftmaxConfig,
    "window": WindowConfig,
}

__all__ = [
    "ATTENTION",
    "AttentionConfig",
    "SelfAttention",
    "SoftmaxAttention",
    "SoftmaxConfig",
    "Unavailable",
    "WindowAttention",
    "WindowConfig",
    "softmax_attention",
    "window_attention",
]
