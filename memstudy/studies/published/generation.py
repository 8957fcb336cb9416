"""Generation as others measured it from 2023 to 2025, predicted: Llama-2-7B by optimum-benchmark, Qwen by its authors.

The rows are those of ``inference_memory.csv``; `OUTSIDE` names those of class A that are not predicted, each with the
cause.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import local_torch_dtype
from transformers.models.qwen2.modeling_qwen2 import repeat_kv

from memstudy.huggingface.catalogue import model_config
from memstudy.profiler import MIB
from memstudy.profiler.generation import predict_generation
from memstudy.studies.published import HERE, Figures, eras
from memstudy.trainers.generation import generate

# generation_config.json of Qwen2.5-Instruct, and speed_benchmark_transformers.py's least length: the models' penalties
# differ in value alone.
SAMPLED = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
ATTENTION = {
    "eager": "eager", "BetterTransformer": "sdpa", "flash-attn 2": "unpadded_2025",
    "flash_attention_2": "grouped_heads_2024",
}  # fmt: skip
SOFTWARE = (
    "made with torch 2.1.1 and transformers 4.35.2 (Llama-2), torch 2.3.1 and transformers 4.46.0 (Qwen2.5); predicted "
    "with the installed libraries, and the caches, logits and attention of those"
)
OUTSIDE = {
    "source.str.contains('litgpt')": "lit-gpt's own models are not installed",
    "source.str.contains('fsdp_qlora')": "forward passes alone: no text is generated",
}


def published() -> pd.DataFrame:
    """The rows of class A, and reserved memory, which is of class B: the allocator's history has a part in it."""
    rows = pd.read_csv(HERE / "inference_memory.csv")
    return rows[(rows["class"] == "A") | (rows.metric.str.startswith("max_reserved") & rows.quant.isna())]


class _Tuples(DynamicLayer):
    """The first keys and values are kept as they are; those of the last pass live until the next pass."""

    before = None

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        self.before = self.keys, self.values
        return super().update(key_states, value_states)


class TupleCache(DynamicCache):
    """The cache when it was tuples of tensors: the old one was held until the inputs of the next pass were made.

    transformers 4.35.2, generation/utils.py, ``greedy_search``, and models/llama/modeling_llama.py, ``LlamaAttention``.
    """

    def __init__(self):
        super().__init__()
        self.layer_class_to_replicate = _Tuples

    def forget(self):
        for layer in self.layers:
            layer.before = None


def _as_in_2023(model: torch.nn.Module) -> None:
    """Each layer has tables of rotary positions; all logits are made, in fp32, and live until the next ones do.

    transformers 4.35.2, models/llama/modeling_llama.py, ``LlamaRotaryEmbedding`` and ``LlamaForCausalLM.forward``.
    """
    config, dtype = model.config, model.dtype
    for layer in model.model.layers:
        for name in ("cos_cached", "sin_cached"):
            table = torch.zeros(config.max_position_embeddings, layer.self_attn.head_dim, dtype=dtype)
            layer.self_attn.register_buffer(name, table)

    def before(module, args, kwargs):
        kwargs["past_key_values"].forget()

    def after(module, args, output):
        output.logits = module.last_logits = output.logits.float()

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after)
    model._supports_logits_to_keep = lambda: False


def grouped_heads(module, query, key, value, attention_mask, **kwargs):
    """Keys and values were repeated for all heads that share them.

    transformers 4.46.0, models/qwen2/modeling_qwen2.py, ``Qwen2FlashAttention2``.
    """
    repeated = (repeat_kv(tensor, module.num_key_value_groups) for tensor in (key, value))
    return eras.flash_attention(module, query, *repeated, attention_mask, **kwargs)


AttentionInterface.register("grouped_heads_2024", grouped_heads)
AttentionMaskInterface.register("grouped_heads_2024", lambda **kwargs: None)


def of_llama(model_id: str, attention: str, batch: int, total: int, prompt: int, tokens: int) -> Callable[[], None]:
    """optimum-benchmark in November 2023: a forward pass, and after ``empty_cache`` the generation that is measured.

    optimum_benchmark/benchmarks/inference/benchmark.py, ``run_generate_memory_tracking``.
    """
    model = _model(model_id, attention, torch.float16)
    _as_in_2023(model)
    ids = torch.randint(model.config.vocab_size, (batch, prompt))

    def step():
        with torch.no_grad():
            model(ids, past_key_values=TupleCache())
        del model.last_logits
        torch.cuda.empty_cache()
        generate(model, ids, tokens, total, past_key_values=TupleCache())

    return step


def of_qwen(model_id: str, attention: str, batch: int, total: int, prompt: int, tokens: int) -> Callable[[], None]:
    """Qwen's speed_benchmark_transformers.py."""
    model = _model(model_id, attention, torch.bfloat16)
    ids = torch.randint(model.config.vocab_size, (batch, prompt))
    return partial(generate, model, ids, tokens, total, min_length=total, **SAMPLED)


def _model(model_id: str, attention: str, dtype: torch.dtype) -> torch.nn.Module:
    config = model_config(model_id)
    with local_torch_dtype(dtype):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()


@functools.cache
def readings(model_id: str, attention: str, batch: int, prompt: int, new: int) -> dict[str, float]:
    """Predicted memory of one run [MiB], by reading."""
    of = of_llama if "Llama" in model_id else of_qwen
    report = predict_generation(
        lambda length, tokens: partial(of, model_id, attention, batch, prompt + new, length, tokens),
        prompt=prompt,
        tokens=new,
        gpu="A100-80GB",
    )
    return {"allocated": report.peak_allocated_mib, "reserved": report.peak_reserved_mib}


def figures() -> Figures:
    """The most memory allocated, which Qwen's authors round to 0.01 GiB, and reserved.

    From 16 sequences on, Llama-2's growing cache has the allocator reserve the whole GPU: how much that is decides.
    """
    rows = published()
    for row in rows[rows.method.str.startswith("generate")].itertuples():
        model_id = row.model if "/" in row.model else f"Qwen/{row.model}"
        new = 512 if "512" in row.method else 2048
        run = model_id, ATTENTION[row.attention], int(row.batch), int(row.seq), new
        reading = "reserved" if row.metric.startswith("max_reserved") else "allocated"
        name = f"{row.model.rpartition('/')[2]}, {row.attention}, {row.batch} × ({row.seq} + {new}), {reading}"
        yield name, row.bytes / MIB, partial(_mib, run, reading)


def _mib(run: tuple[str, str, int, int, int], reading: str) -> float:
    return readings(*run)[reading]
