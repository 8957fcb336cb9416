"""Number formats of the products and the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memstudy.techniques.adapters import cast_trained
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


@dataclass(frozen=True)
class PureBf16(Technique):
    """Weights, gradients and optimizer state in bfloat16, updated with rounding to nearest: "bf16 weights" to most.

    An update below half a weight's last bit is lost (Zamirai et al. 2020, arXiv:2010.06192); see ``bf16_weights``.
    """

    summary = "weights, gradients and the optimizer's state in bfloat16; small updates are lost in rounding"
    exact = False
    group = "precision"
    in_bf16 = True
    weights_dtype = torch.bfloat16

    def prepare(self, model):
        model.to(torch.bfloat16)


@dataclass(frozen=True)
class Convention(Technique):
    """The number formats of a model with adapters, by the library that prepares it; products in bfloat16 autocast.

    All load the weights in bfloat16. ``uncast``: the new weights fp32, as peft's ``get_peft_model`` makes them.
    ``peft``: besides, all weights that are not quantised in fp32 (``prepare_model_for_kbit_training``). ``trl-0.13``:
    the same with embeddings and head in bfloat16 (``peft_module_casting_to_bf16``, trl/trainer/utils.py up to 0.13).
    ``trl``: as ``uncast``, but beside quantised weights the new ones in bfloat16 (trl/trainer/sft_trainer.py).
    """

    name: str = "uncast"
    summary = "number formats beside adapters: uncast, peft, trl-0.13 or trl; bfloat16 weights and autocast"
    exact = False
    group = "precision"
    in_bf16 = True
    prepared = 3
    weights_dtype = torch.bfloat16

    def __post_init__(self):
        if self.name not in ("uncast", "peft", "trl-0.13", "trl"):
            raise ValueError(f"convention {self.name!r}: uncast, peft, trl-0.13 and trl are known")

    def flags(self):
        return {"bf16": True}

    def prepare(self, model):
        quantised = any(parameter.dtype in (torch.uint8, torch.int8) for parameter in model.parameters())
        if self.name in ("peft", "trl-0.13"):
            self._prepare_as_peft(model)
        else:
            model.to(torch.bfloat16)
            cast_trained(model, torch.bfloat16 if quantised and self.name == "trl" else torch.float32)

    def _prepare_as_peft(self, model):
        from peft import prepare_model_for_kbit_training

        model.to(torch.bfloat16)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # freezes all
        for parameter in trained:
            parameter.requires_grad_(True)
        if self.name == "trl-0.13":
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                if table is not None:
                    table.weight.data = table.weight.data.to(torch.bfloat16)
