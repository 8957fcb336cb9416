"""Plain PyTorch ops, as Liger-Kernel's benchmark scripts timed them (2024 to 2026, commit ead96b61).

`triton.testing.do_bench` flushes the L2 cache before each call and takes the median; the Megatron loss has a loop of
its own. Each setup below does what the script of the row's date did: what it clears, what gradients it makes. Many
never clear a weight's gradient, so autograd adds to it in the time, and several make a random gradient in ``full``.

Left out: compiled and fused code (``torch_compile``, ``megatron``'s SwiGLU), the experts' loop of ``fused_moe``, whose
tokens an expert are data, the sparse multi-token attention, a sort of small rows, and ORPO's loss with T=4096: logits
in fp32, as the repository's code has them, would not fit the card at the largest batch, so other code was timed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import local_torch_dtype
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from memstudy.profiler.roles import Step
from memstudy.studies.published.times import HERE, Row
from memstudy.studies.published.times.liger_losses import LOSSES, jsd_of_vocab
from memstudy.studies.published.times.timed import Timed

GPUS = {
    "NVIDIA A100-SXM4-80GB": "A100-80GB",
    "NVIDIA B200": "B200",
    "NVIDIA GeForce RTX 4090": "RTX4090",
    "NVIDIA H100 80GB HBM3": "H100-80GB",
    "NVIDIA H100 PCIe": "H100-PCIe",
}


def embedding(vocab: int, B: int, T: int, D: int, dtype: torch.dtype) -> Timed:
    table, ids = nn.Embedding(vocab, D, dtype=dtype), torch.randint(vocab, (B, T))
    return Timed(lambda: table(ids))


def layer_norm(width: int, M: int, eps: float, dtype: torch.dtype) -> Timed:
    norm, hidden = nn.LayerNorm(width, eps), torch.randn(M, width, dtype=dtype, requires_grad=True)
    return Timed(lambda: norm(hidden), (hidden,), [torch.randn(M, width, dtype=dtype)])


def layer_norm_of_tokens(tokens: int, hidden_size: int, eps: float, dtype: torch.dtype, **unused) -> Timed:
    norm, hidden = nn.LayerNorm(hidden_size, eps, dtype=dtype), _hidden(tokens, hidden_size, dtype)
    return Timed(lambda: norm(hidden), (hidden,))


def rms_norm(width: int, M: int, eps: float, dtype: torch.dtype) -> Timed:
    norm, hidden = LlamaRMSNorm(width, eps), _hidden(M, width, dtype)  # its weight is in fp32
    return Timed(lambda: norm(hidden), (hidden,), [torch.randn(M, width, dtype=dtype)])


def fused_add_rms_norm(tokens: int, hidden_size: int, eps: float, dtype: torch.dtype, **unused) -> Timed:
    weight = nn.Parameter(torch.ones(hidden_size))
    hidden, residual = _hidden(tokens, hidden_size, dtype), _hidden(tokens, hidden_size, dtype)

    def forward() -> Tensor:
        total = hidden.float() + residual.float()
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
        _ = total.to(dtype)  # the new residual, which the script makes and drops
        return weight * normed.to(dtype)

    return Timed(forward, (hidden,))


def rope_of_tokens(tokens: int, hidden_size: int, **sizes) -> Timed:
    return rope(hidden_size, tokens, **sizes)


def rope(hidden_size: int, seq_len: int, num_q_heads: int, num_kv_heads: int, dtype: torch.dtype) -> Timed:
    query, key, cos, sin = _rotary(seq_len, hidden_size // num_q_heads, num_q_heads, num_kv_heads, dtype)
    gradients = [torch.randn_like(query), torch.randn_like(key)]
    return Timed(lambda: apply_rotary_pos_emb(query, key, cos, sin), (), gradients, (query, key))


def qwen2vl_mrope(
    tokens: int, hidden_size: int, num_attention_heads: int, num_key_value_heads: int, dtype: torch.dtype, **unused
) -> Timed:
    """Only the query's rotation goes backward. Three position axes: cosines and sines of parts are joined."""
    width = hidden_size // num_attention_heads
    query, key, cos, sin = _rotary(tokens, width, num_attention_heads, num_key_value_heads, dtype)
    cos, sin = (table.expand(3, *table.shape).contiguous() for table in (cos, sin))
    part = width * 3 // 16
    sections = [width // 2 - 2 * part, part, part] * 2

    def forward() -> Tensor:
        one, other = (
            torch.cat([piece[i % 3] for i, piece in enumerate(table.split(sections, dim=-1))], dim=-1)
            for table in (cos, sin)
        )
        return apply_rotary_pos_emb(query, key, one, other)[0]

    return Timed(forward)


def mlp(
    tokens: int, B: int, hidden_size: int, intermediate_size: int, hidden_act: str, dtype: torch.dtype, **unused
) -> Timed:
    with local_torch_dtype(dtype):
        layer = LlamaMLP(
            LlamaConfig(hidden_size=hidden_size, intermediate_size=intermediate_size, hidden_act=hidden_act)
        )
    hidden = torch.randn(B, tokens, hidden_size, dtype=dtype, requires_grad=True)
    return Timed(lambda: layer(hidden), (hidden,))


def mlp_of_batch(tokens: int, bsz: int, **sizes) -> Timed:
    return mlp(tokens, bsz, **sizes)


def relu_squared(width: int, M: int, dtype: torch.dtype) -> Timed:
    hidden = _hidden(M, width, dtype)
    return Timed(lambda: torch.square(F.relu(hidden)), (hidden,), [torch.randn(M, width, dtype=dtype)])


def megatron_swiglu(width: int, S: int, B: int) -> Timed:
    hidden = torch.randn(S, B, 2 * width, dtype=torch.bfloat16, requires_grad=True)

    def forward() -> Tensor:
        gate, up = torch.chunk(hidden, 2, -1)
        return F.silu(gate) * up

    return Timed(forward, (hidden,))


def _hidden(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, width, dtype=dtype, requires_grad=True)


def _rotary(tokens: int, width: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """Query and key, transposed, and the tables of cosines and sines."""
    vectors = [
        torch.randn(1, tokens, count, width, dtype=dtype, requires_grad=True).transpose(1, 2)
        for count in (heads, kv_heads)
    ]
    return [*vectors, *(torch.randn(1, tokens, width, dtype=dtype) for _ in range(2))]


OPS = {op.__name__: op for op in (
    embedding, layer_norm, rms_norm, fused_add_rms_norm, rope, qwen2vl_mrope, relu_squared, megatron_swiglu,
)}  # fmt: skip
OPS |= {"geglu": mlp_of_batch, "tiled_geglu": mlp_of_batch, "tiled_swiglu": mlp_of_batch, "swiglu": mlp} | LOSSES
# Ops whose scripts, of different dates, vary different sizes.
BY = {("layer_norm", "T"): layer_norm_of_tokens, ("rope", "T"): rope_of_tokens, ("jsd", "V"): jsd_of_vocab}


def build(op: str, x_name: str, x: int, mode: str, config: str) -> Step:
    """The step of one row."""
    sizes = json.loads(config)
    if "dtype" in sizes:
        sizes["dtype"] = getattr(torch, sizes["dtype"].removeprefix("torch."))
    timed = BY.get((op, x_name), OPS[op])(x, **sizes)
    if op.startswith("megatron") and mode != "forward":  # its backward runs the forward too
        return replace(timed, forward=lambda: timed.forward().sum()).step("full")
    return timed.step(mode)


def rows() -> list[Row]:
    """All rows of ``liger.csv``."""
    return [
        Row(
            table="liger",
            row=f"{row.op} {row.mode} {row.x_name}={row.x}",
            gpu=GPUS[row.gpu],
            published_ms=row.ms_p50,
            build=partial(build, row.op, row.x_name, row.x, row.mode, row.config),
            kind="op",
        )
        for row in pd.read_csv(HERE / "liger.csv").itertuples()
    ]
