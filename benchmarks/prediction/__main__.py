"""Predict three published tables of GPU memory, and print the error of each number.

python benchmarks/prediction [ops|bert|inference]... [--json FILE]

All three take two minutes and no GPU. How each constant was chosen: ``memstudy/studies/published/eras.py``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from memstudy.studies.published.bert import savings
from memstudy.studies.published.inference import length_differences
from memstudy.studies.published.rows import predicted_rows


def ops() -> list[pd.DataFrame]:
    return [predicted_rows("ops")]


def bert() -> list[pd.DataFrame]:
    """Predicted with the PyTorch rules of the table's time, and beside them with today's rules."""
    rows, today = predicted_rows("bert"), predicted_rows("bert", era=False)
    both = [rows, savings(rows)], [today, savings(today)]
    columns = {"predicted_mib": "today_mib", "error_percent": "today_error_percent"}
    return [old.join(new.rename(columns=columns)[[*columns.values()]]) for old, new in zip(*both, strict=True)]


def inference() -> list[pd.DataFrame]:
    rows = predicted_rows("inference")
    return [rows, length_differences(rows)]


TABLES = {"ops": ops, "bert": bert, "inference": inference}


def show(frame: pd.DataFrame) -> None:
    frame = frame.copy()
    frame.insert(4, "difference_mib", frame.predicted_mib - frame.published_mib)
    print(f"\n{frame.table[0]}\n{frame.drop(columns='table').to_string(index=False, float_format='{:,.3f}'.format)}")
    for column in frame.columns[frame.columns.str.endswith("error_percent")]:
        error = frame[column].abs()
        print(f"{column}: median {error.median():.4f} %, worst {error.max():.4f} % ({frame.row[error.idxmax()]})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, "all"], default="all", help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    chosen = parser.parse_args()
    frames = []
    for name in TABLES if "all" in chosen.tables else chosen.tables:
        frames += (made := TABLES[name]())
        for frame in made:
            show(frame)
    if chosen.json:
        rows = [row for frame in frames for row in frame.to_dict("records")]
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
