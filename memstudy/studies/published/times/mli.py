"""Layers of BERT-large in fp16 on a V100 and an RTX 3090 Ti, timed by mli/transformers-benchmarks (2022)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from memstudy.studies.published.times import HERE, Row

GPUS = {"Tesla V100-SXM2-16GB": "V100-16GB", "NVIDIA GeForce RTX 3090 Ti": "RTX3090Ti"}
SIZES = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}


def product(size: int, dtype: torch.dtype) -> Callable[[], object]:
    left, right = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    torch.set_float32_matmul_precision("high")  # as in NVIDIA's containers
    return partial(torch.matmul, left, right)


def scaling(size: int) -> Callable[[], object]:
    return partial(torch.mul, torch.randn(size), 1.2)


def layer(part: str, batch: int, seq_len: int, backward: bool = False) -> Callable[[], object]:
    """One call of a layer in training mode, as it is made; weights' gradients are never cleared."""
    bert = BertLayer(BertConfig(**SIZES, attn_implementation="eager")).half()
    hidden = torch.randn(batch, seq_len, SIZES["hidden_size"]).half()
    calls = {
        "BertLayer": bert,
        "Dense layer": bert.intermediate.dense,
        "Dense+Activation": bert.intermediate,
        "FFN": lambda given: bert.output(bert.intermediate(given), given),
        "Attention": bert.attention,
    }
    if backward:
        return lambda: bert(hidden).sum().backward()
    return partial(calls[part], hidden)


def rows() -> list[Row]:
    """The whole table.

    torch.utils.benchmark gives the mean time of calls one after the other, so input and weights may be in L2. PyTorch
    1.13.0a0+08820cb is of NVIDIA's container, whose products of fp32 tensors are TF32; the source calls them so too.
    """
    made = []
    for row in pd.read_csv(HERE / "mli_layers_fp16.csv").itertuples():
        gpu = GPUS[row.gpu]
        if row.layer.startswith("matmul"):
            size = int(row.layer.rpartition("x")[2])
            name, kind, build = f"matmul {size}, {row.what}", "op", partial(product, size, getattr(torch, row.what))
            published_ms = 2 * size**3 / row.tflops / 1e9
        elif row.layer.startswith("a*1.2"):
            size = int(row.layer.rpartition("=")[2])
            name, kind, build = f"a × 1.2, {size}", "op", partial(scaling, size)
            published_ms = 8 * size / row.tflops / 1e6  # the column has GB/s here
        else:
            part, batch, seq_len = row.layer.removeprefix("bert-large "), int(row.batch), int(row.seq_len)
            name, kind = f"{part}, {row.what}, {batch} × {seq_len}", "layer"
            build = partial(layer, part, batch, seq_len, row.what == "fwd+bwd")
            published_ms = row.ms if part == "BertLayer" else _flops(part, batch, seq_len) / row.tflops / 1e9
        made.append(Row("mli", f"{gpu}: {name}", gpu, published_ms, build, kind))
    return made


def _flops(part: str, batch: int, seq_len: int) -> float:
    """Floating-point operations as the source counts them: its figure is a rate."""
    width = SIZES["hidden_size"]
    dense = 8 * batch * seq_len * width**2
    parts = {"Dense layer": dense, "Dense+Activation": dense, "FFN": 2 * dense}
    return (parts | {"Attention": 4 * batch * width * seq_len**2 + dense})[part]
