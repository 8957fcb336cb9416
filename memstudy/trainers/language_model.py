"""Runs of the studies' decoder language model, which measure a step and train on running text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from transformers import PreTrainedTokenizerFast, set_seed

from memstudy import data, techniques
from memstudy.attention import AttentionConfig
from memstudy.attention.settings import check_window, mixer_of
from memstudy.huggingface.decoder import DecoderLM, decoder
from memstudy.trainers.step import StepRun
from memstudy.trainers.trainer import make_trainer


class LanguageModelRun(StepRun):
    """Every choice of one run of the studies' decoder language model.

    ``train_steps`` updates are made on ``dataset``; ``train_steps`` or ``measure_steps`` may be 0. ``schedule`` is the
    course of the learning rate: constant, or up in the first tenth of the updates and down to 0 along a cosine. The
    loss on validation rows is computed ``validations`` times in training.
    """

    kind: Literal["language_model"] = "language_model"
    n_layers: PositiveInt
    hidden_size: PositiveInt
    n_heads: PositiveInt
    feed_forward: PositiveInt
    vocab_size: PositiveInt
    attention: dict[str, bool | str | int | float] = Field(
        default_factory=lambda: {"variant": "softmax", "implementation": "eager"}
    )
    train_steps: NonNegativeInt = 0
    schedule: Literal["constant", "cosine"] = "constant"
    validations: NonNegativeInt = 0
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
        check_window(self.mixer(), self.seq_len)
        return self

    def mixer(self) -> AttentionConfig:
        """Config of the attention variant."""
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

    def flags(self):
        return {} if self.schedule == "constant" else {"lr_scheduler_type": self.schedule, "warmup_steps": 0.1}

    def make_batch(self) -> dict[str, torch.Tensor]:
        """A batch of random tokens, from torch's global generator."""
        tokens = torch.randint(self.vocab_size, (self.batch_size, self.seq_len))
        return {"input_ids": tokens, "labels": tokens}

    def load_data(self):
        return data_as_planned("data set", self.dataset, self.data_hash) if self.train_steps else None

    def tokenizer(self, loaded: data.LoadedData) -> PreTrainedTokenizerFast:
        """A tokenizer trained on the training split of ``loaded``."""
        return data.train_tokenizer(loaded.splits["train"]["text"], self.vocab_size)

    def n_steps(self):
        return super().n_steps() + self.train_steps

    def carry_out(self, checkpoints):
        result = super().carry_out(checkpoints)
        if self.train_steps:
            self._train(checkpoints, result)
        return result

    def _train(self, checkpoints: Path, result: dict) -> None:
        techniques.check_available(self.parsed_techniques())
        loaded = self.load_data()
        blocks = data.blocks(loaded, self.tokenizer(loaded), self.seq_len)
        held_back = {name: rows.select(range(min(self.eval_blocks, len(rows)))) for name, rows in blocks.items()}
        set_seed(self.seed)
        watched = {"validation": held_back["validation"], "validations": self.validations} if self.validations else {}
        trainer = make_trainer(
            self, self.make_model(), checkpoints, train_steps=self.train_steps, train=blocks["train"], **watched
        )
        seconds = trainer.go_on()
        result["metrics"] |= {
            "train_time_s": seconds,
            "epochs": trainer.state.epoch,
            "epoch_steps": math.ceil(len(blocks["train"]) / self.batch_size),
            "train_loss": [row["loss"] for row in trainer.state.log_history if "loss" in row][-1],
        }
        for split in ("validation", "test"):
            rows = held_back[split]
            loss = trainer.evaluate(rows, metric_key_prefix=split)[f"{split}_loss"]
            result["metrics"] |= {
                f"{split}_loss": loss,
                f"{split}_perplexity": math.exp(loss),
                f"{split}_tokens": len(rows) * (self.seq_len - 1),
            }
        result["curves"]["train_loss"] = trainer.curve("loss")
        if watched:
            result["curves"]["validation_loss"] = trainer.curve("eval_loss")
        result["data"] = loaded.provenance()


def data_as_planned(what: str, name: str, planned_hash: str) -> data.LoadedData:
    """Load the data set ``name``; ValueError if its content hash is not ``planned_hash``."""
    loaded = data.load(name)
    if loaded.content_hash != planned_hash:
        raise ValueError(
            f"{what} {name!r} has content hash {loaded.content_hash}, the run was planned with "
            f"{planned_hash or 'none'}: plan it again"
        )
    return loaded
