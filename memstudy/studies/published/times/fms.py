"""Fine-tuning in bf16 on an A100-80GB (fms-acceleration, February 2025): the speed beside `modern`'s memory."""

from __future__ import annotations

from functools import partial

import pandas as pd

from memstudy.studies import published
from memstudy.studies.published import modern
from memstudy.studies.published.times import Row, compared


def rows() -> list[Row]:
    """The runs on one GPU; the Trainer's time of 100 steps, in which the first one's are."""
    read = modern.published().query("source.str.contains('fms-acceleration') and method in ('full', 'LoRA')")
    read = read.query("parallel == '1 GPU'").drop_duplicates(["model", "method", "batch"])
    return [
        Row(
            "fms",
            f"{row.model.rpartition('/')[2]}, {row.method}, {row.batch} × {row.seq}",
            published.GPUS["fms"],
            1e3 * row.batch * int(row.seq) / row.tokens_per_s,
            partial(modern.fine_tune, row.model, row.method == "LoRA", row.batch, int(row.seq), 1),
            "step",
        )
        for row in read.itertuples()
    ]


def ratios(times: pd.DataFrame) -> pd.DataFrame:
    """Time with LoRA over the time of full fine-tuning, of the predicted ``times`` of this table."""
    pairs = {row.replace("full", "LoRA"): (row, row.replace("full", "LoRA")) for row in times.row if "full" in row}
    return compared("fms", times, pairs)
