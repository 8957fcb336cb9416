"""Predictions beside measurements: rows, errors, the record of a GPU, and the table of all records."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from memstudy import records
from memstudy.profiler import Gpu

QUANTITIES = {
    "allocated": "peak_allocated_mib",
    "reserved": "peak_reserved_mib",
    "whole GPU": "whole_gpu_mib",
    "step time": "step_time_ms",
}


def compared(name: str, predicted: dict, measured: dict | None) -> dict:
    """A step's row from the record of its prediction and that of its run; ``measured`` is None if it was not run.

    The status is that of the run, or says why there was none.
    """
    ran = measured or predicted
    status, reason = ran["status"], ran["reason"]
    if measured is None and status == "ok":
        status, reason = "not run", "predicted not to fit"
    row = {"step": name, "config": predicted["config"]["of"], "status": status, "reason": reason, "errors_percent": {}}
    row |= {"predicted": predicted["metrics"], "measured": measured["metrics"] if measured else {}}
    for quantity, metric in QUANTITIES.items():
        if metric in row["predicted"] and metric in row["measured"]:
            error = 100 * (row["predicted"][metric] / row["measured"][metric] - 1)
            row["errors_percent"][quantity] = round(error, 4)
    return row


def in_band(row: dict) -> bool | None:
    """Whether the measured step time is within the predicted band; None without both."""
    if "step time" not in row["errors_percent"]:
        return None
    predicted = row["predicted"]
    return predicted["step_time_low_ms"] <= row["measured"]["step_time_ms"] <= predicted["step_time_high_ms"]


def summary(rows: Sequence[dict]) -> dict[str, float]:
    """Number of steps, and the median and the largest error of each quantity, as metrics of a record."""
    metrics: dict[str, float] = {"n_steps": len(rows), "n_measured": sum(row["status"] == "ok" for row in rows)}
    for quantity in QUANTITIES:
        errors = [abs(row["errors_percent"][quantity]) for row in rows if quantity in row["errors_percent"]]
        if errors:
            name = quantity.replace(" ", "_").lower()
            metrics |= {f"{name}_median_percent": statistics.median(errors), f"{name}_worst_percent": max(errors)}
    held = [within for row in rows if (within := in_band(row)) is not None]
    return metrics | ({"in_band_percent": 100 * sum(held) / len(held)} if held else {})


def write(folder: Path, rows: Sequence[dict], card: Gpu, told: Mapping[str, str], *, started: str, quick: bool) -> Path:
    """Write the record ``<gpu>-<driver>-<torch>.json`` under ``folder``, whole or not at all, and return its path.

    ``told`` has the ``driver`` and the ``torch`` version; a quick set's name ends in ``-quick``.
    """
    config = {"kind": "validations", "gpu": card.name, **told, "quick": quick, "steps": [row["config"] for row in rows]}
    record = records.make_record(config, "ok", "", started)
    record |= {"metrics": summary(rows), "curves": {"rows": list(rows)}, "data": {"gpu": card.model_dump(mode="json")}}
    record["provenance"]["command"] = "memstudy validate"
    name = "-".join([card.name, told["driver"], told["torch"], *["quick"] * quick])
    path = folder / f"{''.join(c if c.isalnum() or c in '.+-' else '-' for c in name)}.json"
    os.replace(records.write_record(folder, record), path)
    return path


def of_all(folder: Path) -> pd.DataFrame:
    """One row for each record under ``folder``: median and largest errors [%]; "none yet" without a record."""
    columns = [(quantity, f"{which} [%]") for quantity in QUANTITIES for which in ("median", "worst")]
    table = {}
    for record in records.read_records(folder):
        config, metrics = record["config"], record["metrics"]
        name = f"{config['gpu']}, driver {config['driver']}, PyTorch {config['torch']}" + ", quick" * config["quick"]
        names = (quantity.replace(" ", "_").lower() for quantity in QUANTITIES)
        errors = [metrics.get(f"{each}_{which}_percent") for each in names for which in ("median", "worst")]
        table[name] = [metrics["n_measured"], *errors]
    table = table or {"none yet": [None] * (1 + len(columns))}
    frame = pd.DataFrame.from_dict(table, orient="index", dtype=float)
    return frame.set_axis(pd.MultiIndex.from_tuples([("", "steps"), *columns]), axis=1)
