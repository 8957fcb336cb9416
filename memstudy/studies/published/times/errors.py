"""How far the predicted times of a table are off: summaries of its rows, and of the ratios between them."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

import pandas as pd

from memstudy.studies.published.times import Row, predicted

LOWER_BOUNDS = ("mosaic",)  # tables whose predictions leave out a part of what was timed


def checked(module: ModuleType, chosen: Iterable[Row]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows ``chosen`` of the table ``module``, predicted, and the ratios between them.

    ``in_band``: whether the published time lies between ``low_ms`` and ``high_ms``. A table without ratios has an empty
    second frame.
    """
    rows = predicted(chosen)
    rows["in_band"] = rows.published_ms.between(rows.low_ms, rows.high_ms)
    if hasattr(module, "theirs"):
        rows = rows.join(module.theirs(), on="row")
    return rows, module.ratios(rows) if hasattr(module, "ratios") else pd.DataFrame()


def held_out(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that chose no constant and whose error was not known when one was chosen; a band moves no prediction."""
    return rows[rows.fitted.isin(["", "calibration_error"]) & (rows.seen == "")]


def summary(rows: pd.DataFrame, column: str = "error_percent") -> dict[str, object]:
    """Count, median and 90th percentile of the error's size [%], bias, the worst row, and rows within the band [%]."""
    rows = rows.dropna(subset=column)
    size = rows[column].abs()
    ours = column == "error_percent"
    return {
        "n": len(rows),
        "median": size.median(),
        "p90": size.quantile(0.9),
        "worst": size.max(),
        "bias": rows[column].median(),
        "in_band": 100 * rows.in_band.mean() if ours else float("nan"),
        "worst_row": ": ".join(rows.loc[size.idxmax(), ["table", "row"]]),
    }


def summary_of_ratios(ratios: pd.DataFrame) -> dict[str, float]:
    """Count, median and worst size of ratios' errors [%], and how often the longer of two is predicted longer [%]."""
    size = ratios.error_percent.abs()
    right = (ratios.published_ratio > 1) == (ratios.predicted_ratio > 1)
    return {"n": len(ratios), "median": size.median(), "worst": size.max(), "right": 100 * right.mean()}


def parts(rows: pd.DataFrame) -> pd.DataFrame:
    """The summaries of all ``rows``, of those held out, of each bound and GPU; and of others' predictions of them."""
    groups = {"all": rows, "held out": held_out(rows)}
    groups |= {f"bound by the {name}": group for name, group in rows.groupby("bound_by")}
    groups |= dict(iter(rows.groupby("gpu")))
    lines = {name: summary(group) for name, group in groups.items() if len(group)}
    lines["generation unseen"] = summary(rows, "unseen_error_percent")
    for column in rows.columns[rows.columns.str.startswith("their_")]:
        name = column.removeprefix("their_").removesuffix("_error_percent")
        lines[name] = summary(rows, column)
        lines[f"ours where {name} is"] = summary(rows.dropna(subset=column))
    return pd.DataFrame(lines).T


def by_source(rows: pd.DataFrame) -> pd.DataFrame:
    """A summary for each table of ``rows``, for all steps, and for others' predictions, of rows bound by the GPU.

    Others are compared on the rows that all of them predict. The host's times are known only roughly, so
    rows bound by the host are left out. Beside `summary`: ``n_chosen`` rows are not `held_out`, and ``unseen`` is the
    median with no constant of the GPU's generation.
    """
    busy = rows[rows.bound_by == "GPU"]
    steps = busy[(busy.kind == "step") & ~busy.table.isin(LOWER_BOUNDS)]
    groups = dict(iter(busy.groupby("table", sort=False))) | {
        "all steps": steps,
        "all steps, held out": held_out(steps),
    }
    if len(theirs := busy.columns[busy.columns.str.startswith("their_")]):
        groups["by us where others are"] = common = busy.dropna(subset=theirs)
    lines = {
        f"{name}, a lower bound" if name in LOWER_BOUNDS else name: summary(group)
        | {"n_chosen": len(group) - len(held_out(group)), "unseen": group.unseen_error_percent.abs().median()}
        for name, group in groups.items()
        if len(group)
    }
    for column in theirs:
        lines[f"by {column.removeprefix('their_').removesuffix('_error_percent')}"] = summary(common, column)
    for name, line in lines.items():
        line["worst_row"] = line["worst_row"].removeprefix(f"{name.partition(',')[0]}: ")
    return pd.DataFrame(lines).T.infer_objects()
