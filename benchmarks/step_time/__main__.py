"""Predict published times of ops, layers and whole training steps on GPUs, and print the error of each.

python benchmarks/step_time [TABLE]... [--rows TEXT] [--json FILE]

All tables take some ten minutes and no GPU. ``in_band``: whether the published time lies between ``low_ms`` and
``high_ms``. ``unseen``: predicted without the constants that were fitted on the GPU's generation. ``fitted`` names the
constants that the row helped to choose, ``seen`` those that were chosen after its error was known; where both are
empty, or only the band's width was chosen, the row is held out. Which rows chose a constant:
``memstudy/profiler/time/constants.yaml``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import pandas as pd

from memstudy.studies.published import times
from memstudy.studies.published.times.tables import TABLES

LOWER_BOUNDS = ("mosaic",)


def summary(rows: pd.DataFrame, column: str = "error_percent") -> dict[str, object]:
    """Count, median and 90th percentile of |error| [%], bias, the worst row, and how many rows lie in the band [%]."""
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


def parts(rows: pd.DataFrame) -> pd.DataFrame:
    """The summaries of all ``rows``, of those held out, of each bound and GPU; and of others' predictions of them."""
    held_out = rows[rows.fitted.isin(["", "calibration_error"]) & (rows.seen == "")]  # a band moves no prediction
    groups = {"all": rows, "held out": held_out}
    groups |= {f"bound by the {name}": group for name, group in rows.groupby("bound_by")}
    groups |= dict(iter(rows.groupby("gpu")))
    lines = {name: summary(group) for name, group in groups.items() if len(group)}
    lines["generation unseen"] = summary(rows, "unseen_error_percent")
    for column in rows.columns[rows.columns.str.startswith("their_")]:
        name = column.removeprefix("their_").removesuffix("_error_percent")
        lines[name] = summary(rows, column)
        lines[f"ours where {name} is"] = summary(rows.dropna(subset=column))
    return pd.DataFrame(lines).T


def show(name: str, frame: pd.DataFrame, index: bool = False) -> None:
    print(f"\n{name}\n{frame.to_string(index=index, float_format='{:,.2f}'.format)}")


def predict(name: str, module: ModuleType, text: str) -> list[pd.DataFrame]:
    """Predict and print the rows of ``module`` that have ``text`` in their names, and the ratios between them."""
    chosen = [row for row in module.rows() if text in row.row]
    if not chosen:
        return []
    rows = times.predicted(chosen)
    rows["in_band"] = rows.published_ms.between(rows.low_ms, rows.high_ms)
    if hasattr(module, "theirs"):
        rows = rows.join(module.theirs(), on="row")
    show(name, rows.drop(columns=["table", "unseen_ms"]))
    show(f"{name}: |error| [%]{' of a lower bound' if name in LOWER_BOUNDS else ''}", parts(rows), index=True)
    if not hasattr(module, "ratios"):
        return [rows]
    ratios = module.ratios(rows)
    if len(ratios):
        size = ratios.error_percent.abs()
        right = (ratios.published_ratio > 1) == (ratios.predicted_ratio > 1)
        show(f"{name}: ratios", ratios.drop(columns="table"))
        print(f"median {size.median():.1f} %, worst {size.max():.1f} %; faster or slower: {right.mean():.0%} right")
    return [rows, ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, "all"], default="all", help="default: all")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose names have TEXT in them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    chosen = parser.parse_args()
    frames = []
    for name in TABLES if "all" in chosen.tables else chosen.tables:
        frames += predict(name, TABLES[name], chosen.rows)
    rows = pd.concat([frame for frame in frames if "kind" in frame and frame.table[0] not in LOWER_BOUNDS])
    for kind, group in rows.reset_index(drop=True).groupby("kind"):
        show(f"{kind}s of all tables but lower bounds: |error| [%]", parts(group), index=True)
    if chosen.json:
        lines = [line for frame in frames for line in json.loads(frame.to_json(orient="records"))]
        chosen.json.write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
