"""Runs of the encoder-decoder: a frozen description, and its model and inputs."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from memstudy.attention.settings import mixer_of
from memstudy.studies.memsizer import pairs, seq2seq
from memstudy.studies.memsizer.encoder_decoder import PLACES, Seq2SeqConfig, Seq2SeqLM
from memstudy.trainers.language_model import data_as_planned
from memstudy.trainers.step import StepRun

PAD, EOS = 0, 1  # the first two tokens of every vocabulary


class Seq2SeqRun(StepRun):
    """Every choice of one run of an encoder-decoder, exact or with MemSizer in some places.

    ``memsizer`` maps ``encoder``, ``decoder`` and ``cross`` to MemSizer's settings; other places are exact. Sources
    have at most ``seq_len`` tokens from ``vocab_size``, targets at most ``target_len`` from ``target_vocab_size``; with
    0 the target shares the source's vocabulary and embeddings. ``dropout`` follows each sublayer and the embeddings.

    ``train_steps`` updates are made on the first ``train_rows`` rows (0: all) of ``dataset``; targets are then written
    for ``eval_rows`` rows of each test split, with ``num_beams`` beams. ``measure_steps`` steps are timed on random
    tokens. The memory and time of decoding are those of ``generated`` tokens of the untrained model, past any end.
    """

    kind: Literal["seq2seq"] = "seq2seq"
    n_layers: PositiveInt
    hidden_size: PositiveInt
    n_heads: PositiveInt
    feed_forward: PositiveInt
    vocab_size: PositiveInt
    target_vocab_size: NonNegativeInt = 0
    target_len: Annotated[int, Field(ge=2)]
    memsizer: dict[str, dict[str, int | float]] = Field(default_factory=dict)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    dataset: str = ""
    data_hash: str = ""
    train_steps: NonNegativeInt = 0
    train_rows: NonNegativeInt = 0
    eval_rows: PositiveInt = 10_000
    num_beams: PositiveInt = 1
    validations: NonNegativeInt = 0
    generated: NonNegativeInt = 0
    processes: Literal[1] = 1

    @model_validator(mode="after")
    def _consistent(self):
        if self.hidden_size % self.n_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of n_heads={self.n_heads}")
        for place, settings in self.memsizer.items():
            if place not in PLACES:
                raise ValueError(f"memsizer: unknown place {place!r}; known: {', '.join(PLACES)}")
            mixer_of({"variant": "memsizer", **settings})
        if self.train_steps and not self.dataset:
            raise ValueError(f"train_steps={self.train_steps} needs a dataset")
        if not (self.train_steps or self.measure_steps or self.generated):
            raise ValueError("measure_steps, train_steps and generated are all 0: nothing to run")
        return self

    def make_model(self) -> Seq2SeqLM:
        """The model with random weights, from torch's global generator; the target starts with ``PAD``, as Marian's."""
        config = Seq2SeqConfig(
            vocab_size=self.vocab_size,
            decoder_vocab_size=self.target_vocab_size or self.vocab_size,
            share_encoder_decoder_embeddings=not self.target_vocab_size,
            encoder_layers=self.n_layers,
            decoder_layers=self.n_layers,
            d_model=self.hidden_size,
            encoder_attention_heads=self.n_heads,
            decoder_attention_heads=self.n_heads,
            encoder_ffn_dim=self.feed_forward,
            decoder_ffn_dim=self.feed_forward,
            max_position_embeddings=max(self.seq_len, self.target_len, self.generated + 1),
            activation_function="relu",
            scale_embedding=True,
            init_std=self.hidden_size**-0.5,
            dropout=self.dropout,
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=PAD,
            memsizer=self.memsizer,
        )
        return Seq2SeqLM(config)

    def make_batch(self) -> dict[str, torch.Tensor]:
        """A batch of random tokens, from torch's global generator; no padding."""
        source = torch.randint(2, self.vocab_size, (self.batch_size, self.seq_len))
        target = torch.randint(2, self.target_vocab_size or self.vocab_size, (self.batch_size, self.target_len))
        return {"input_ids": source, "labels": target}

    def flags(self):
        return {"lr_scheduler_type": "linear", "warmup_steps": 0.1, "weight_decay": 0.01}

    def load_data(self):
        if not self.train_steps:
            return None
        loaded = data_as_planned("data set", self.dataset, self.data_hash)
        pairs.task_of(loaded)
        return loaded

    def n_steps(self):
        return super().n_steps() + self.train_steps

    def carry_out(self, checkpoints):
        result = super().carry_out(checkpoints)
        if self.generated:
            result["metrics"] |= seq2seq.generate(self)
        if self.train_steps:
            trained = seq2seq.execute(self, self.load_data(), checkpoints)
            result = {name: result[name] | trained[name] for name in result}
        return result
