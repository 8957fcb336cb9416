"""Whole models in fp32 on a V100 and an A100, timed and predicted by NeuSight (ASPLOS 2025)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from memstudy.studies.published import eras  # noqa: F401  registers the attention of its time
from memstudy.studies.published.times import HERE, Row

GPUS = {"Tesla_V100-PCIE-32GB": "V100-PCIe-16GB", "NVIDIA_A100-PCIE-40GB": "A100-PCIe-40GB"}
OUTSIDE = {
    "option == 'fusion'": "compiled by torch.compile",
    "option in ('dp4', 'pp4_1', 'tp4')": "four GPUs that communicate",
}
GPT2 = {
    "gpt2_large": {"n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024},
    "gpt3_xl": {"n_embd": 3072, "n_layer": 24, "n_head": 24, "n_positions": 2048},
    "gpt3_27": {"n_embd": 2560, "n_layer": 32, "n_head": 32, "n_positions": 2048},
}
BERT = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
OPT = {
    "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "ffn_dim": 8192, "dropout": 0.1,
    "word_embed_proj_dim": 2048,
}  # fmt: skip
SWITCH = {
    "d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32,
    "num_sparse_encoder_layers": 12, "num_sparse_decoder_layers": 12, "num_experts": 4, "expert_capacity": 64,
}  # fmt: skip


def model(name: str, training: bool) -> nn.Module:
    """By scripts/asplos/data/DLmodel_configs; as neusight/Tracing/trace.py makes it, with eager attention."""
    if name == "bert_large":
        config = BertConfig(**BERT, attn_implementation="bert_2022")
        return (BertForPreTraining if training else BertForSequenceClassification)(config)
    if name == "opt_13":
        return OPTForCausalLM(OPTConfig(**OPT, attn_implementation="eager", use_cache=False))
    if name == "switchxl4":
        config = SwitchTransformersConfig(**SWITCH, attn_implementation="eager", use_cache=False)
        switch = SwitchTransformersForConditionalGeneration(config)
        for module in switch.modules():
            if isinstance(module, SwitchTransformersSparseMLP):
                module.forward = partial(_experts, module)
        return switch
    return GPT2LMHeadModel(GPT2Config(**GPT2[name], attn_implementation="eager", use_cache=False))


def _experts(mlp: SwitchTransformersSparseMLP, hidden: torch.Tensor) -> torch.Tensor:
    """NeuSight's own forward pass: each expert computes its whole capacity, however many tokens chose it.

    Its inputs are all ones, so the same expert gets the most that it may, and the others get none.
    """
    chosen, probability, _ = mlp.router(hidden)
    capacity = SWITCH["expert_capacity"]
    states = hidden.clone()
    padded = hidden.new_zeros(len(hidden) * capacity, hidden.shape[-1])
    for number, expert in enumerate(mlp.experts.values()):
        chosen[:, :, number].bool().count_nonzero().item()
        if number == 0:
            padded[:] = hidden[:, :capacity].reshape(padded.shape)
        padded = expert(padded)
        if number == 0:
            states[:, :capacity] = padded.view(len(hidden), capacity, -1)
    return probability * states


def forward(name: str, batch: int, seq_len: int) -> Callable[[], object]:
    made, inputs = model(name, False).eval(), _inputs(name, batch, seq_len)
    return torch.no_grad()(partial(made, **inputs))


def train(name: str, batch: int, seq_len: int) -> Callable[[], None]:
    """Forward and backward; gradients are never cleared. NeuSight leaves the loss's own forward pass out of its sum."""
    made, inputs = model(name, True).train(), _inputs(name, batch, seq_len)

    def step():
        result = made(**inputs)
        logits = result.prediction_logits if name == "bert_large" else result.logits
        cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten()).backward()

    return step


def _inputs(name: str, batch: int, seq_len: int) -> dict[str, torch.Tensor]:
    tokens = torch.ones(batch, seq_len, dtype=torch.int64)
    decoder = {"decoder_input_ids": tokens, "attention_mask": tokens} if name == "switchxl4" else {}
    return {"input_ids": tokens} | decoder


def published() -> pd.DataFrame:
    """The rows of one GPU without a compiler, and what NeuSight, Habitat and a roofline predicted for them [ms]."""
    read = pd.read_csv(HERE / "neusight_models_fp32.csv")
    for query in OUTSIDE:
        read = read.drop(read.query(query).index)
    gpu = read.gpu.map(GPUS)
    sizes = read.batch.astype(str) + " × " + read.seq_len.astype(str)
    return read.assign(gpu=gpu, row=gpu + ": " + read.model + ", " + read["mode"] + ", " + sizes)


def rows() -> list[Row]:
    """Mean of the best 5 of 25 steps, each after ``empty_cache``."""
    steps = {"inf": forward, "train": train}
    return [
        Row(
            "neusight_models", row.row, row.gpu, row.e2e_latency_ms,
            partial(steps[row.mode], row.model, row.batch, row.seq_len), "step",
        )
        for row in published().itertuples()
    ]  # fmt: skip


def theirs() -> pd.DataFrame:
    """Errors [%] of NeuSight, Habitat and a roofline on the rows, as NeuSight published their predictions."""
    read = published().set_index("row")
    names = ("neusight", "habitat", "roofline")
    errors = {
        f"their_{name}_error_percent": 100 * (read[f"their_{name}_ms"] / read.e2e_latency_ms - 1) for name in names
    }
    return pd.DataFrame(errors)
