"""What each of five GPUs reached at its best batch, by the overview of mli/transformers-benchmarks (2022).

The overview rounds to whole TFLOP/s and does not name the batch: the largest of the notebook is taken, where the two
GPUs whose batches are known (`mli`) reach their best or nearly so. Left out: T5's blocks, whose layer norm is apex's
where that is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from memstudy.studies.published import eras  # noqa: F401  registers GPT-2's attention of its time
from memstudy.studies.published.times import HERE, Row, mli

GPUS = {"A100": "A100-80GB", "A6000": "A6000", "V100": "V100-16GB", "3090 Ti": "RTX3090Ti", "4090": "RTX4090"}
BATCH = {"BertLayer": (128, 128), "GPT2Block": (64, 512)}
WIDTH = 1024


def gpt2_block(batch: int, seq_len: int, backward: bool) -> Callable[[], object]:
    """One call of GPT-2 medium's block in training mode, as it is made."""
    config = GPT2Config(n_embd=WIDTH, n_head=16, n_layer=24, attn_implementation="gpt2_2020")
    block = GPT2Block(config, layer_idx=0).half()
    mask = torch.tril(torch.ones((config.n_positions, config.n_positions), dtype=torch.uint8))
    block.attn.register_buffer("bias", mask.view(1, 1, config.n_positions, config.n_positions))
    block.attn.register_buffer("masked_bias", torch.full((), -1e4))
    hidden = torch.randn(batch, seq_len, WIDTH).half()
    if backward:
        return lambda: block(hidden)[0].sum().backward()
    return partial(block, hidden)


def rows() -> list[Row]:
    """The GPUs and blocks that `mli` does not have."""
    made = []
    for row in pd.read_csv(HERE / "mli_best.csv").itertuples():
        gpu, (part, _, detail) = GPUS[row.gpu], row.what.partition(", ")
        kind = "layer" if part in BATCH else "op"
        if part in BATCH:
            batch, seq_len = BATCH[part]
            backward = detail == "fwd+bwd"
            block = (
                partial(gpt2_block, batch, seq_len) if part == "GPT2Block" else partial(mli.layer, part, batch, seq_len)
            )
            build = partial(block, backward)
            flops = (3 if backward else 1) * (4 * batch * WIDTH * seq_len**2 + 24 * batch * seq_len * WIDTH**2)
        elif part == "matmul 8192":
            build, flops = partial(mli.product, 8192, getattr(torch, detail)), 2 * 8192**3
        else:
            build, flops = partial(mli.scaling, int(detail)), int(detail)
        made.append(Row("mli_best", f"{gpu}: {row.what}", gpu, flops / row.tflops / 1e9, build, kind))
    return made
