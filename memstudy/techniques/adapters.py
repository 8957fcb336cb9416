"""Training less: a few new weights in the place of all."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.pytorch_utils import Conv1D

from memstudy.techniques.base import Technique, check_rank


@dataclass(frozen=True)
class Lora(Technique):
    """Two narrow matrices beside each of the blocks', trained in their stead (Hu et al. 2021, arXiv:2106.09685).

    By peft. Not a cheaper way to the same model: the reference point of how little training less can take.
    """

    rank: int = 8
    summary = "train two matrices of low rank (=8) beside each of the blocks', nothing else (peft)"
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
