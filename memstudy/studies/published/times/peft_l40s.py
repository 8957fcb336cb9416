"""PEFT's comparison of methods on an L40S (July 2026): the time of a step beside `published.peft`'s memory."""

from __future__ import annotations

import json
from functools import partial

import pandas as pd

from memstudy.studies import published
from memstudy.studies.published import peft
from memstudy.studies.published.times import Row, compared

# A step has 839.6 unpadded tokens in four rows on average, and is padded to the longest of them, whose length is not
# recorded. At 218 tokens, the memory that the source's steps keep allocated on average is predicted within 0.2 %.
SEQ_LEN = 218
LORA = "lora/llama-3.2-3B-rank32"


def rows() -> list[Row]:
    """Each method's median step; the time of a step is from the padding of its batch to the reading of its loss."""
    read = pd.read_csv(published.HERE / "peft_method_comparison.csv").set_index("experiment")
    made = []
    for row in read.itertuples():
        build = partial(peft.fine_tune, row.Index, json.loads(row.optimizer_kwargs), (SEQ_LEN,))
        made.append(Row("peft_l40s", row.Index, published.GPUS["peft"], row.ms_per_step_median_window, build, "step"))
    return made


def ratios(times: pd.DataFrame) -> pd.DataFrame:
    """Time with each method over the time with LoRA of rank 32, of the predicted ``times`` of this table."""
    return compared("peft_l40s", times, {row: (LORA, row) for row in times.row if row != LORA})
