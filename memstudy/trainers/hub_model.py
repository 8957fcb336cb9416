"""Runs of Hugging Face models with random weights: memory and time depend on shapes alone.

``convert_to`` replaces a model's attention by one of memstudy's variants (`huggingface.convert`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import transformers
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator
from transformers.models.auto import modeling_auto
from transformers.training_args import OptimizerNames

from memstudy.attention import AttentionConfig
from memstudy.attention.settings import mixer_of
from memstudy.huggingface.catalogue import model_config
from memstudy.huggingface.convert import convert_attention
from memstudy.huggingface.inputs import random_batch
from memstudy.huggingface.interface import FLASH
from memstudy.trainers.step import StepRun

CAUSAL = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
# Whisper's decoder predicts the next token of the text, as T5's does.
_LANGUAGE_MODELS = (
    CAUSAL
    | set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    | set(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values())
    | {"WhisperForConditionalGeneration"}
)
# Positions are numbered from the padding token's id + 1, so the position tables have more rows than positions.
_COUNTED_FROM_PADDING = {
    "camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
}  # fmt: skip


class HubModelRun(StepRun):
    """Every choice of one run of a Hugging Face model with random weights.

    ``model`` is a name in ``hub_models.yaml``, a hub id or the path of a ``config.json`` (`model_config`);
    ``optimizer`` is one of ``adamw``, ``adafactor``, ``sgd`` or any name that Hugging Face's Trainer knows; ``task`` is
    ``lm``, the pretraining task of language models and of Whisper, ``classification`` of sequences or of ViT's images,
    or ``contrastive``, CLIP's own loss.

    ``seq_len`` counts the tokens of a text: Whisper's are its decoder's. ViT reads images of one size, and ``seq_len``
    must be the number of tokens that an image becomes.

    ``convert_to`` names the attention variant, with its settings, that replaces the model's attention. ``layers`` lists
    the converted layers, counted from 0, for a variant that replaces projections; empty means all layers.
    """

    kind: Literal["hub_model"] = "hub_model"
    model: str
    optimizer: str = "adamw"  # Trainer's default, AdamW in one fused kernel
    task: Literal["lm", "classification", "contrastive"] = "lm"
    attention: Literal["eager", "sdpa", "flash"] = "sdpa"
    convert_to: dict[str, bool | str | int | float] = Field(default_factory=dict)
    layers: tuple[NonNegativeInt, ...] = ()
    measure_steps: PositiveInt = 1

    @field_validator("optimizer")
    @classmethod
    def _known(cls, optimizer: str) -> str:
        names = ["adamw", *(str(name.value) for name in OptimizerNames)]
        if optimizer not in names:
            raise ValueError(f"unknown optimizer {optimizer!r}; known: {', '.join(names)}")
        return optimizer

    @model_validator(mode="after")
    def _suits_the_model(self):
        config = self.config()
        family = self._family(config)
        positions = positions_of(config)
        if positions is not None and self.seq_len > positions:
            raise ValueError(f"{self.length} is more than the {positions} positions of {self.model}")
        tokens = (config.image_size // config.patch_size) ** 2 + 1 if config.model_type == "vit" else self.seq_len
        if self.seq_len != tokens:
            raise ValueError(
                f"seq_len={self.seq_len}: an image of {config.image_size} × {config.image_size} pixels is {tokens} "
                f"tokens to {self.model}, its patches and the class token: give {tokens}"
            )
        # A forward pass alone also takes shorter sequences.
        axial = config.model_type == "reformer" and config.axial_pos_embds and self.kind != "inference"
        if axial and math.prod(config.axial_pos_shape) != self.seq_len:
            raise ValueError(
                f"seq_len={self.seq_len}: with the axial positions of {self.model} it trains on "
                f"{math.prod(config.axial_pos_shape)} tokens only; take learned positions"
            )
        if "chunked_loss" in self.techniques and (self.task != "lm" or family.__name__ not in CAUSAL):
            raise ValueError(f"chunked_loss is for causal language models; {self.model} with task {self.task} is none")
        for text, technique in zip(self.techniques, self.parsed_techniques(), strict=True):
            if technique.group == "optimizer" and self.optimizer != "adamw":
                raise ValueError(f"{text} is an optimizer itself and excludes optimizer {self.optimizer!r}")
        return self

    @model_validator(mode="after")
    def _variant_fits(self):
        mixer, config = self.mixer(), self.config().get_text_config()
        if self.layers and not (mixer and mixer.projections):
            raise ValueError(f"layers={list(self.layers)} needs a convert_to that replaces projections: lowrank")
        if any(layer >= config.num_hidden_layers for layer in self.layers):
            raise ValueError(f"layers={list(self.layers)}: {self.model} has {config.num_hidden_layers}, counted from 0")
        rank, max_len = getattr(mixer, "rank", 1), getattr(mixer, "max_len", self.seq_len)
        if mixer and mixer.projections and rank > config.hidden_size:
            raise ValueError(f"rank={rank} is above the width of {self.model}, {config.hidden_size}")
        if mixer and not mixer.projections and rank > self.seq_len:
            raise ValueError(f"rank={rank} is more than seq_len={self.seq_len} tokens")
        if max_len < self.seq_len:
            raise ValueError(f"max_len={max_len} is less than seq_len={self.seq_len}")
        return self

    @property
    def what(self) -> str:
        """What is run, in words."""
        return "training step"

    @property
    def length(self) -> str:
        """The number of tokens, in words."""
        return f"seq_len={self.seq_len}"

    def weights_dtype(self) -> torch.dtype:
        """The format in which the model is made."""
        return torch.float32

    def mixer(self) -> AttentionConfig | None:
        """Config of the variant that replaces the model's attention; None for an unchanged model."""
        return mixer_of(self.convert_to) if self.convert_to else None

    def converted(self, model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
        """``model`` with its attention replaced by the variant, if there is one."""
        mixer = self.mixer()
        return convert_attention(model, mixer, layers=self.layers or None, seed=self.seed) if mixer else model

    def config(self) -> transformers.PretrainedConfig:
        """The model's configuration.

        Raises
        ------
        ValueError
            As `model_config`.
        """
        return model_config(self.model)

    def _family(self, config: transformers.PretrainedConfig) -> type[transformers.PreTrainedModel]:
        """The class that the task trains: a classifier, or the class that ``config.architectures`` names."""
        if self.task == "classification":
            return self._classifier(config)
        names = config.architectures
        name = names[0] if isinstance(names, list) and names else None
        known, needed = _LANGUAGE_MODELS, "a language model's class is needed"
        if self.task == "contrastive":
            known, needed = {"CLIPModel"}, "task contrastive is for CLIPModel"
        if not isinstance(name, str) or name not in known:
            tasks = {"CLIPModel": "contrastive", "ViTForImageClassification": "classification"}
            other = f", or task {tasks[name]}" if isinstance(name, str) and name in tasks else ""
            raise ValueError(f"model {self.model}: architectures={names!r}: {needed}{other}")
        family = getattr(transformers, name)
        if not isinstance(config, family.config_class):
            raise ValueError(f"model {self.model}: {name} is not of its model_type={config.model_type!r}")
        return family

    def _classifier(self, config: transformers.PretrainedConfig) -> type[transformers.PreTrainedModel]:
        if config.model_type == "vit":
            return transformers.ViTForImageClassification
        name = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
        if name is None:
            raise ValueError(f"transformers has no classifier of the family of {self.model}, {config.model_type}")
        if config.is_encoder_decoder:  # it reads each row's last </s>, and random tokens may have none
            raise ValueError(f"classification is for encoders and decoders; {self.model} is both: take task lm")
        return getattr(transformers, name)

    def make_model(self) -> transformers.PreTrainedModel:
        """The model with random weights, in fp32 to train whatever dtype its config names, converted."""
        config = self.config()
        family = self._family(config)
        if self.task == "classification" and family.main_input_name == "input_ids" and config.pad_token_id is None:
            config.pad_token_id = 0  # a decoder's classifier reads the last token that is not padding
        # A family with only its own attention calls it eager.
        attention = self.attention if family._supports_sdpa else "eager"
        if attention == "flash":
            attention = FLASH
        model = family._from_config(config, attn_implementation=attention, dtype=self.weights_dtype())
        if "LMHead" in family.__name__:
            model.loss_type = "ForCausalLM"  # transformers would guess it from the class name and warn
        if self.task == "contrastive":  # without labels, only a flag makes CLIP return its loss
            model.register_forward_pre_hook(_ask_for_loss, with_kwargs=True)
        return self.converted(model)

    def make_batch(self) -> dict[str, torch.Tensor]:
        """A batch of random inputs, from torch's global generator; no padding."""
        config = self.config()
        return random_batch(
            self._family(config), config, task=self.task, batch_size=self.batch_size, seq_len=self.seq_len
        )

    def flags(self):
        return {} if self.optimizer == "adamw" else {"optim": self.optimizer}


def positions_of(config: transformers.PretrainedConfig) -> int | None:
    """The most tokens that a text can have; None for relative positions without an end."""
    if config.model_type == "whisper":
        return config.max_target_positions
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and text.model_type in _COUNTED_FROM_PADDING:
        positions -= (text.pad_token_id or 0) + 1
    return positions


def _ask_for_loss(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, kwargs | {"return_loss": True}
