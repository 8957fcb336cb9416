"""What can be run: frozen descriptions, and the model and inputs that each one describes.

A description holds every choice, so that the hash of its JSON names the run. How it is carried out is `trainers`.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator, model_validator
from transformers.models.auto import modeling_auto
from transformers.training_args import OptimizerNames

from memstudy import techniques
from memstudy.attention import ATTENTION, AttentionConfig
from memstudy.models import DecoderLM, decoder
from memstudy.peers import PEERS

HUB_MODELS = Path(__file__).with_name("hub_models.yaml")

_CAUSAL = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_LANGUAGE_MODELS = (
    _CAUSAL
    | set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    | set(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values())
)
# Their positions are counted from the padding token's number on, so that their tables have more rows than positions.
_COUNTED_FROM_PADDING = {
    "camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
}  # fmt: skip


class StepRun(BaseModel):
    """What every run of a training step chooses; sizes in tokens and sequences, memory in MiB.

    ``measure_steps`` timed steps are taken on random tokens. With ``budget_mib`` the measured step is refused when
    its peak passes the budget.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    experiment: str
    seq_len: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt
    techniques: tuple[str, ...] = ()
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    measure_steps: NonNegativeInt = 0
    budget_mib: Annotated[float, Field(gt=0)] | None = None
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _parts_are_equal(self):
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} does not divide batch_size={self.batch_size}")
        return self

    def levers(self) -> tuple[techniques.Technique, ...]:
        """The techniques as objects."""
        return techniques.parse(self.techniques)

    @property
    def accumulation(self) -> int:
        """In how many parts a batch is run."""
        flags = (lever.flags() for lever in self.levers())
        return next((f[k] for f in flags for k in f if k == "gradient_accumulation_steps"), 1)

    def flags(self) -> dict[str, object]:
        """Flags for ``transformers.TrainingArguments`` besides those of the techniques."""
        return {}


class LanguageModelRun(StepRun):
    """Every choice of one run of the studies' decoder language model.

    ``train_steps`` updates are taken on ``dataset``; they or ``measure_steps`` may be 0.
    """

    kind: Literal["language_model"] = "language_model"
    n_layers: PositiveInt
    hidden_size: PositiveInt
    n_heads: PositiveInt
    feed_forward: PositiveInt
    vocab_size: PositiveInt
    attention: dict[str, bool | str | int | float] = {"variant": "softmax", "implementation": "eager"}
    train_steps: NonNegativeInt = 0
    eval_blocks: PositiveInt = 32
    dataset: str = ""
    data_hash: str = ""

    @model_validator(mode="after")
    def _consistent(self):
        if self.hidden_size % self.n_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of n_heads={self.n_heads}")
        if self.train_steps and not self.dataset:
            raise ValueError(f"train_steps={self.train_steps} needs a dataset")
        if not self.train_steps and not self.measure_steps:
            raise ValueError("measure_steps and train_steps are both 0: nothing to run")
        _check_window(self.mixer(), self.seq_len)
        return self

    def mixer(self) -> AttentionConfig:
        """The attention variant as its config."""
        return _mixer(self.attention)

    def make_model(self) -> DecoderLM:
        """The model with random weights."""
        return decoder(
            vocab_size=self.vocab_size,
            n_layers=self.n_layers,
            hidden_size=self.hidden_size,
            n_heads=self.n_heads,
            feed_forward=self.feed_forward,
            max_len=self.seq_len,
            attention=self.mixer(),
        )

    def make_batch(self) -> dict[str, torch.Tensor]:
        """A batch of random tokens, from torch's global generator."""
        tokens = torch.randint(self.vocab_size, (self.batch_size, self.seq_len))
        return {"input_ids": tokens, "labels": tokens}


def _mixer(attention: dict[str, bool | str | int | float]) -> AttentionConfig:
    settings = dict(attention)
    variant = settings.pop("variant", None)
    if variant not in ATTENTION:
        raise ValueError(f"unknown attention variant {variant!r}; known: {', '.join(ATTENTION)}")
    try:
        return ATTENTION[variant](**settings)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(ATTENTION[variant]))
        raise ValueError(f"attention {variant!r}: {error}; its settings: {known}") from None


def _check_window(mixer: AttentionConfig, seq_len: int) -> None:
    window = getattr(mixer, "window", 0)
    if window > seq_len:
        raise ValueError(f"window={window} is larger than seq_len={seq_len}")


class HubModelRun(StepRun):
    """Every choice of one run of a Hugging Face model with random weights.

    ``model`` is a name in ``hub_models.yaml`` or the path of a ``config.json``; ``optimizer`` is one of ``adamw``,
    ``adafactor``, ``sgd`` or any name that Hugging Face's Trainer knows; ``task`` is ``lm``, what the model was
    pretrained for, or ``classification`` of sequences.
    """

    kind: Literal["hub_model"] = "hub_model"
    model: str
    optimizer: str = "adamw"  # Trainer's default, AdamW in one fused kernel
    task: Literal["lm", "classification"] = "lm"
    attention: Literal["eager", "sdpa"] = "sdpa"
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
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and config.model_type in _COUNTED_FROM_PADDING:
            positions -= (config.pad_token_id or 0) + 1
        if positions is not None and self.seq_len > positions:
            raise ValueError(f"seq_len={self.seq_len} is more than the {positions} positions of {self.model}")
        if self.task == "lm":
            family = self._family(config)
        else:
            if config.model_type not in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
                raise ValueError(f"transformers has no classifier of the family of {self.model}, {config.model_type}")
            if config.is_encoder_decoder:  # it reads the last </s> of each row, and which rows have one is data
                raise ValueError(f"classification is for encoders and decoders; {self.model} is both: take task lm")
        if "chunked_loss" in self.techniques and (self.task != "lm" or family.__name__ not in _CAUSAL):
            raise ValueError(f"chunked_loss is for causal language models; {self.model} with task {self.task} is none")
        if "adamw_8bit" in self.techniques and self.optimizer != "adamw":
            raise ValueError(f"adamw_8bit is an optimizer itself and excludes optimizer {self.optimizer!r}")
        return self

    def config(self) -> transformers.PretrainedConfig:
        """The model's configuration.

        Raises
        ------
        ValueError
            For an unknown name, and for a file that is no configuration.
        """
        if self.model.endswith(".json"):
            return _read_config(self.model)
        known = hub_models()
        if self.model not in known:
            raise ValueError(
                f"unknown model {self.model!r}; known: {', '.join(known)}; for another give the path of its config.json"
            )
        return transformers.AutoConfig.for_model(**known[self.model])

    def _family(self, config: transformers.PretrainedConfig) -> type[transformers.PreTrainedModel]:
        """The class of the language model that ``config`` is for."""
        names = config.architectures
        name = names[0] if isinstance(names, list) and names else None
        if not isinstance(name, str) or name not in _LANGUAGE_MODELS:
            raise ValueError(f"model {self.model}: architectures={names!r}: a language model's class is needed")
        family = getattr(transformers, name)
        if not isinstance(config, family.config_class):
            raise ValueError(f"model {self.model}: {name} is not of its model_type={config.model_type!r}")
        return family

    def make_model(self) -> transformers.PreTrainedModel:
        """The model with random weights."""
        config = self.config()
        if self.task == "classification":
            if config.pad_token_id is None:  # a decoder's classifier reads the last token that is none
                config.pad_token_id = 0
            return transformers.AutoModelForSequenceClassification.from_config(
                config, attn_implementation=self.attention
            )
        family = self._family(config)
        model = family._from_config(config, attn_implementation=self.attention)
        if family.__name__.endswith("LMHeadModel"):
            model.loss_type = "ForCausalLM"  # transformers guesses it from the class's name, and warns
        return model

    def make_batch(self) -> dict[str, torch.Tensor]:
        """A batch of random tokens, from torch's global generator; no padding."""
        tokens = torch.randint(self.config().get_text_config().vocab_size, (self.batch_size, self.seq_len))
        return {"input_ids": tokens, "labels": tokens[:, 0] % 2 if self.task == "classification" else tokens}

    def flags(self):
        return {} if self.optimizer == "adamw" else {"optim": self.optimizer}


def _read_config(path: str) -> transformers.PretrainedConfig:
    """The configuration in a file; read here, for transformers would look for a missing one on the internet."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"model {path}: {error.strerror}; the path of a config.json is needed") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model {path}: not JSON: {error}") from None
    kind = given.get("model_type") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"model {path}: model_type={kind!r} is none that transformers knows")
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(given)
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"model {path}: {' '.join(str(error).split())[:200]}") from None


def hub_models() -> dict[str, dict]:
    """The models known by name, and what of their configuration differs from the family's defaults."""
    return yaml.safe_load(HUB_MODELS.read_bytes())


class LayerRun(BaseModel):
    """Every choice of one attention layer measured alone: forward and backward in fp32, no optimizer.

    ``who`` is ``memstudy`` or a name in ``peers.PEERS``: whose layer of that variant is measured. With ``cross`` the
    layer attends to a second sequence of the same shape instead of its own. ``measure_steps`` steps are timed; threads
    are those of the process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["layer"] = "layer"
    experiment: str
    who: str = "memstudy"
    attention: dict[str, bool | str | int | float]
    seq_len: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt = 1
    hidden_size: PositiveInt = 512
    n_heads: PositiveInt = 8
    is_causal: bool
    cross: bool = False
    measure_steps: PositiveInt = 5
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _consistent(self):
        if self.hidden_size % self.n_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of n_heads={self.n_heads}")
        mixer = self.mixer()
        mixer.check_causal(self.is_causal)
        _check_window(mixer, self.seq_len)
        if self.cross and self.is_causal:
            raise ValueError("cross=true needs is_causal=false: the two sequences have no common order")
        if self.cross and "memory" not in inspect.signature(mixer.module.forward).parameters:
            raise ValueError(f"cross=true: the layer of {mixer.name!r} attends to its own sequence only")
        if self.who == "memstudy":
            return self
        if self.who not in PEERS:
            raise ValueError(f"unknown who {self.who!r}; known: memstudy, {', '.join(PEERS)}")
        if PEERS[self.who].variant != mixer.name:
            raise ValueError(f"who={self.who!r} has {PEERS[self.who].variant!r}, not {mixer.name!r}")
        return self

    def mixer(self) -> AttentionConfig:
        """The attention variant as its config."""
        return _mixer(self.attention)

    def make_layer(self) -> torch.nn.Module:
        """The layer with random weights, from torch's global generator.

        Raises
        ------
        Unavailable
            When the peer is not installed here.
        """
        if self.who == "memstudy":
            mixer = self.mixer()
            return mixer.module(self.hidden_size, self.n_heads, mixer, is_causal=self.is_causal)
        return PEERS[self.who].make(
            self.mixer(),
            hidden_size=self.hidden_size,
            n_heads=self.n_heads,
            seq_len=self.seq_len,
            is_causal=self.is_causal,
        )


RUNS: dict[str, type[StepRun] | type[LayerRun]] = {
    "language_model": LanguageModelRun,
    "hub_model": HubModelRun,
    "layer": LayerRun,
}


def parse_run(given: object) -> StepRun | LayerRun:
    """The run that the JSON value ``given`` describes; its ``kind`` says which.

    Raises
    ------
    ValueError
        For an unknown kind or field, a value out of range, choices that contradict each other.
    """
    if not isinstance(given, dict) or given.get("kind") not in RUNS:
        kind = given.get("kind") if isinstance(given, dict) else given
        raise ValueError(f"unknown kind of run {kind!r}; known: {', '.join(RUNS)}")
    known = RUNS[given["kind"]].model_fields
    for name in given:
        if name not in known:
            raise ValueError(f"unknown field {name!r} of a {given['kind']} run; known: {', '.join(known)}")
    return RUNS[given["kind"]].model_validate(given)
