"""Kernels of a decoder's layer in fp16, as Vidur's profiler timed them (2024, commit 7d47513) on an A100 and an H100.

Times are those of the kernels alone, by PyTorch's profiler: no host, no gap, inputs as the op before leaves them in
the L2 cache. The table is a seeded sample of 75 settings (model, parts of tensor parallelism, tokens) a GPU.

Left out are the kernels that are not PyTorch's but vLLM's (RMS norm, SiLU with product, rotary embedding): of norms
and activations only those of phi-2 remain.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd
import torch
from torch.nn import functional as F

from memstudy.profiler.roles import Step
from memstudy.studies.published.times import HERE, Row

GPUS = {"a100": "A100-80GB", "h100": "H100-80GB"}


def rows() -> list[Row]:
    """The ops of all settings of ``vidur.csv``."""
    return [row for setting in pd.read_csv(HERE / "vidur.csv").itertuples() for row in _ops(setting)]


def _ops(setting) -> Iterator[Row]:
    """The ops of one setting; ``tp`` parts share heads, inner width and vocabulary."""
    tokens, width, inner = setting.num_tokens, setting.n_embd, setting.n_expanded_embd // setting.tp
    queries = width // setting.tp
    keys = queries * setting.n_kv_head // setting.n_head
    phi = not setting.gated
    ops = {
        "emb": partial(embedding, tokens, width, setting.vocab_size // setting.tp),
        "attn_pre_proj": partial(linear, tokens, width, queries + 2 * keys),
        "attn_post_proj": partial(linear, tokens, queries, width),
        "mlp_up_proj": partial(linear, tokens, width, inner if phi else 2 * inner),
        "mlp_down_proj": partial(linear, tokens, inner, width),
        "add": partial(add, tokens, width, 3 if phi else 2),
    }
    if phi:
        ops |= {"input_layernorm": partial(norm, tokens, width), "mlp_act": partial(gelu, tokens, inner)}
    for op, build in ops.items():
        name = f"{op} forward {setting.model.rpartition('/')[2]} tp={setting.tp} tokens={tokens}"
        yield Row("vidur", name, GPUS[setting.gpu], getattr(setting, f"{op}_ms"), build, "op")


def linear(tokens: int, given: int, made: int) -> Step:
    hidden, weight = _fp16(tokens, given), _fp16(made, given)
    return lambda: F.linear(hidden, weight)


def embedding(tokens: int, width: int, vocab: int) -> Step:
    ids, table = torch.randint(vocab, (tokens,)), _fp16(vocab, width)
    return lambda: F.embedding(ids, table)


def add(tokens: int, width: int, terms: int) -> Step:
    given = [_fp16(tokens, width) for _ in range(terms)]
    return lambda: sum(given[1:], start=given[0])


def norm(tokens: int, width: int) -> Step:
    hidden, weight, bias = _fp16(tokens, width), _fp16(width), _fp16(width)
    return lambda: F.layer_norm(hidden, (width,), weight, bias)


def gelu(tokens: int, inner: int) -> Step:
    hidden = _fp16(tokens, inner)
    return lambda: F.gelu(hidden)


def _fp16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float16)
