"""4-bit weights and the model around them as in the libraries of January 2025.

bitsandbytes 0.43.3, accelerate 1.0.1, peft 0.13.2 and trl 0.13.0; paths are theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from torch import nn
from torch.nn.functional import linear

from memstudy.techniques.weights import Nf4Weights


class _MatMul4Bit(torch.autograd.Function):
    """bitsandbytes/autograd/_functions.py, ``MatMul4Bit``: the whole weight, in the type of the input or gradient."""

    @staticmethod
    def forward(ctx, input, packed, state, bias, keep):
        ctx.kept = input if keep and ctx.needs_input_grad[0] else None
        ctx.packed, ctx.state = packed, state
        return linear(input, bnb.functional.dequantize_4bit(packed, state).to(input.dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        weight = bnb.functional.dequantize_4bit(ctx.packed, ctx.state)
        return torch.matmul(gradient, weight.to(gradient.dtype)), None, None, None, None


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes/nn/modules.py, ``Linear4bit``: computed in the type of the first input, whatever was asked for.

    FSDP makes plain tensors of the weights; their state stays with the layer.
    """

    keeps_input = False  # until 0.43.1 the product kept its input, out of reach of checkpointing

    def forward(self, x):
        if self.bias is not None:
            self.bias.data = self.bias.data.to(x.dtype)
        return _MatMul4Bit.apply(x, self.weight.data, self.quant_state, self.bias, self.keeps_input).to(x.dtype)


@dataclass(frozen=True)
class Weights(Nf4Weights):
    """``sharded`` weights are packed as bf16, or FSDP could not flatten them: fms-acceleration's plugin asks for it."""

    sharded: bool = False
    keeps_inputs: bool = False

    def prepare(self, model):
        """One table for all second scales: bitsandbytes/functional.py, ``quantize_blockwise``, ``name2qmap``."""
        super().prepare(model)
        if self.scales == "double":
            states = [module.quant_state.state2 for module in model.modules() if isinstance(module, Linear4bit)]
            for state in states:
                state.code = states[0].code

    def layer(self, weight):
        settings = {
            "compress_statistics": self.scales == "double",
            "quant_type": "nf4",
            "quant_storage": torch.bfloat16 if self.sharded else torch.uint8,
        }
        layer = Linear4bit(*weight.shape[::-1], bias=False, device="meta", **settings)
        layer.keeps_input = self.keeps_inputs
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **settings).to(weight.device)
        return layer


def prepare_by_trl(model: nn.Module) -> None:
    """trl/trainer/utils.py, ``peft_module_casting_to_bf16``: after peft cast all to fp32, the norms stay so."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) or "norm" in name:
            module.float()


def outputs_in_fp32(forward):
    """accelerate/utils/operations.py, ``convert_outputs_to_fp32``, around the autocast forward pass."""

    def call(*args, **kwargs):
        with torch.autocast("cuda", torch.bfloat16):
            outputs = forward(*args, **kwargs)
        return type(outputs)({k: v.float() if torch.is_tensor(v) else v for k, v in outputs.items()})

    return call
