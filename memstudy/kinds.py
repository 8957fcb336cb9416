"""The kinds of run by name, including predictions of other runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from memstudy.profiler import find_gpu, fit
from memstudy.profiler.search import STEP_TOKENS
from memstudy.studies.attention_layer.run import LayerRun
from memstudy.studies.fine_tuning.epoch import EpochRun
from memstudy.studies.glue.run import FineTuneRun
from memstudy.studies.memsizer.run import Seq2SeqRun
from memstudy.studies.published.rows import PublishedRowRun
from memstudy.studies.published.timings import PublishedTimesRun
from memstudy.studies.reformer.run import ReformerRun
from memstudy.studies.validation.run import ValidationRun
from memstudy.techniques import parse
from memstudy.trainers.base import ForetellingRun, Run
from memstudy.trainers.generation import GenerationRun
from memstudy.trainers.hub_model import HubModelRun
from memstudy.trainers.inference import InferenceRun
from memstudy.trainers.language_model import LanguageModelRun

Predictable = LanguageModelRun | ReformerRun | HubModelRun | InferenceRun | GenerationRun | Seq2SeqRun | LayerRun


class PredictionRun(ForetellingRun):
    """Every choice of one prediction: the step of the run ``of`` on ``gpu``, or on this CPU if ``gpu`` is empty.

    The choices do not depend on the machine that predicts. As a run, a prediction leaves a record and is made once.
    """

    kind: Literal["prediction"] = "prediction"
    of: Annotated[Predictable, Field(discriminator="kind")]
    gpu: str = ""

    @field_validator("of")
    @classmethod
    def _of_pytorch(cls, of: Predictable) -> Predictable:
        for text, technique in zip(of.techniques, parse(of.techniques), strict=True):
            if not technique.predicted:
                raise ValueError(f"the memory of {text} is not predicted: leave it out, to predict plain PyTorch")
        return of

    @field_validator("gpu")
    @classmethod
    def _in_the_catalogue(cls, gpu: str) -> str:
        if gpu:
            find_gpu(gpu)
        return gpu

    def execute(self, checkpoints):
        report = self.of.foretell(self.gpu)
        metrics = report.scalars()
        if self.gpu:
            metrics |= {"whole_gpu_mib": report.whole_gpu_mib, "fits": report.out_of_memory is None}
        return {"metrics": metrics, "curves": {"unverified_ops": list(report.unverified)}, "data": {}}


class LargestBatchRun(PredictionRun):
    """The search for the largest batch of the run ``of`` on ``gpu``; the run's own batch size does not matter."""

    kind: Literal["largest_batch"] = "largest_batch"  # type: ignore[assignment]
    gpu: str = Field(min_length=1)

    def sized(self, size: int) -> Predictable:
        """The run with the batch, or the length, of that ``size`` of the search."""
        return self.of.model_copy(update={"batch_size": size})

    def found(self, size: int) -> dict[str, int]:
        """The metric of the largest ``size`` that fits."""
        return {"largest_batch": size}

    def execute(self, checkpoints):
        found = fit(
            lambda size: self.sized(size).build(gpu=self.gpu),
            gpu=self.gpu,
            processes=self.of.processes,
            foretell=lambda size, card: self.sized(size).foretell(card),
        )
        metrics = self.found(found.batch_size) | {"headroom_percent": found.headroom_percent} | found.report.scalars()
        curves = {"unverified_ops": list(found.report.unverified)}
        return {"metrics": metrics | {"whole_gpu_mib": found.needed_mib}, "curves": curves, "data": {}}


class LongestSequenceRun(LargestBatchRun):
    """The search for the longest sequences of the run ``of``, which has one process, on ``gpu``, in steps of 8 tokens.

    The batch is the run's own; its length does not matter.
    """

    kind: Literal["longest_sequence"] = "longest_sequence"  # type: ignore[assignment]

    @field_validator("of")
    @classmethod
    def _in_one_process(cls, of: Predictable) -> Predictable:
        if of.processes > 1:
            raise ValueError(f"processes={of.processes}: the longest sequence is searched in one process")
        return of

    def sized(self, size):
        return self.of.model_copy(update={"seq_len": size * STEP_TOKENS})

    def found(self, size):
        return {"longest_seq_len": size * STEP_TOKENS}


KINDS: dict[str, type[Run]] = {
    "language_model": LanguageModelRun,
    "hub_model": HubModelRun,
    "inference": InferenceRun,
    "generation": GenerationRun,
    "fine_tune": FineTuneRun,
    "layer": LayerRun,
    "reformer": ReformerRun,
    "seq2seq": Seq2SeqRun,
    "prediction": PredictionRun,
    "epoch": EpochRun,
    "largest_batch": LargestBatchRun,
    "longest_sequence": LongestSequenceRun,
    "published_row": PublishedRowRun,
    "published_times": PublishedTimesRun,
    "validation": ValidationRun,
}


def parse_run(given: object) -> Run:
    """The run that the JSON value ``given`` describes, of the class that its ``kind`` names.

    Raises
    ------
    ValueError
        For an unknown kind or field, a value out of range, or choices that contradict each other.
    """
    kind = given.get("kind") if isinstance(given, dict) else given
    if not isinstance(given, dict) or not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown kind of run {kind!r}; known: {', '.join(KINDS)}")
    known = KINDS[given["kind"]].model_fields
    for name in given:
        if name not in known:
            raise ValueError(f"unknown field {name!r} of a {given['kind']} run; known: {', '.join(known)}")
    return KINDS[given["kind"]].model_validate(given)
