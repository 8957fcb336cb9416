"""Training BERT-large on a V100, by technique (Hugging Face documentation, 2022): the speed beside `bert`'s memory."""

from __future__ import annotations

from functools import partial

import pandas as pd

from memstudy.studies import published
from memstudy.studies.published import bert, eras
from memstudy.studies.published.times import Row, compared

SEQUENCES = 4  # of one update
TECHNIQUES = bert.SAVINGS


def rows() -> list[Row]:
    """All nine trainings, from the Trainer's ``train_samples_per_second`` over 512 sequences: logging is in it."""
    read = pd.read_csv(published.HERE / "bert_large_memory.csv").query("metric == 'samples_per_second'")
    gpu, semantics = published.GPUS["bert"], eras.TRAINING_OF_2022
    return [
        Row("hf_v100", row.system, gpu, 1e3 * SEQUENCES / row.value, _build(row.system), "step", semantics)
        for row in read.itertuples()
    ]


def _build(system: str):
    return partial(bert.train, bert.TRAININGS[system], True)


def ratios(times: pd.DataFrame) -> pd.DataFrame:
    """Time with each technique over the time without it, of the predicted ``times`` of this table."""
    return compared("hf_v100", times, TECHNIQUES)
