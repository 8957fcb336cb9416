"""GPU times that others measured, predicted row by row: single ops, layers, whole steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from memstudy.profiler import predict
from memstudy.profiler.cuda import TODAY, Semantics
from memstudy.profiler.roles import Step

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One published time.

    Attributes
    ----------
    table, row : str
        The source's short name, and what was timed.
    gpu : str
        Name in the catalogue.
    published_ms : float
        Measured time of one step [ms].
    build : callable
        Argument of `profiler.predict`: sets up the step that was timed.
    kind : str
        ``op``, ``layer`` or ``step``.
    semantics : Semantics
        CUDA's semantics of the row's time.
    """

    table: str
    row: str
    gpu: str
    published_ms: float
    build: Callable[[], Step]
    kind: str
    semantics: Semantics = TODAY


def in_tf32(step: Step) -> Step:
    """``step`` with products of fp32 tensors in TF32 where the GPU has it, as in NVIDIA's containers."""

    def with_tf32():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            step()
        finally:
            torch.set_float32_matmul_precision(before)

    return with_tf32


def predicted(rows: Iterable[Row]) -> pd.DataFrame:
    """The rows with what is predicted for them, one line each."""
    lines = []
    for row in tqdm(list(rows), leave=False):
        time = predict(row.build, gpu=row.gpu, semantics=row.semantics).time
        lines.append(
            {
                "table": row.table,
                "row": row.row,
                "gpu": row.gpu,
                "kind": row.kind,
                "published_ms": row.published_ms,
                "predicted_ms": time.step_time_ms,
                "low_ms": time.low_ms,
                "high_ms": time.high_ms,
                "bound_by": time.bound_by,
            }
        )
    frame = pd.DataFrame(lines)
    return frame.assign(error_percent=100 * (frame.predicted_ms / frame.published_ms - 1))


def compared(table: str, times: pd.DataFrame, pairs: dict[str, tuple[str, str]]) -> pd.DataFrame:
    """The ratios of time that ``pairs`` of rows make, second over first, published and predicted.

    ``times`` are rows of ``table`` as `predicted` has them; a pair that is not in them is left out.
    """
    of = times.set_index("row")[["published_ms", "predicted_ms"]]
    found = {
        name: of.loc[after] / of.loc[before]
        for name, (before, after) in pairs.items()
        if {before, after} <= {*of.index}
    }
    frame = pd.DataFrame(found).T.rename_axis("row").reset_index()
    frame.columns = ["row", "published_ratio", "predicted_ratio"]
    frame.insert(0, "table", table)
    return frame.assign(error_percent=100 * (frame.predicted_ratio / frame.published_ratio - 1))
