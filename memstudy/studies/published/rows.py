"""The published tables of GPU memory, predicted row by row, as runs. What nvidia-smi calls MB is MiB."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

import pandas as pd
from pydantic import model_validator
from tqdm import tqdm

from memstudy.studies.published import GPUS, bert, frame_of, generation, inference, ops, peft
from memstudy.studies.published.modern import fms, litgpt, notebook, torchtune
from memstudy.trainers.base import ForetellingRun

_TABLES = {
    "ops": ops, "inference": inference, "bert": bert, "fms": fms, "notebook": notebook, "peft": peft,
    "generation": generation, "litgpt": litgpt, "torchtune": torchtune,
}  # fmt: skip


def published(table: str) -> pd.Series:
    """The published figures of ``table`` [MiB], by row, in their order.

    Raises
    ------
    ValueError
        For an unknown table.
    """
    if table not in GPUS:
        raise ValueError(f"unknown table {table!r}; known: {', '.join(GPUS)}")
    return pd.Series({name: value for name, value, _ in _TABLES[table].figures()})


def predicted_mib(table: str, row: str) -> float:
    """The prediction for one ``row`` of ``table`` [MiB], by the rules of its time (`eras`).

    Raises
    ------
    ValueError
        For an unknown table or row.
    """
    known = published(table)
    if row not in known:
        raise ValueError(f"unknown row {row!r} of table {table!r}; known: {'; '.join(known.index)}")
    return next(predict_row for name, _, predict_row in _TABLES[table].figures() if name == row)()


class PublishedRowRun(ForetellingRun):
    """The prediction of one published reading of a GPU's memory: the row ``of`` of ``table`` (`published.rows`)."""

    kind: Literal["published_row"] = "published_row"
    table: Literal["ops", "inference", "bert", "fms", "notebook", "peft", "generation", "litgpt", "torchtune"]
    of: str
    gpu: str

    @model_validator(mode="after")
    def _on_its_gpu(self):
        if self.gpu != GPUS[self.table]:
            raise ValueError(f"gpu={self.gpu!r}: table {self.table!r} needs {GPUS[self.table]}")
        return self

    def execute(self, checkpoints):
        return {"metrics": {"predicted_mib": predicted_mib(self.table, self.of)}, "curves": {}, "data": {}}


def runs(table: str, text: str = "") -> list[PublishedRowRun]:
    """The predictions of ``table`` as runs, one for each row that has ``text`` in its name."""
    names = [row for row in published(table).index if text in row]
    return [PublishedRowRun(experiment=table, table=table, of=row, gpu=GPUS[table]) for row in names]


def compared(predicted: pd.DataFrame) -> pd.DataFrame:
    """The published figures beside the ``predicted`` ones [MiB], the rows of a sweep over `runs`.

    Columns: ``table``, ``row``, ``published_mib``, ``predicted_mib``, ``error_percent``.
    """
    frames = []
    for table, rows in predicted.groupby("table", sort=False):
        said = published(table)[rows["of"]]
        frames.append(frame_of(table, zip(said.index, said, rows["predicted_mib"], strict=True)))
    return pd.concat(frames, ignore_index=True)


def chosen_on(table: str, row: str) -> str:
    """The rule or constant that the ``row`` of a ``table`` of fine-tuning chose for its prediction, or nothing."""
    chosen = getattr(_TABLES[table], "CHOSEN_ON", {})
    return next((rule for rule, rows in chosen.items() if re.fullmatch(rows, row)), "")


def predicted_rows(table: str, only: Collection[str] | None = None, **options) -> pd.DataFrame:
    """Published and predicted figures of ``table`` side by side; ``only`` selects rows."""
    figures = [figure for figure in _TABLES[table].figures(**options) if only is None or figure[0] in only]
    return frame_of(
        table, ((row, value, predict_row()) for row, value, predict_row in tqdm(figures, table, leave=False))
    )
