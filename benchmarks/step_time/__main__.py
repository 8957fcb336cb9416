"""Predict published times of ops, layers and whole training steps on GPUs, and print the error of each.

python benchmarks/step_time [TABLE]... [--rows TEXT] [--json FILE]

All tables take some ten minutes and no GPU. ``in_band``: whether the published time lies between ``low_ms`` and
``high_ms``. ``unseen``: predicted without the constants that were fitted on the GPU's generation. ``fitted`` names the
constants that the row helped to choose, ``seen`` those that were chosen after its error was known; where both are
empty, or only the band's width was chosen, the row is held out. Which rows chose a constant:
``memstudy/profiler/time/constants.yaml``. ``left_out.py`` leaves out single GPUs.

Last come, by name, the rows that the GPU bounds and that are off by more than a quarter (ops of more than 0.2 ms), and
the ratios that are off by more than a fifth or have the wrong sign, each with its cause where one was found.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import pandas as pd

from memstudy.studies.published.times.errors import LOWER_BOUNDS, checked, parts, summary_of_ratios
from memstudy.studies.published.times.tables import TABLES

# Why rows are far off, by their table and a text in their names; a ratio is named as its row.
CAUSES = {
    ("peft_l40s", "frod"): "copies 1.9 GB of frozen factors from pageable memory of the host at each step; not traced",
    ("peft_l40s", "ia3"): "1.4 % quicker than LoRA as published; runs of one setting differ by more",
    (
        "peft_l40s",
        "tinylora",
    ): "adds 8 ms to a step without adapters, 1 predicted; 112 reads by the optimizer; cause open",
    ("peft_l40s", "unilora"): "adds 14 ms to a step without adapters, 5 predicted; 112 sums by index; cause open",
    ("hf_v100", "checkpointing, fp16"): "a slow host: one sequence leaves the GPU little work",
    ("liger", "embedding"): "index_select before PyTorch 2.7: 30 % of an A100's bandwidth (pytorch/pytorch#145999)",
    ("vidur", "emb"): "index_select before PyTorch 2.7: 30 % of an A100's bandwidth (pytorch/pytorch#145999)",
    ("neusight_ops", "bmm"): "on an A100 the library takes 128 × 128 tiles alone; the prediction takes the best tile",
    ("mli_best", "A6000: matmul"): "300 W: a product alone is predicted at the clock of a cool GPU",
}


def show(name: str, frame: pd.DataFrame, index: bool = False) -> None:
    print(f"\n{name}\n{frame.to_string(index=index, float_format='{:,.2f}'.format)}")


def predict(name: str, module: ModuleType, text: str) -> list[pd.DataFrame]:
    """Predict and print the rows of ``module`` that have ``text`` in their names, and the ratios between them."""
    chosen = [row for row in module.rows() if text in row.row]
    if not chosen:
        return []
    rows, ratios = checked(module, chosen)
    show(name, rows.drop(columns=["table", "unseen_ms"]))
    show(f"{name}: |error| [%]{' of a lower bound' if name in LOWER_BOUNDS else ''}", parts(rows), index=True)
    if len(ratios):
        found = summary_of_ratios(ratios)
        show(f"{name}: ratios", ratios.drop(columns="table"))
        print("median {median:.1f} %, worst {worst:.1f} %; which takes longer: {right:.0f} % right".format(**found))
    return [rows, ratios]


def outside(rows: pd.DataFrame) -> pd.DataFrame:
    """The ``rows`` that the GPU bounds and that are far off."""
    heavy = (rows.kind == "step") | (rows.published_ms > 0.2)
    return rows[(rows.bound_by == "GPU") & heavy & (rows.error_percent.abs() > 25)]


def outside_of_ratios(ratios: pd.DataFrame) -> pd.DataFrame:
    """The ``ratios`` that are far off or have the wrong sign."""
    wrong = (ratios.published_ratio > 1) != (ratios.predicted_ratio > 1)
    return ratios[wrong | (ratios.error_percent.abs() > 20)]


def with_causes(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The ``columns`` of ``frame``, and why each line is off."""
    causes = [
        next(
            (cause for (table, text), cause in CAUSES.items() if table == line.table and text in line.row), "not found"
        )
        for line in frame.itertuples()
    ]
    return frame[["table", "row", *columns, "error_percent"]].assign(cause=causes)


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
    far_off = [with_causes(outside(rows), ["gpu", "published_ms", "predicted_ms"])]
    for ratios in (frame for frame in frames if "published_ratio" in frame):
        far_off.append(with_causes(outside_of_ratios(ratios), ["published_ratio", "predicted_ratio"]))
    for frame in filter(len, far_off):
        show("Far off", frame)
    if chosen.json:
        lines = [line for frame in frames for line in json.loads(frame.to_json(orient="records"))]
        chosen.json.write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
