"""Number formats of the products and the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memstudy.techniques.base import Technique


@dataclass(frozen=True)
class Bf16(Technique):
    """Mixed precision: products in bfloat16, weights and optimizer in fp32 (Micikevicius et al. 2018)."""

    summary = "bfloat16 autocast; weights, gradients and optimizer state stay fp32"
    exact = False
    group = "precision"
    in_bf16 = True

    def flags(self):
        return {"bf16": True}


@dataclass(frozen=True)
class Tf32(Technique):
    """TF32 products: fp32 storage, 10-bit mantissa inside the GPU's tensor cores."""

    summary = "TF32 tensor-core products for fp32 tensors; saves time, not memory"
    exact = False
    group = "precision"
    requires = "cuda"
    capability = (8, 0)

    def flags(self):
        return {"tf32": True}


@dataclass(frozen=True)
class Fp16(Technique):
    """Mixed precision: products in float16, the loss scaled to preserve small gradients (Micikevicius et al. 2018).

    CUDA only: few CPUs have fast products in float16.
    """

    summary = "float16 autocast with loss scaling; weights, gradients and optimizer state stay fp32"
    exact = False
    group = "precision"
    requires = "cuda"

    def flags(self):
        return {"fp16": True}


@dataclass(frozen=True)
class Bf16Weights(Technique):
    """Weights, gradients and optimizer state in bfloat16 too, updated with stochastic rounding.

    With rounding to nearest, an update below half a weight's last bit would be lost (Zamirai et al. 2020,
    arXiv:2010.06192). torchao's optimizers round stochastically: AdamW, or its 8- and 4-bit forms if requested too.
    """

    summary = "everything in bfloat16, updates rounded stochastically (torchao); half the parameters' memory"
    exact = False
    packages = ("torchao",)
    group = "precision"
    in_bf16 = True

    def prepare(self, model):
        model.to(torch.bfloat16)

    def flags(self):
        return {"optim_args": "bf16_stochastic_round=True"}  # for torchao's low-bit optimizers

    def optimizer(self, model):
        from torchao.optim import _AdamW

        return _AdamW, {"bf16_stochastic_round": True}
