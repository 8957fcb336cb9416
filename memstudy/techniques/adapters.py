"""Adapters: training a few new weights instead of all weights; by peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from memstudy.techniques.base import Technique, check_dtype, check_rank
from memstudy.techniques.weights import Nf4Weights

_LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Adapters(Technique):
    """Base of the methods that freeze the model and train new weights."""

    exact = False
    group = "adapters"
    prepared = 2  # beside the weights as they are stored
    packages = ("peft",)


@dataclass(frozen=True)
class Lora(Adapters):
    """Train two low-rank matrices beside each target, nothing else (Hu et al. 2021, arXiv:2106.09685).

    ``targets`` is ``all-linear`` (the matrices of the blocks), ``attention`` (those inside attention) or names of
    linear layers joined by ``+``. ``dtype`` is the new matrices' format (``fp32``, ``bf16``); empty for that of the
    weight beside them, or of its products if the weight is quantised. LoRA gives another model than full training.
    """

    rank: int = 8
    targets: str = "all-linear"
    dtype: str = ""
    summary = "train two matrices of low rank (=8) beside each matrix of the blocks, nothing else (peft)"
    with_lengths = False

    def __post_init__(self):
        check_rank(self.rank)
        check_dtype(self.dtype)

    def prepare(self, model):
        from peft import LoraConfig, inject_adapter_in_model

        transposed = any(isinstance(module, Conv1D) for module in model.modules())
        config = LoraConfig(
            r=int(self.rank),
            lora_alpha=2 * int(self.rank),
            target_modules=_targets(model, self.targets),
            fan_in_fan_out=transposed,
            use_dora=self.with_lengths,
        )
        with warnings.catch_warnings():  # peft says so of the experts' tensors, whose ranks it then does take from them
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            try:
                inject_adapter_in_model(config, model)
            except ValueError as error:
                if "ParamWrapper does not work with use_dora" not in str(error):
                    raise
                raise ValueError(
                    f"dora={self.rank:g}: peft has no DoRA beside experts, whose matrices share one tensor: take "
                    f"dora={self.rank:g}:attention, or lora"
                ) from None
        if self.dtype:
            cast_trained(model, check_dtype(self.dtype))


@dataclass(frozen=True)
class Dora(Lora):
    """LoRA with a trained length for each row of the weights (Liu et al. 2024, arXiv:2402.09353)."""

    summary = "LoRA (=8) and the length of each neuron's weights (peft)"
    with_lengths = True


@dataclass(frozen=True)
class QLora(Lora):
    """LoRA beside 4-bit weights (Dettmers et al. 2023, arXiv:2305.14314): ``nf4_weights`` and ``lora`` in one name."""

    summary = "LoRA (=8) beside weights in 4 bits: nf4_weights and lora (peft, bitsandbytes)"
    weights_dtype = torch.bfloat16
    in_bf16 = True

    def prepare(self, model):
        Nf4Weights().prepare(model)
        super().prepare(model)


@dataclass(frozen=True)
class IA3(Adapters):
    """Train one factor for each key, value and feed-forward neuron (Liu et al. 2022, arXiv:2205.05638).

    ``targets`` are names of linear layers joined by ``+``; empty for those that peft knows for the model's family.
    """

    targets: str = ""
    summary = "train one factor for each key, value and neuron of the feed-forward parts (peft)"

    def prepare(self, model):
        from peft import IA3Config, inject_adapter_in_model
        from peft.utils import (
            TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEED_FORWARD,
        )
        from peft.utils import (
            TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS,
        )

        family = model.config.model_type
        if not self.targets and family not in TARGETS:
            raise ValueError(
                f"ia3: peft knows no targets in models of type {family}: name them, as in ia3=k_proj+v_proj"
            )
        names = _targets(model, self.targets or "+".join(TARGETS[family]))
        inside = [name for name in FEED_FORWARD.get(family, []) if name in names]
        transposed = any(isinstance(module, Conv1D) for module in model.modules())
        config = IA3Config(target_modules=names, feedforward_modules=inside, fan_in_fan_out=transposed)
        inject_adapter_in_model(config, model)


@dataclass(frozen=True)
class VirtualTokens(Adapters):
    """Base of the methods that train ``tokens`` made-up tokens before the text."""

    tokens: int = 20

    def __post_init__(self):
        if self.tokens < 1 or not float(self.tokens).is_integer():
            raise ValueError(f"{self.tokens:g} tokens: a whole number from 1 is needed")

    @property
    def more_tokens(self):
        return int(self.tokens)

    def wrapped(self, model: nn.Module, method: type) -> nn.Module:
        """``model`` with virtual tokens by peft's ``method``, a class of configurations.

        Raises
        ------
        ValueError
            For a model that is no decoder with a language model's head.
        """
        from peft import TaskType, get_peft_model

        if model.config.is_encoder_decoder or not model.can_generate():
            name = f"{type(self).__name__.lower()}={self.tokens:g}"
            raise ValueError(f"{name}: virtual tokens are for decoders, and {type(model).__name__} is none: take lora")
        return get_peft_model(model, method(num_virtual_tokens=int(self.tokens), task_type=TaskType.CAUSAL_LM))


@dataclass(frozen=True)
class Prompt(VirtualTokens):
    """Train the embeddings of virtual tokens before the text (Lester et al. 2021, arXiv:2104.08691)."""

    summary = "train the embeddings of virtual tokens (=20) before the text (peft)"

    def prepare(self, model):
        from peft import PromptTuningConfig

        return self.wrapped(model, PromptTuningConfig)


@dataclass(frozen=True)
class Prefix(VirtualTokens):
    """Train the keys and values of virtual tokens in each layer (Li & Liang 2021, arXiv:2101.00190)."""

    summary = "train the keys and values of virtual tokens (=20) in each layer (peft)"

    def prepare(self, model):
        from peft import PrefixTuningConfig

        return self.wrapped(model, PrefixTuningConfig)


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the trained parameters of ``model`` to ``dtype``, as peft and TRL do: by their ``data``."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _targets(model: nn.Module, targets: str) -> str | list[str]:
    """peft's ``target_modules`` for the layers that ``targets`` names; ValueError if a name matches no linear layer."""
    if targets == "all-linear":
        return targets
    linear = [name for name, module in model.named_modules() if isinstance(module, _LINEAR)]
    if targets == "attention":
        inside = tuple(f"{name}." for name in _attentions(model))
        found = [name for name in linear if name.startswith(inside)]
        if not found:
            raise ValueError(f"targets attention: no linear layer of {type(model).__name__} is inside an attention")
        return found
    names = targets.split("+")
    for name in names:
        if not any(f".{layer}".endswith(f".{name}") for layer in linear):
            known = dict.fromkeys(layer.rpartition(".")[2] for layer in linear)
            raise ValueError(
                f"targets {name!r}: {type(model).__name__} has no such linear layer, but {', '.join(known)}"
            )
    return names


def _attentions(model: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if type(module).__name__.endswith("Attention"))
