"""The techniques, by name: each changes how a model is trained or run, and combines with the others.

A :class:`Technique` consists of flags of Hugging Face's ``TrainingArguments``, a change of the model before
training, an optimizer, a context around the forward pass, or several of these. ``trainers`` uses one set of
techniques for training, measuring and predicting.

A run names its techniques as text, with optional settings after ``=``, divided by ``:``: ``"bf16"``,
``"accumulation=4"``, ``"lora=16:q_proj+v_proj:bf16"``. :func:`parse` turns the text into techniques.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections import Counter
from collections.abc import Sequence

import torch

from memstudy.attention.base import Unavailable
from memstudy.techniques.adapters import IA3, Dora, Lora, Prefix, Prompt, QLora
from memstudy.techniques.base import Technique
from memstudy.techniques.checkpointing import Checkpointing, SelectiveCheckpointing
from memstudy.techniques.engines import Compile, Int8, OnnxRuntime, TensorRT
from memstudy.techniques.optimizers import (
    Adafactor,
    AdamW8bit,
    Apollo,
    GaLore,
    Muon,
    PagedAdamW8bit,
    Sgd,
    TorchaoAdamW4bit,
    TorchaoAdamW8bit,
)
from memstudy.techniques.precision import Bf16, Bf16Weights, Convention, Fp16, PureBf16, Tf32
from memstudy.techniques.pruning import FewerHeads, Masks, Narrow, Pruned, SemiStructured, Sparse
from memstudy.techniques.sharding import Fsdp
from memstudy.techniques.step import Accumulation, ChunkedLoss, OffloadActivations, OptimizerInBackward
from memstudy.techniques.weights import Int8Weights, Nf4Weights

TECHNIQUES: dict[str, type[Technique]] = {
    "bf16": Bf16,
    "bf16_weights": Bf16Weights,
    "pure_bf16": PureBf16,
    "convention": Convention,
    "fp16": Fp16,
    "tf32": Tf32,
    "checkpointing": Checkpointing,
    "selective_checkpointing": SelectiveCheckpointing,
    "accumulation": Accumulation,
    "chunked_loss": ChunkedLoss,
    "adamw_8bit": AdamW8bit,
    "paged_adamw_8bit": PagedAdamW8bit,
    "adamw_8bit_torchao": TorchaoAdamW8bit,
    "adamw_4bit_torchao": TorchaoAdamW4bit,
    "adafactor": Adafactor,
    "sgd": Sgd,
    "muon": Muon,
    "galore": GaLore,
    "apollo": Apollo,
    "offload_activations": OffloadActivations,
    "optimizer_in_backward": OptimizerInBackward,
    "fsdp": Fsdp,
    "lora": Lora,
    "dora": Dora,
    "qlora": QLora,
    "ia3": IA3,
    "prefix": Prefix,
    "prompt": Prompt,
    "nf4_weights": Nf4Weights,
    "int8_weights": Int8Weights,
    "masks": Masks,
    "pruned": Pruned,
    "narrow": Narrow,
    "fewer_heads": FewerHeads,
    "sparse": Sparse,
    "semi_structured": SemiStructured,
    "compile": Compile,
    "onnxruntime": OnnxRuntime,
    "int8": Int8,
    "tensorrt": TensorRT,
}

# A name for several techniques. TRL's SFTTrainer by default: trl/trainer/sft_config.py and sft_trainer.py.
PRESETS = {"sft": ("convention=trl", "checkpointing")}


def parse(texts: Sequence[str], *, trained: bool = True) -> tuple[Technique, ...]:
    """The techniques that ``texts`` name, in order, for a model that is ``trained`` or only run.

    Raises
    ------
    ValueError
        For an unknown name, a setting that is not a number or out of range, a setting of a technique that has none,
        and for techniques that exclude each other.
    """
    techniques = tuple(_parse_one(text) for text in texts)
    for group, count in Counter(t.group or type(t).__name__ for t in techniques).items():
        if count > 1:
            raise ValueError(f"techniques {list(texts)}: only one of kind {group!r} can be used")
    kinds = {type(technique) for technique in techniques}
    if {OptimizerInBackward, Accumulation} <= kinds:
        raise ValueError("optimizer_in_backward drops each gradient at once and so excludes accumulation")
    groups = {technique.group for technique in techniques}
    if trained and "weights" in groups and "adapters" not in groups:
        raise ValueError(f"techniques {list(texts)}: quantised weights are frozen: add an adapter, as lora=16")
    if "weights" in groups and QLora in kinds:
        raise ValueError("qlora quantises the weights and so excludes nf4_weights and int8_weights: take lora")
    if Fsdp in kinds and ("weights" in groups or QLora in kinds):
        raise ValueError("quantised weights are not divided among processes and so exclude fsdp: take lora alone")
    if Convention in kinds and "adapters" not in groups:
        raise ValueError(f"techniques {list(texts)}: a convention is for adapters: add one, as lora=16")
    if Prefix in kinds and "checkpointing" in groups:
        raise ValueError("prefix hands keys and values to the blocks and so excludes checkpointing")
    for name, technique in zip(texts, techniques, strict=True):
        if technique.one_count_of_steps and OptimizerInBackward in kinds:
            raise ValueError(f"{name} counts steps for all parameters together and so excludes optimizer_in_backward")
        if technique.group == "optimizer" and not technique.takes_shards and Fsdp in kinds:
            raise ValueError(f"{name} needs whole parameters and so excludes fsdp; AdamW, sgd and muon do not")
        if technique.group == "optimizer" and not technique.rounds_stochastically and Bf16Weights in kinds:
            raise ValueError(f"{name} does not round stochastically and so excludes bf16_weights; torchao's AdamW does")
    return techniques


def accumulation_of(techniques: Sequence[Technique]) -> int:
    """Number of parts that a batch is run in with ``techniques``; 1 without accumulation."""
    return max((technique.flags().get("gradient_accumulation_steps", 1) for technique in techniques), default=1)


def excluded(texts: Sequence[str]) -> str:
    """Why the techniques that ``texts`` name can't be combined; empty if they can."""
    try:
        parse(texts)
    except ValueError as error:
        return str(error)
    return ""


def check_available(techniques: Sequence[Technique], *, capability: tuple[int, int] | None = None) -> None:
    """Raise :class:`Unavailable` for the first technique that cannot run.

    Parameters
    ----------
    techniques : sequence of Technique
    capability : tuple of int, optional
        Compute capability of the GPU to predict for; None to run on this machine.
    """
    predicted = capability is not None
    if capability is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
    for technique in techniques:
        name = next(name for name, known in TECHNIQUES.items() if known is type(technique))
        for package in () if predicted and technique.predicted_by_rules else technique.packages:
            if importlib.util.find_spec(package) is None:
                raise Unavailable(f"{name} needs {package}, which is not installed: pip install 'memstudy[techniques]'")
        if technique.needs_compiler and not predicted and not any(map(shutil.which, ("g++", "clang++"))):
            raise Unavailable(f"{name} needs a C++ compiler, and there is none: install g++")
        if technique.requires == "cuda" and capability is None:
            raise Unavailable(f"{name} needs a CUDA device, and there is none")
        if capability is not None and technique.capability > capability:
            needed, had = (".".join(map(str, c)) for c in (technique.capability, capability))
            raise Unavailable(f"{name} needs compute capability {needed}, and this GPU has {had}")


def _parse_one(text: str) -> Technique:
    name, has_setting, setting = text.partition("=")
    if name not in TECHNIQUES:
        raise ValueError(f"unknown technique {name!r}; known: {', '.join(TECHNIQUES)}")
    if not has_setting:
        return TECHNIQUES[name]()
    known, parts = dataclasses.fields(TECHNIQUES[name]), setting.split(":")
    if len(parts) > len(known):
        has = "no setting" if not known else ":".join(field.name for field in known) + " for settings"
        raise ValueError(f"technique {name!r} has {has}, but got {setting!r}")
    try:
        return TECHNIQUES[name](
            *(part if field.type == "str" else float(part) for field, part in zip(known, parts, strict=False))
        )
    except ValueError as error:
        reason = "a number is needed" if "could not convert" in str(error) else str(error)
        raise ValueError(f"technique {text!r}: {reason}") from None
