"""Fine-tuning BERT on SQuAD with NVIDIA's code, timed by Lambda (lambdal/deeplearning-benchmark)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, BertForQuestionAnswering

from memstudy.studies.published import eras
from memstudy.studies.published.times import HERE, Row

GPUS = {
    "LambdaCloud V100 16GB": "V100-16GB",
    "RTX 3090": "RTX3090",
    "LambdaCloud A100 40GB PCIe": "A100-PCIe-40GB",
    "RTX 6000 Ada": "RTX6000Ada",
}
SIZES = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


class BertAdam(torch.optim.Optimizer):
    """The optimizer in fp32: clips and updates parameter by parameter, with temporary tensors.

    NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT/optimization.py, ``BertAdam.step``.
    """

    def __init__(self, groups):
        super().__init__(groups, {"weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["next_m"] = torch.zeros_like(parameter)
                    state["next_v"] = torch.zeros_like(parameter)
                clip_grad_norm_(parameter, 1.0)
                state["next_m"].mul_(0.9).add_(parameter.grad, alpha=0.1)
                state["next_v"].mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
                update = state["next_m"] / (state["next_v"].sqrt() + 1e-6)
                if group["weight_decay"]:
                    update += group["weight_decay"] * parameter
                parameter.add_(-(3e-5 * update))


def train(size: str, batch: int, seq_len: int, precision: str) -> Callable[[], None]:
    """One step of NVIDIA's run_squad.py, whose loop reads the loss each time."""
    model = BertForQuestionAnswering(BertConfig(vocab_size=30528, **SIZES[size], attn_implementation="bert_nvidia"))
    model.train()
    tokens, answers = torch.randint(30522, (batch, seq_len)), torch.randint(seq_len, (batch,))
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
    }
    loss_of = partial(model, **inputs, start_positions=answers, end_positions=answers)
    torch.set_float32_matmul_precision("high")  # as in NVIDIA's containers
    return (_half if precision == "fp16" else _single)(model, loss_of)


def _single(model: BertForQuestionAnswering, loss_of: Callable) -> Callable[[], None]:
    groups = [{"params": [], "weight_decay": 0.01}, {"params": []}]
    for name, parameter in model.named_parameters():
        groups[name.endswith("bias") or "LayerNorm" in name]["params"].append(parameter)
    optimizer = BertAdam(groups)

    def step():
        loss = loss_of().loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def _half(model: BertForQuestionAnswering, loss_of: Callable) -> Callable[[], None]:
    """By apex's O2 with ``keep_batchnorm_fp32=False``: all weights are fp16, and apex's FusedAdam updates fp32 copies.

    PyTorch's own multi-tensor ops stand in for apex's: they move the same bytes.
    """
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    weights = list(model.half().parameters())
    optimizer = torch.optim.AdamW(masters, fused=True)

    def step():
        loss = loss_of().loss
        (loss.float() * 65536).backward()
        for master in masters:
            master.grad = torch.empty_like(master)
        torch._foreach_copy_([master.grad for master in masters], [weight.grad for weight in weights])
        loss.isfinite().item()  # apex reads whether a gradient overflowed
        clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        model.zero_grad()
        optimizer.zero_grad()
        loss.item()

    return step


def _mask(batch_size: int, kv_length: int, dtype: torch.dtype, **kwargs) -> torch.Tensor:
    return eras.bert_mask(batch_size, kv_length).to(dtype)


def rows() -> list[Row]:
    """The GPUs' first table; the source repeats it elsewhere. Rates are rounded: 12 a second are 11.5 to 12.5.

    The loader works in the loop's own process, some 20 µs a sequence, which is not in the prediction.
    """
    made = []
    for row in pd.read_csv(HERE / "lambda_bert_squad.csv").itertuples():
        gpu, size = GPUS[row.gpu], row.task.split("_")[1]
        name = f"{gpu}: {size}, {row.precision}, {row.batch} × {row.seq_len}"
        build = partial(train, size, row.batch, row.seq_len, row.precision)
        made.append(Row("lambda_bert", name, gpu, 1e3 * row.batch / row.per_sec, build, "step"))
    return made


# The same attention as transformers' of 2022, with a mask in the weights' type.
AttentionInterface.register("bert_nvidia", eras.bert_attention)
AttentionMaskInterface.register("bert_nvidia", _mask)
