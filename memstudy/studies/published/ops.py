"""``max_memory_allocated`` of plain ops on an A100, as Liger-Kernel's benchmark took it (2024), predicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from torch import nn
from transformers.modeling_utils import local_torch_dtype
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

from memstudy.profiler import MIB, predict
from memstudy.studies.published import GPUS, HERE, Figures


def cross_entropy(vocab: int, B: int, T: int) -> Callable[[], None]:
    logits = torch.randn(B * T, vocab, requires_grad=True)
    target = torch.randint(vocab, (B * T,))
    return lambda: nn.functional.cross_entropy(logits, target).backward()


def fused_linear_cross_entropy(tokens: int, H: int, V: int, **same) -> Callable[[], None]:
    head, unused = (nn.Linear(H, V, bias=False, dtype=torch.bfloat16) for _ in range(2))
    hidden = torch.randn(tokens, H, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(V, (tokens,))

    def step(alive=unused):  # the fused head, which the benchmark also makes
        nn.functional.cross_entropy(head(hidden), target).backward()

    return step


def layer_norm(width: int, M: int, **same) -> Callable[[], None]:
    norm, unused = nn.LayerNorm(width), nn.LayerNorm(width)
    hidden, gradient = torch.randn(M, width, requires_grad=True), torch.randn(M, width)

    def step(alive=unused):
        norm(hidden).backward(gradient, retain_graph=True)

    return step


def swiglu(tokens: int, B: int, dtype: str, **sizes) -> Callable[[], None]:
    with local_torch_dtype(torch.bfloat16):
        mlp = LlamaMLP(LlamaConfig(**sizes))
        hidden = torch.randn(B, tokens, mlp.hidden_size, requires_grad=True)
        gradient = torch.randn(B, tokens, mlp.hidden_size)
    return lambda: mlp(hidden).backward(gradient, retain_graph=True)


OPS = {op.__name__: op for op in (cross_entropy, fused_linear_cross_entropy, layer_norm, swiglu)}


def figures() -> Figures:
    """Forward and backward of four ops. Gradients are never cleared: the second step starts with those of the first.

    Rounded to float32, as the published figures were, all 19 predictions are exact.
    """
    for row in pd.read_csv(HERE / "gpu_memory_ops.csv").itertuples():
        build = partial(OPS[row.kernel_name], row.axis_value, **json.loads(row.config))
        name = f"{row.kernel_name} {row.axis} {row.axis_value}"
        yield name, row.peak_allocated_mib, partial(_second_peak, build)


def _second_peak(build: Callable) -> float:
    return predict(build, gpu=GPUS["ops"]).iteration_peaks[-1] / MIB
