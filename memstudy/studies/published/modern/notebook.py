"""A small Llama's forward and backward pass in bf16, as fsdp_qlora's notebook read them (March 2024).

The notebook names neither versions nor its GPU. The rows were read for them, and none is held out: rotary tables in
each layer are transformers 4.36 or 4.37, inputs kept by 4-bit layers are bitsandbytes up to 0.43.1, and attention in
linear memory is a GPU of Ampere or later. PyTorch's rules are today's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memstudy.profiler import MIB, predict
from memstudy.studies.published import GPUS, Figures, eras
from memstudy.studies.published.modern import qlora
from memstudy.studies.published.modern.table import published
from memstudy.techniques.adapters import cast_trained

READINGS = {"model": "model.to(cuda)", "forward": "after forward", "backward": "after backward"}
METHODS = {"13": "full", "17": "LoRA", "19": "LoRA, checkpointing", "26": "QLoRA, checkpointing"}  # by the cell
WITHOUT_BACKWARD_BEFORE = ("13", "19")  # cells that began without the workspace of the backward pass
CHOSEN_ON = {"versions of the libraries": ".*"}
SOFTWARE = "made with unnamed versions of early 2024; predicted by the code of transformers 4.37 and bitsandbytes 0.42"


def passes(method: str, seq: int, backward_before: bool) -> Callable[[], None]:
    """As first step, what the notebook had run before, which leaves the workspaces; as second, the passes."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=2048,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            intermediate_size=4096,
            max_position_embeddings=2048,
            attn_implementation="llama_2024",
            use_cache=False,
        )
    ).bfloat16()
    eras.rotary_tables_in_each_layer(model)
    if method.startswith("QLoRA"):
        qlora.Weights("single", keeps_inputs=True).prepare(model)
    if method != "full":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_dropout=0.1, task_type="CAUSAL_LM"))
        cast_trained(model, torch.bfloat16)
    if method.endswith("checkpointing"):
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # transformers 4.37 left the embeddings of a PeftModel without gradients
        model.config._attn_implementation = "sdpa"
    kept = []

    def before():
        factor = torch.ones(8, 8, requires_grad=backward_before)
        product = factor @ factor
        if backward_before:
            product.sum().backward()

    def both():
        kept.append(model(torch.randint(32000, (1, seq))))
        kept[0].logits = kept[0].logits.float()
        kept[0].logits.mean().backward()

    steps = iter((before, both))
    return lambda: next(steps)()


@functools.cache
def readings(method: str, seq: int, backward_before: bool) -> dict[str, float]:
    """Predicted bytes, by reading."""
    report = predict(partial(passes, method, seq, backward_before), gpu=GPUS["notebook"])
    return {
        "model": sum(report.timeline[0][2].values()),
        "forward": sum(report.forward_end_by_category.values()),
        "backward": report.at_rest_bytes,
    }


def figures() -> Figures:
    """Allocated memory beside the model, after its forward pass and after its backward pass.

    Without checkpointing, the forward pass is predicted 6 to 13 % low: 8,192 bytes a token for each norm whose input
    wants a gradient (with checkpointing, for the last norm alone), as if a norm saved a second copy in fp32. Why is not
    known: run on a CPU, transformers 4.37.2 with peft 0.8.2 saves the tensors that are predicted, its norm is the same
    from 4.36 to 4.39, and no formula of PyTorch 2.2 for the norm's ops (derivatives.yaml) saves another.
    """
    for row in published().query("source.str.contains('fsdp_qlora')").itertuples():
        cell = row.source.partition("(cell ")[2][:2]
        if cell not in METHODS:
            continue
        reading = next(reading for reading, text in READINGS.items() if text in row.metric)
        seq = int(row.seq)
        run = METHODS[cell], seq, not (cell in WITHOUT_BACKWARD_BEFORE and seq == 512)
        yield f"Llama 1B, {METHODS[cell]}, {seq}, {reading}", row.bytes / MIB, partial(_mib, run, reading)


def _mib(run: tuple[str, int, bool], reading: str) -> float:
    return readings(*run)[reading] / MIB
