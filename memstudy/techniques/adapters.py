"""Adapters: training a few new weights instead of all weights."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.pytorch_utils import Conv1D

from memstudy.techniques.base import Technique, check_rank


@dataclass(frozen=True)
class Lora(Technique):
    """Train two low-rank matrices beside each matrix of the blocks, nothing else (Hu et al. 2021, arXiv:2106.09685).

    By peft. LoRA gives another model than full training; it shows how little memory training fewer weights takes.
    """

    rank: int = 8
    summary = "train two matrices of low rank (=8) beside each matrix of the blocks, nothing else (peft)"
    exact = False
    prepared_last = True
    packages = ("peft",)

    def __post_init__(self):
        check_rank(self.rank)

    def prepare(self, model):
        from peft import LoraConfig, inject_adapter_in_model

        transposed = any(isinstance(module, Conv1D) for module in model.modules())
        config = LoraConfig(
            r=int(self.rank), lora_alpha=2 * int(self.rank), target_modules="all-linear", fan_in_fan_out=transposed
        )
        inject_adapter_in_model(config, model)
