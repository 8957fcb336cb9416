"""Runs that predict every step of an epoch, whose batches have the lengths of a real data set's texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from memstudy.data.lengths import Sampler, batches, padded_share
from memstudy.profiler import MIB, StepShape, find_gpu
from memstudy.trainers.base import ForetellingRun
from memstudy.trainers.hub_model import HubModelRun

# dataset, tokens, texts: how many training texts have so many tokens (benchmarks/lengths.py)
HISTOGRAMS = Path(__file__).with_name("lengths.csv")
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def text_lengths(dataset: str) -> list[int]:
    """The token counts of the texts of ``dataset``, in an order drawn with seed 0: a histogram has none of its own.

    Raises
    ------
    ValueError
        For a data set without a histogram.
    """
    table = pd.read_csv(HISTOGRAMS)
    if dataset not in set(table["dataset"]):
        known = ", ".join(table["dataset"].unique())
        raise ValueError(f"dataset {dataset!r}: no histogram of its lengths; known: {known}")
    rows = table[table["dataset"] == dataset]
    lengths = np.repeat(rows["tokens"].to_numpy(), rows["texts"].to_numpy())
    return np.random.default_rng(0).permutation(lengths).tolist()


class EpochRun(ForetellingRun):
    """Every choice of a prediction of the first ``steps`` of an epoch of the run ``of`` on ``gpu``.

    Texts longer than the ``seq_len`` of ``of`` are cut to it; packs have that length. ``flattened`` batches have no
    padding: their texts share a row.
    """

    kind: Literal["epoch"] = "epoch"
    of: HubModelRun
    gpu: Annotated[str, Field(min_length=1)]
    dataset: str
    sampler: Sampler = "shuffled"
    flattened: bool = False
    steps: PositiveInt = 500
    empty_cache_every: PositiveInt | None = None
    seed: NonNegativeInt = 0

    @field_validator("gpu")
    @classmethod
    def _in_the_catalogue(cls, gpu: str) -> str:
        find_gpu(gpu)
        return gpu

    @model_validator(mode="after")
    def _lengths_are_known(self):
        text_lengths(self.dataset)
        if self.sampler == "packed" and not self.flattened:
            raise ValueError("sampler packed: the texts of a pack share a row: flattened=True is needed")
        return self

    def batches(self) -> list[tuple[int, ...]]:
        """The lengths of the texts of each batch, or of each part of one that is accumulated."""
        cut = [min(length, self.of.seq_len) for length in text_lengths(self.dataset)]
        parts = self.of.accumulation
        made = batches(cut, self.of.batch_size, self.sampler, longest=self.of.seq_len, seed=self.seed, parts=parts)
        return made[: self.steps]

    def execute(self, checkpoints):
        made = self.batches()
        shapes = [StepShape.of(batch, flattened=self.flattened) for batch in made]
        report = self.of.foretell_lengths(shapes, self.gpu, empty_cache_every=self.empty_cache_every)
        tokens = sum(map(sum, made))
        metrics = {
            "n_steps": len(shapes),
            "n_texts": sum(map(len, made)),
            "n_tokens": tokens,
            "padded_percent": 0.0 if self.flattened else 100 * padded_share(made),
            "whole_gpu_mib": report.whole_gpu_mib,
            "fits": not report.refused,
            "n_refused": len(report.refused),
            "n_traced": report.traced,
            "worst_step": report.worst,
            "line_deviation_percent": 100 * report.worst_deviation,
        }
        for name, at in QUANTILES.items():
            metrics[f"step_peak_{name}_mib"] = float(np.quantile(report.step_peaks, at)) / MIB
        metrics["reserved_max_mib"] = max(report.reserved_peaks) / MIB
        if report.out_of_memory:
            metrics["first_refused_step"] = report.out_of_memory.iteration
        context = report.context_bytes
        curves = {
            "step_mib": [
                [round((peak + context) / MIB, 1), round((held + context) / MIB, 1)]
                for peak, held in zip(report.step_peaks, report.reserved_peaks, strict=True)
            ],
            "unverified_ops": list(report.unverified),
        }
        return {"metrics": metrics, "curves": curves, "data": {}}
