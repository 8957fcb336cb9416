"""Sliding-window attention: a query sees only near keys.

Bidirectional after Longformer (Beltagy et al. 2020, arXiv:2004.05150, section 3.1), causal after
Mistral 7B (Jiang et al. 2023, arXiv:2310.06825, section 2). With window w, query i sees::

    causal         i - w < j <= i     (w keys, its own included)
    bidirectional  |i - j| < w        (2 w - 1 keys; Longformer counts both sides together)

With ``chunked`` (the local attention in the code of Reformer, Kitaev et al. 2020), the sequence is cut into chunks of w
tokens. A query sees its own chunk and the chunk before; if causal, only up to itself, otherwise also the chunk after.

The softmax runs over the visible keys alone. Time and memory are linear in the sequence: each block of
queries meets only the slice of keys that the block sees, and all blocks write into one output. Backward
recomputes a block's weights instead of saving them. The op saves query, key, value and output. The layer
saves its input, the queries and the heads' output, and projects keys and values again in backward, one
segment of the sequence at a time.

Not implemented: Longformer's dilation and global tokens; Mistral's rolling cache.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from memstudy.attention.base import AttentionConfig, SelfAttention
from memstudy.attention.window.layer import WindowAttention
from memstudy.attention.window.op import check_window, window_attention

__all__ = ["WindowAttention", "WindowConfig", "window_attention"]


@dataclass(frozen=True)
class WindowConfig(AttentionConfig):
    """Sliding-window attention.

    Parameters
    ----------
    window : int [tokens]
        Visible keys to each side, including the query's own: w keys if causal, otherwise 2 w - 1.
    implementation : {"blocks", "flash_attention_2"}
    chunked : bool
        A query sees its own chunk of ``window`` tokens and the chunk before; if not causal, the chunk after too.
    """

    window: int = 256
    implementation: str = "blocks"
    chunked: bool = False

    name: ClassVar[str] = "window"
    paper: ClassVar[str] = "Beltagy et al. 2020, arXiv:2004.05150; Jiang et al. 2023, arXiv:2310.06825"
    causal: ClassVar[tuple[bool, ...]] = (False, True)
    parameter_free: ClassVar[bool] = True
    module: ClassVar[type[SelfAttention]] = WindowAttention

    def __post_init__(self) -> None:
        check_window(self.window, self.implementation, self.chunked)

    def attend(self, query, key, value, **options) -> torch.Tensor:
        return window_attention(query, key, value, **asdict(self), **options)

    def saved_elements(self, batch: int, heads: int, seq: int, head_dim: int, *, is_causal: bool = True) -> int:
        tokens = batch * heads * seq * head_dim
        if self.implementation == "flash_attention_2" or self.window >= seq:
            return 5 * tokens + batch * heads * seq  # as exact attention
        if self.chunked:
            return 5 * tokens  # input, query, key, value, heads' output
        return 3 * tokens  # input, query, heads' output

    def state_elements(self, batch: int, heads: int, seq: int, head_dim: int) -> int:
        reach = 2 * self.window if self.chunked else self.window
        return 2 * batch * heads * min(seq, reach) * head_dim  # the visible keys and values
