"""Fine-tuning in bf16 on an A100-80GB (fms-acceleration, February 2025): the speed beside `modern`'s memory."""

from __future__ import annotations

import re
from functools import partial

import pandas as pd

from memstudy.studies import published
from memstudy.studies.published.modern import fms, table
from memstudy.studies.published.times import Row, compared


def rows() -> list[Row]:
    """The runs on one GPU; the Trainer's time of 100 steps, in which the first one's are."""
    read = table.published().query("source.str.contains('fms-acceleration') and parallel == '1 GPU'")
    made = []
    for row in read.drop_duplicates(["model", "method", "note", "batch"]).itertuples():
        method = fms.METHODS.get(row.note.rpartition("=")[2], row.method)
        name = f"{row.model.rpartition('/')[2]}, {method}, {row.batch} × {row.seq}"
        published_ms = 1e3 * row.batch * int(row.seq) / row.tokens_per_s
        build = partial(fms.fine_tune, row.model, method, row.batch, int(row.seq), 1)
        made.append(Row("fms", name, published.GPUS["fms"], published_ms, build, "step"))
    return made


def ratios(times: pd.DataFrame) -> pd.DataFrame:
    """Time with adapters over the time of full fine-tuning, of the predicted ``times`` of this table."""
    of = {row: (re.sub(", [^,]*LoRA[^,]*, ", ", full, ", row), row) for row in times.row if "LoRA" in row}
    return compared("fms", times, of)
