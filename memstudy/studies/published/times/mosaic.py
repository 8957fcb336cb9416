"""Training MPT on eight GPUs, timed by MosaicML (mosaicml/llm-foundry, 2023), against one GPU's arithmetic.

**A lower bound, no prediction**: FSDP gathers weights and spreads gradients over eight GPUs, and the published times
have what of it the arithmetic doesn't hide. The predicted step has one GPU's forward and backward pass alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import local_torch_dtype

from memstudy.studies.published.times import HERE, Row

GPUS = {"a100_80gb": "A100-80GB", "h100_80gb": "H100-80GB"}
SIZES = {  # width, blocks; heads are 128 wide
    "1b": (2048, 24),
    "3b": (2560, 32),
    "7b": (4096, 32),
    "13b": (5120, 40),
}
LENGTHS = {"a100_80gb": (2048, 8192), "h100_80gb": (512, 4096, 8192)}


def train(size: str, batch: int, seq_len: int, checkpointing: bool) -> Callable[[], None]:
    """Forward and backward of one micro-batch in bf16, by GPT-2 with MPT's widths, GELU and flash attention.

    MPT has no biases; its layer norms compute in bf16 too (``low_precision_layernorm``).
    """
    width, blocks = SIZES[size]
    sizes = {"n_embd": width, "n_layer": blocks, "n_head": width // 128, "n_positions": seq_len, "vocab_size": 50368}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**sizes, **dropout, activation_function="gelu", attn_implementation="sdpa", use_cache=False)
    with local_torch_dtype(torch.bfloat16):
        model = GPT2LMHeadModel(config).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": True})
    tokens = torch.randint(50368, (batch, seq_len))

    def step():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()

    return step


def rows() -> list[Row]:
    """Time of a micro-batch: its tokens over the tokens a second of one GPU; the optimizer's share is in it."""
    made = []
    for row in pd.read_csv(HERE / "mosaic_mpt.csv").itertuples():
        if row.seq_len in LENGTHS[row.gpu]:
            gpu, tokens = GPUS[row.gpu], row.micro_batch * row.seq_len
            name = f"{gpu}: {row.model}, {row.micro_batch} × {row.seq_len}{', checkpointing' * row.checkpointing}"
            build = partial(train, row.model, row.micro_batch, row.seq_len, row.checkpointing)
            made.append(Row("mosaic", name, gpu, 1e3 * tokens / row.tokens_per_s_gpu, build, "step"))
    return made
