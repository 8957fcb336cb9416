"""Predict published tables of GPU memory, and print the error of each number.

python benchmarks/prediction [ops|bert|inference|modern|generation]... [--rows TEXT] [--json FILE]

``modern`` is fine-tuning of 2023 to 2026: fms-acceleration's runs, fsdp_qlora's notebook, PEFT's comparison of methods,
and where their code is on the path, lit-gpt's and torchtune's (``of_their_time.sh`` fetches both). Generation takes six
minutes, all else six more, and no GPU. How each constant was chosen: ``memstudy/studies/published/eras.py``.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

from memstudy.studies.published import generation as text
from memstudy.studies.published import modern as fine_tuning
from memstudy.studies.published import peft
from memstudy.studies.published.bert import savings
from memstudy.studies.published.inference import length_differences
from memstudy.studies.published.modern import calculators, fms, litgpt, notebook, torchtune
from memstudy.studies.published.rows import chosen_on, predicted_rows, published


def ops(text: str) -> list[pd.DataFrame]:
    return [predicted_rows("ops", named("ops", text))]


def bert(text: str) -> list[pd.DataFrame]:
    """Predicted with the PyTorch rules of the table's time, and beside them with today's rules."""
    only = named("bert", text)
    rows, today = predicted_rows("bert", only), predicted_rows("bert", only, era=False)
    both = [rows, savings(rows)], [today, savings(today)]
    columns = {"predicted_mib": "today_mib", "error_percent": "today_error_percent"}
    return [old.join(new.rename(columns=columns)[[*columns.values()]]) for old, new in zip(*both, strict=True)]


def inference(text: str) -> list[pd.DataFrame]:
    rows = predicted_rows("inference", named("inference", text))
    return [rows, length_differences(rows)]


def modern(text: str) -> list[pd.DataFrame]:
    """Fine-tuning of 2023 to 2026; says how it was made, and names the rows that are not predicted.

    The last table is what other calculators say.
    """
    print(f"fms: allocated memory; {fms.SOFTWARE}\nnotebook: allocated memory; {notebook.SOFTWARE}")
    print(f"peft: reserved memory; {peft.SOFTWARE}\nlitgpt: allocated memory; {litgpt.SOFTWARE}")
    print(f"torchtune: {torchtune.SOFTWARE}\nnot predicted:")
    for query, cause in fine_tuning.OUTSIDE.items():
        print(f"  {' '.join(fine_tuning.published('AB').query(query).id)}: {cause}")
    tables = ["fms", "notebook", "peft"]
    for table, module in (("litgpt", "lit_gpt"), ("torchtune", "torchtune")):
        if find_spec(module):
            tables.append(table)
        else:
            print(f"  all rows of {table}: its code is not here; benchmarks/prediction/of_their_time.sh fetches it")
    frames = [predicted_rows(table, named(table, text)) for table in tables]
    frames = [rows.assign(chosen_on=[*map(chosen_on, rows.table, rows.row)]) for rows in frames]
    others = calculators.figures()
    return [*frames, others[others.row.str.contains(text, regex=False)]]


def generation(rows: str) -> list[pd.DataFrame]:
    """Generation of 2023 to 2025; as `modern`."""
    print(f"generation: {text.SOFTWARE}\nnot predicted:")
    for query, cause in text.OUTSIDE.items():
        print(f"  {' '.join(text.published().query(query).id)}: {cause}")
    return [predicted_rows("generation", named("generation", rows))]


def named(table: str, text: str) -> list[str]:
    """The rows of ``table`` whose names have ``text`` in them."""
    return [row for row in published(table).index if text in row]


TABLES = {"ops": ops, "bert": bert, "inference": inference, "modern": modern, "generation": generation}


def show(frame: pd.DataFrame) -> None:
    if frame.empty:  # no name has the text of --rows
        return
    frame = frame.copy()
    frame.insert(4, "difference_mib", frame.predicted_mib - frame.published_mib)
    print(f"\n{frame.table[0]}\n{frame.drop(columns='table').to_string(index=False, float_format='{:,.3f}'.format)}")
    for column in frame.columns[frame.columns.str.endswith("error_percent")]:
        error = frame[column].abs()
        print(f"{column}: median {error.median():.4f} %, worst {error.max():.4f} % ({frame.row[error.idxmax()]})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, "all"], default="all", help="default: all")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose names have TEXT in them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    chosen = parser.parse_args()
    frames = []
    for name in TABLES if "all" in chosen.tables else chosen.tables:
        frames += (made := TABLES[name](chosen.rows))
        for frame in made:
            show(frame)
    if chosen.json:
        rows = [row for frame in frames for row in frame.to_dict("records")]
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
