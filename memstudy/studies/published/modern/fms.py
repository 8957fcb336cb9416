"""Fine-tuning in bf16 on one or two A100-80GB as fms-acceleration's benchmark ran it (February 2025)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import local_torch_dtype

from memstudy.huggingface.catalogue import model_config
from memstudy.profiler import MIB, predict
from memstudy.studies.published import GPUS, Figures, eras
from memstudy.studies.published.modern import qlora
from memstudy.studies.published.modern.table import published

# config.json of bigcode/gpt_bigcode-santacoder on the Hugging Face hub.
SANTACODER = {
    "model_type": "gpt_bigcode", "vocab_size": 49280, "n_positions": 2048, "n_embd": 2048, "n_layer": 24, "n_head": 16,
    "n_inner": 8192, "bos_token_id": 49152, "eos_token_id": 49152,
}  # fmt: skip
READINGS = {  # how the source names a reading, and its name here
    "max_allocated (before + peaked delta, HF TrainerMemoryTracker)": "peak",
    "allocated after training (memory_allocated)": "at rest",
}
METHODS = {"baseline-peft-bnb": "QLoRA by TRL", "accelerated-peft-bnb": "QLoRA by fms"}  # by the plugin's name
CHOSEN_ON = {  # rules chosen after the errors on these rows were seen (eras.py): never call them held out
    "nothing is autocast": r"Mistral-7B-v0.1, LoRA, 4 × 4096, 1 GPU, peak",
    "FSDP1's units are computed anew": r"Mistral-7B-v0.1, LoRA, . × 4096, 2 GPU, peak",
    "FSDP1 finds what is gathered": r"Mistral-7B-v0.1, LoRA, . × 4096, 2 GPU, at rest",
    "santacoder's blocks return keys": r"gpt_bigcode-santacoder, .*, peak",
    "one table for all second scales": r"Mistral-7B-v0.1, QLoRA .*, 1 GPU, at rest",
}
SOFTWARE = (
    "made with torch 2.4.1, transformers 4.48.1, peft 0.13.2, trl 0.13.0, bitsandbytes 0.43.3; predicted with the "
    "installed libraries, and what differed in those (eras.py, modern/qlora.py)"
)


def fine_tune(model_id: str, method: str, batch: int, seq: int, processes: int) -> Callable[[], None]:
    """The Trainer's step on packed sequences, with checkpointing and AdamW; autocast with 4-bit weights only."""
    santacoder = model_id.endswith("santacoder")
    config = AutoConfig.for_model(**SANTACODER) if santacoder else model_config(model_id)
    config.use_cache = False
    with local_torch_dtype(torch.bfloat16):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="unpadded_2025")
        eras.experts_in_layers(model)
    model.loss_function = eras.bf16_loss if santacoder else eras.fp32_loss
    model.activation_checkpointing_enable({"use_reentrant": True})
    quantised = method.startswith("QLoRA")
    if quantised:
        qlora.Weights(sharded=processes > 1).prepare(model)
        if method == "QLoRA by TRL" and processes == 1:  # not for weights that are to be sharded
            qlora.prepare_by_trl(model)
    if method != "full":
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "c_attn"]
        settings = LoraConfig(r=16, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    presents = eras.gpt_bigcode_presents(model)
    model.train()
    if quantised:
        model.forward = qlora.outputs_in_fp32(model.forward)
    if processes > 1:
        model = sharded(model, method)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    tokens, labels = torch.randint(config.vocab_size, (2, batch, seq)).unbind()
    mask = torch.ones_like(tokens)
    clip = model.clip_grad_norm_ if processes > 1 else partial(nn.utils.clip_grad_norm_, [*model.parameters()])

    def step():
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        presents.clear()
        loss.backward()
        del loss
        clip(1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sharded(model: nn.Module, method: str) -> nn.Module:
    """FSDP1, whose units are the blocks and, with adapters, each layer of an adapter (peft's policy).

    FSDP1 keeps a unit's gradients between steps, which ``zero_grad`` does not reach. The blocks' units are inside of
    what is computed anew: transformers 4.48.1, ``self._gradient_checkpointing_func(decoder_layer.__call__, ...)``.
    """
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    blocks = partial(transformer_auto_wrap_policy, transformer_layer_cls={GradientCheckpointingLayer})
    bf16 = MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    model = FullyShardedDataParallel(
        model,
        auto_wrap_policy=blocks if method == "full" else fsdp_auto_wrap_policy(model),
        mixed_precision=bf16 if method.startswith("QLoRA") else None,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        if isinstance(unit.module, GradientCheckpointingLayer):
            unit.module.gradient_checkpointing = False
            unit.forward = _recomputed(unit.forward)
    return model


def _recomputed(forward: Callable) -> Callable:
    def call(*args, **kwargs):
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=True)

    return call


@functools.cache
def readings(model_id: str, method: str, batch: int, seq: int, processes: int) -> dict[str, float]:
    """Predicted bytes of one run, by reading."""
    build = partial(fine_tune, model_id, method, batch, seq, processes)
    report = predict(build, gpu=GPUS["fms"], processes=processes)
    return {"peak": report.peak_bytes, "at rest": report.at_rest_bytes}


def figures() -> Figures:
    """Allocated memory, at its peak and after the last step.

    At rest, santacoder's blocks differ with what was allocated before, up to 1 MiB each, which the allocator does not
    split: up to 4 MB in all where it was trained in full, and 30 MB where its weights were quantised one by one on the
    GPU. The allocator's replay of that loading gives 27 MB; predictions build a model on the host.
    """
    for row in table().itertuples():
        yield name_of(row), row.bytes / MIB, partial(_mib, run_of(row), READINGS[row.metric])


def table() -> pd.DataFrame:
    return published().query("source.str.contains('fms-acceleration')")


def run_of(row) -> tuple[str, str, int, int, int]:
    """The arguments of `fine_tune` for a ``row`` of the table."""
    method = METHODS.get(row.note.rpartition("=")[2], row.method)
    return row.model, method, row.batch, int(row.seq), int(row.parallel[0])


def name_of(row) -> str:
    model_id, method, batch, seq, _ = run_of(row)
    return f"{model_id.rpartition('/')[2]}, {method}, {batch} × {seq}, {row.parallel[:5]}, {READINGS[row.metric]}"


def _mib(run: tuple[str, str, int, int, int], reading: str) -> float:
    return readings(*run)[reading] / MIB
