"""GPU times that others measured, predicted row by row: single ops, layers, whole steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from memstudy.profiler import find_gpu
from memstudy.profiler.cuda import TODAY, Semantics
from memstudy.profiler.prediction import follow, time_of
from memstudy.profiler.roles import Step
from memstudy.profiler.time.cost import StepTime, constants

HERE = Path(__file__).parent
UNNAMED = (99, 0)  # a compute capability that no constant names; its tensor cores take every type


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
    """The rows with what is predicted for them, one line each.

    ``unseen_ms`` is the same with every constant of the GPU's generation left out: what holds for generations that the
    constants do not name stands in. ``fitted`` and ``seen`` name the constants whose choice the row was part of.
    """
    lines = []
    for row in tqdm(list(rows), leave=False):
        card = find_gpu(row.gpu)
        recorder, _ = follow(row.build, 2, card, 1, row.semantics)
        time = time_of(recorder, card)
        unseen = time_of(recorder, card.model_copy(update={"compute_capability": UNNAMED}))
        ms = _timed_as(row, time)
        lines.append(
            {
                "table": row.table,
                "row": row.row,
                "gpu": row.gpu,
                "kind": row.kind,
                "published_ms": row.published_ms,
                "predicted_ms": ms,
                "low_ms": time.low_ms * ms / time.step_time_ms,
                "high_ms": time.high_ms * ms / time.step_time_ms,
                "bound_by": time.bound_by,
                "unseen_ms": _timed_as(row, unseen),
                "fitted": _chosen_by(row, "fitted_on"),
                "seen": _chosen_by(row, "seen"),
            }
        )
    frame = pd.DataFrame(lines)
    return frame.assign(
        error_percent=100 * (frame.predicted_ms / frame.published_ms - 1),
        unseen_error_percent=100 * (frame.unseen_ms / frame.published_ms - 1),
    )


def _timed_as(row: Row, time: StepTime) -> float:
    """``time`` as the row was timed [ms]: an op's benchmark queues it again and again, at the clock of a cool GPU."""
    return time.kernels_ms if row.kind == "op" and time.bound_by == "GPU" else time.step_time_ms


def _chosen_by(row: Row, how: str) -> str:
    """The constants whose ``fitted_on`` or ``seen`` names the row: its table, or ``table: text`` in the row's name."""
    chosen = []
    for name, constant in constants().items():
        named = (entry.partition(": ") for entry in getattr(constant, how))
        if any(table == row.table and text in row.row for table, _, text in named):
            chosen.append(name)
    return ", ".join(chosen)


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
