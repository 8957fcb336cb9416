"""GPU times that others measured, predicted row by row: single ops, layers, whole steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd
from tqdm import tqdm

from memstudy.profiler import predict
from memstudy.profiler.cuda import TODAY, Semantics
from memstudy.profiler.roles import Step


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
