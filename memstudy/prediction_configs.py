"""Predictions as runs: frozen descriptions of what is predicted, and of the machine that it is predicted for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from memstudy.configs import LanguageModelRun
from memstudy.hub_configs import HubModelRun, InferenceRun
from memstudy.profiler import find_gpu
from memstudy.published import GPUS
from memstudy.reformer_configs import ReformerRun
from memstudy.seq2seq_configs import Seq2SeqRun

Predictable = LanguageModelRun | ReformerRun | HubModelRun | InferenceRun | Seq2SeqRun


class PredictionRun(BaseModel):
    """Every choice of one prediction: the step of the run ``of``, on ``gpu`` or, where that is empty, on this CPU.

    Nothing of it depends on the machine that predicts. As a run it leaves a record, so that it is made once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["prediction"] = "prediction"
    experiment: str
    of: Annotated[Predictable, Field(discriminator="kind")]
    gpu: str = ""

    @field_validator("of")
    @classmethod
    def _of_pytorch(cls, of: Predictable) -> Predictable:
        for text, lever in zip(of.techniques, of.levers(), strict=True):
            if lever.group == "engine":
                raise ValueError(f"what {text} takes is its own to say and not predicted: leave it out, for PyTorch's")
        return of

    @field_validator("gpu")
    @classmethod
    def _in_the_catalogue(cls, gpu: str) -> str:
        if gpu:
            find_gpu(gpu)
        return gpu


class LargestBatchRun(PredictionRun):
    """The search for the largest batch of the step of the run ``of``, whose own batch does not matter, on ``gpu``."""

    kind: Literal["largest_batch"] = "largest_batch"  # type: ignore[assignment]
    gpu: str = Field(min_length=1)


class PublishedRowRun(BaseModel):
    """The prediction of one published reading of a GPU's memory: the row ``of`` of ``table`` (`published.rows`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["published_row"] = "published_row"
    experiment: str
    table: Literal["ops", "inference", "bert"]
    of: str
    gpu: str

    @model_validator(mode="after")
    def _on_its_gpu(self):
        if self.gpu != GPUS[self.table]:
            raise ValueError(f"gpu={self.gpu!r}: table {self.table!r} is of {GPUS[self.table]}")
        return self
