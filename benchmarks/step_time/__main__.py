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

from memstudy.studies.published.times.errors import LOWER_BOUNDS, checked, parts, summary_of_ratios
from memstudy.studies.published.times.tables import TABLES


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
