"""Llama-2-7B with LoRA on an A100-80GB as torchtune's tutorials read it (April 2024).

A GB there is 10^9 bytes (torchtune/utils/memory.py of the time). The row of class A is what making the model takes. Of
the trainings the longest batch is not known. Model and recipe are torchtune's own, of the commit that wrote the
tutorials; ``benchmarks/prediction/of_their_time.sh`` fetches them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from memstudy.profiler import MIB, MemoryReport, predict
from memstudy.studies.published import GPUS, Figures
from memstudy.studies.published.modern.table import published

TARGETS = {
    "q,v": {"lora_attn_modules": ["q_proj", "v_proj"]},
    "all linear + output": {
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": True,
    },
}
LENGTHS = 64, 920  # tokens of a batch before the optimizer has states, and of the longest
CHOSEN_ON = {"LENGTHS": "torchtune: Llama-2-7b, LoRA 8, q,v, reserved in training"}
SOFTWARE = "made with torchtune 0914d5c and unnamed versions; predicted with that torchtune and today's PyTorch"


def fine_tune(targets: str, rank: int) -> Callable[[], None]:
    """As first step the model is made, on the GPU; the others are those of recipes/lora_finetune_single_device.py."""
    from torchtune import modules, utils
    from torchtune.models.llama2 import lora_llama2_7b
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    lengths, model, optimizer = iter(LENGTHS), None, None

    def step():
        nonlocal model, optimizer
        if model is not None:
            _train(model, optimizer, next(lengths))
            return
        with utils.set_default_dtype(torch.bfloat16):
            model = lora_llama2_7b(**TARGETS[targets], lora_rank=rank, lora_alpha=2 * rank)
        set_trainable_params(model, get_adapter_params(model))
        utils.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerDecoderLayer})
        optimizer = torch.optim.AdamW(model.parameters())

    return step


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, length: int) -> None:
    tokens, labels = torch.randint(32000, (2, 2, length)).unbind()
    logits = model(tokens)
    logits = logits[..., :-1, :].contiguous()
    labels = labels[..., 1:].contiguous()
    logits = logits.transpose(1, 2)
    nn.functional.cross_entropy(logits, labels).backward()
    optimizer.step()
    optimizer.zero_grad()


@functools.cache
def report(targets: str, rank: int, *, trained: bool) -> MemoryReport:
    """Predict how the model is made and, if asked, ``trained``."""
    return predict(partial(fine_tune, targets, rank), gpu=GPUS["torchtune"], iterations=3 if trained else 1)


def figures() -> Figures:
    """Memory at its peak: allocated or reserved, after the model was made or in training.

    Without torchtune's QLoRA: its weights are torchao's NF4Tensor of 2024, a wrapper subclass that predictions do not
    follow. What is reserved in training depends on the lengths before the longest, by some 1 %.
    """
    table = published("AB").query("source.str.contains('torchtune') and method == 'LoRA'")
    for row in table.drop_duplicates(["rank", "bytes"]).itertuples():
        targets, rank = row.targets.removesuffix(" (config default)"), int(row.rank)
        reading = row.metric if row.metric.endswith("at init") else "reserved in training"
        name = f"torchtune: Llama-2-7b, LoRA {rank}, {targets}, {reading}"
        yield name, row.bytes / MIB, partial(_mib, targets, rank, reading)


def _mib(targets: str, rank: int, reading: str) -> float:
    made = report(targets, rank, trained=reading.endswith("training"))
    return made.peak_bytes / MIB if reading.startswith("allocated") else made.peak_reserved_mib
