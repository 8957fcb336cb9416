"""Figures that others published (``*.csv``), and predictions of their readings of GPU memory (`rows`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
# The GPU of each table's readings. Those of "inference" and "notebook" are not published: no rule of its time needs
# the first, and the attention of the second was an Ampere GPU's.
GPUS = {
    "ops": "A100-80GB", "inference": "V100-16GB", "bert": "V100-16GB", "fms": "A100-80GB", "notebook": "A10",
    "peft": "L40S", "generation": "A100-80GB", "litgpt": "A100-40GB",
    "torchtune": "A100-80GB",
}  # fmt: skip
Figures = Iterable[tuple[str, float, Callable[[], float]]]  # row, published [MiB], function that predicts it [MiB]


def frame_of(name: str, rows: Iterable[tuple[str, float, float]]) -> pd.DataFrame:
    """A frame of ``(row, published, predicted)`` [MiB], and the errors."""
    frame = pd.DataFrame(rows, columns=["row", "published_mib", "predicted_mib"])
    frame.insert(0, "table", name)
    difference = frame.predicted_mib - frame.published_mib
    return frame.assign(error_percent=100 * difference / frame.published_mib.abs())
