"""The published tables of GPU times, predicted, as runs: one for each table and GPU."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import model_validator

from memstudy.studies.published.times.errors import checked, summary, summary_of_ratios
from memstudy.studies.published.times.tables import TABLES
from memstudy.trainers.base import ForetellingRun

_NAMES = {
    "n": "n", "median": "median_error_percent", "p90": "p90_error_percent", "worst": "worst_error_percent",
    "bias": "bias_percent", "in_band": "in_band_percent",
}  # fmt: skip


def gpus(table: str) -> list[str]:
    """The GPUs of ``table``, in its order."""
    return [*dict.fromkeys(row.gpu for row in TABLES[table].rows())]


class PublishedTimesRun(ForetellingRun):
    """The predictions of all times that the table ``of`` has on ``gpu``, and their errors.

    The metrics are of the rows that are bound by the GPU: the host's times are known only roughly. ``unseen_``: with no
    constant of the GPU's generation. The curves have each row and each ratio.
    """

    kind: Literal["published_times"] = "published_times"
    of: str
    gpu: str

    @model_validator(mode="after")
    def _in_the_tables(self):
        if self.of not in TABLES:
            raise ValueError(f"unknown table {self.of!r}; known: {', '.join(TABLES)}")
        if self.gpu not in (known := gpus(self.of)):
            raise ValueError(f"gpu={self.gpu!r}: table {self.of!r} needs one of {', '.join(known)}")
        return self

    def execute(self, checkpoints):
        table = TABLES[self.of]
        rows, ratios = checked(table, [row for row in table.rows() if row.gpu == self.gpu])
        metrics = {"n_rows": len(rows)}
        if len(busy := rows[rows.bound_by == "GPU"]):
            ours, unseen = summary(busy), summary(busy, "unseen_error_percent")
            metrics |= {column: ours[name] for name, column in _NAMES.items()}
            metrics |= {f"unseen_{_NAMES[name]}": unseen[name] for name in ("median", "p90", "worst", "bias")}
        if len(ratios):
            found = summary_of_ratios(ratios)
            metrics |= {f"ratios_{_NAMES[name]}": found[name] for name in ("n", "median", "worst")}
            metrics["ratios_right_percent"] = found["right"]
        metrics = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        curves = {
            name: json.loads(frame.to_json(orient="records")) for name, frame in (("rows", rows), ("ratios", ratios))
        }
        return {"metrics": metrics, "curves": curves, "data": {}}


def runs(table: str) -> list[PublishedTimesRun]:
    """The predictions of ``table`` as runs, one for each GPU."""
    return [PublishedTimesRun(experiment=table, of=table, gpu=gpu) for gpu in gpus(table)]
