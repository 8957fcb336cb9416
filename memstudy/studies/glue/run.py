"""A fine-tuning of a trained model, as a run."""

from __future__ import annotations

import math
from typing import Literal

import torch
import transformers
from pydantic import NonNegativeInt, PositiveInt, field_validator, model_validator

from memstudy.huggingface.pretrained import PRETRAINED, weights_folder
from memstudy.studies.glue import finetuning, tasks
from memstudy.trainers.hub_model import HubModelRun
from memstudy.trainers.language_model import data_as_planned


class FineTuneRun(HubModelRun):
    """Every choice of one fine-tuning: pretrained weights, converted, trained on a data set and evaluated.

    ``model`` is a name in ``pretrained.PRETRAINED``, or the path of a ``config.json`` with ``model.safetensors`` and
    the tokenizer's files beside it. For task ``classification``, ``dataset`` is a GLUE task such as ``glue/sst2`` or
    the path of a ``.csv`` (see `tasks`); for task ``lm``, running text for a masked language model. At most
    ``train_rows`` rows (blocks of text) are drawn, once for all epochs; 0 leaves the head untrained. At most
    ``eval_rows`` held-out rows are evaluated. The learning rate rises over a tenth of the updates, then falls linearly
    to 0.
    """

    kind: Literal["fine_tune"] = "fine_tune"
    task: Literal["lm", "classification"] = "classification"
    dataset: str
    data_hash: str
    train_rows: NonNegativeInt
    eval_rows: PositiveInt = 10_000
    epochs: PositiveInt = 1
    measure_steps: Literal[0] = 0
    processes: Literal[1] = 1

    @model_validator(mode="after")
    def _clips(self):
        if "optimizer_in_backward" in self.techniques:
            raise ValueError("optimizer_in_backward never has all gradients, which a fine-tuning clips: leave it out")
        return self

    @field_validator("model")
    @classmethod
    def _has_weights(cls, model: str) -> str:
        if model not in PRETRAINED and not model.endswith(".json"):
            raise ValueError(
                f"no trained weights are known for model {model!r}; known: {', '.join(PRETRAINED)}; for another give "
                "the path of its config.json, with model.safetensors beside it"
            )
        return model

    def load_model(self, n_labels: int) -> transformers.PreTrainedModel:
        """The model with pretrained weights, converted; a new head is drawn from torch's global generator.

        Parameters
        ----------
        n_labels : int
            Labels of a classifier; 1 for a regression. No effect on a language model.
        """
        options: dict = {"use_safetensors": True, "attn_implementation": self.attention}
        family = transformers.AutoModelForMaskedLM
        if self.task == "classification":
            family, options["num_labels"] = transformers.AutoModelForSequenceClassification, n_labels
        # Training is in fp32, whatever dtype the weights were saved in.
        return self.converted(family.from_pretrained(weights_folder(self.model), dtype=torch.float32, **options))

    def flags(self):
        return super().flags() | {
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "train_sampling_strategy": "group_by_length",
            "prediction_loss_only": False,
        }

    def load_data(self):
        loaded = data_as_planned("data set", self.dataset, self.data_hash)
        if self.task == "classification":
            tasks.task_of(loaded)
        return loaded

    def n_steps(self):
        return self.epochs * math.ceil(self.train_rows / self.batch_size)

    def carry_out(self, checkpoints):
        return finetuning.execute(self, self.load_data(), checkpoints)
