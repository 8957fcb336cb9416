"""What can be run on models of our own: frozen descriptions, and the model and inputs that each one describes.

A description holds every choice, so that the hash of its JSON names the run. How it is carried out is
`trainers`; runs of Hugging Face's models are in `hub_configs`.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_serializer, model_validator

from memstudy import machine, techniques
from memstudy.attention import ATTENTION, AttentionConfig
from memstudy.models import DecoderLM, decoder
from memstudy.peers import PEERS

TAKE_SHARDS = ("adamw_torch_fused", "adamw_torch", "sgd")  # of the Trainer's optimizers, see Technique.takes_shards


class StepRun(BaseModel):
    """What every run of a training step chooses; sizes in tokens and sequences, memory in MiB.

    ``measure_steps`` timed steps are taken on random tokens. With ``budget_mib`` the measured step is refused when
    its peak passes the budget. Several ``processes``, each with a GPU where there are any, share every batch; a run in
    one is named without the field.
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
    processes: PositiveInt = 1

    @model_serializer(mode="wrap")
    def _named_as_ever(self, dump):
        return {name: value for name, value in dump(self).items() if name != "processes" or value > 1}

    @model_validator(mode="after")
    def _techniques_are_for_this(self):
        for text, lever in zip(self.techniques, self.levers(), strict=True):
            if not self._takes(lever):
                raise ValueError(f"technique {text!r} is for {'training' if lever.in_training else 'inference'} alone")
            if lever.several_processes and self.processes == 1:
                raise ValueError(f"technique {text!r} is for several processes, and processes=1")
        if "fsdp" in self.techniques and self.flags().get("optim", "sgd") not in TAKE_SHARDS:
            raise ValueError(f"optimizer {self.flags()['optim']!r} needs whole parameters and so excludes fsdp")
        if "optimizer_in_backward" in self.techniques and self.processes > 1 and "fsdp" not in self.techniques:
            raise ValueError("optimizer_in_backward updates before processes have exchanged gradients: add fsdp")
        return self

    @staticmethod
    def _takes(lever: techniques.Technique) -> bool:
        return lever.in_training

    @model_validator(mode="after")
    def _parts_are_equal(self):
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} does not divide batch_size={self.batch_size}")
        if self.batch_size % (self.accumulation * self.processes):
            raise ValueError(
                f"processes={self.processes} do not share batch_size={self.batch_size} "
                f"in {self.accumulation} parts evenly"
            )
        return self

    def levers(self) -> tuple[techniques.Technique, ...]:
        """The techniques as objects."""
        return techniques.parse(self.techniques)

    @property
    def accumulation(self) -> int:
        """In how many parts a batch is run."""
        flags = (lever.flags() for lever in self.levers())
        return next((f[k] for f in flags for k in f if k == "gradient_accumulation_steps"), 1)

    def emulated(self) -> bool:
        """Whether products are made in bfloat16, and this machine has no fast ones."""
        return any(lever.in_bf16 for lever in self.levers()) and not machine.bf16_is_fast()

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
        return mixer_of(self.attention)

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


def mixer_of(attention: dict[str, bool | str | int | float]) -> AttentionConfig:
    """The attention variant that ``attention`` names and sets, as its config."""
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
        return mixer_of(self.attention)

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
