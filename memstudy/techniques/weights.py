"""Frozen weights in 4 and 8 bits, beside which adapters are trained; by bitsandbytes."""

from __future__ import annotations

import functools
import logging
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from memstudy.techniques.base import Technique, check_dtype

# On a CPU with bf16 instructions it warns at its import of an optional kernel, which would be fetched from a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclass(frozen=True)
class QuantizedWeights(Technique):
    """Base of the formats: the matrices of the blocks are quantised, the rest is loaded in bfloat16.

    As transformers' ``BitsAndBytesConfig`` does, except that the weights are quantised where they are made. Neither
    quantises experts whose matrices share one tensor, as all mixtures of experts in transformers 5 have them.
    """

    exact = False
    group = "weights"
    prepared = 1
    in_bf16 = True
    weights_dtype = torch.bfloat16

    def prepare(self, model):
        model.to(torch.bfloat16)
        for name, layer in list(model.base_model.named_modules()):
            if isinstance(layer, Conv1D) or type(layer) is nn.Linear:
                weight = layer.weight.detach()
                quantised = self.layer(weight.T.contiguous() if isinstance(layer, Conv1D) else weight)
                quantised.bias = layer.bias
                model.base_model.set_submodule(name, quantised)
        model.requires_grad_(False)
        if experts := _elements_of_experts(model):
            warnings.warn(
                f"{experts / 1e9:.3g} billion weights stay in bfloat16: experts whose matrices share one tensor, which "
                "transformers and bitsandbytes do not quantise either",
                stacklevel=2,
            )

    def layer(self, weight: torch.Tensor) -> nn.Linear:
        """A linear layer without bias that computes with a quantised ``weight`` (out, in)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Nf4Weights(QuantizedWeights):
    """4-bit normal floats in blocks of 64 (Dettmers et al. 2023, arXiv:2305.14314).

    ``scales`` is ``double`` (the blocks' scales in 8 bits) or ``single`` (in fp32); ``compute`` is the format of the
    products.
    """

    scales: str = "double"
    compute: str = "bf16"
    summary = "frozen weights in 4 bits (=double or single quantisation), beside an adapter (bitsandbytes)"

    def __post_init__(self):
        check_dtype(self.compute)
        if self.scales not in ("double", "single"):
            raise ValueError(f"scales {self.scales!r}: double or single is needed")

    def prepare(self, model):
        super().prepare(model)
        model.is_loaded_in_4bit = True  # peft asks

    def layer(self, weight):
        from bitsandbytes.nn import Linear4bit, Params4bit

        width = weight.shape[1]
        if type(weight) is torch.Tensor and weight.device.type == "cpu" and not _unpacks(width):  # not a fake tensor
            raise ValueError(
                f"4-bit weights of {width} inputs: bitsandbytes' kernel for this CPU unpacks such rows wrongly; widths "
                "that are multiples of 64 are right: take int8_weights, or predict it for a GPU (--gpu)"
            )
        settings = {"compress_statistics": self.scales == "double", "quant_type": "nf4"}
        compute = check_dtype(self.compute)
        layer = Linear4bit(*weight.shape[::-1], bias=False, compute_dtype=compute, device="meta", **settings)
        layer.weight = Params4bit(weight, requires_grad=False, module=layer, **settings).to(weight.device)
        return layer


def _elements_of_experts(model: nn.Module) -> int:
    return sum(
        parameter.numel()
        for name, module in model.base_model.named_modules()
        if name.endswith("experts")
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3
    )


@functools.cache
def _unpacks(width: int) -> bool:
    """Whether this CPU reads rows of ``width`` 4-bit weights as they were written.

    bitsandbytes 0.50.2 with AVX-512 does not where the width is a multiple of 16 but not of 64: a block of 64 weights
    then ends within a row, and the kernel goes on with the scale of another block. Here each block has its own scale.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weights = (torch.arange(64 * width).view(64, width) // 64 + 1).float()
    return torch.equal(dequantize_4bit(*quantize_4bit(weights, quant_type="nf4")), weights)


@dataclass(frozen=True)
class Int8Weights(QuantizedWeights):
    """8-bit integers with a scale for each neuron; outlying inputs are multiplied in 16 bits (Dettmers et al. 2022).

    LLM.int8(), arXiv:2208.07339, with the paper's threshold of 6 as transformers sets it.
    """

    summary = "frozen weights in 8 bits, beside an adapter (bitsandbytes)"

    def prepare(self, model):
        super().prepare(model)
        model.is_loaded_in_8bit = True  # peft asks

    def layer(self, weight):
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        layer = Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
        return layer
