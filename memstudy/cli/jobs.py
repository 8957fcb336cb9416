"""A study's runs as a cluster's jobs: which records it lacks, and what memory each run will need.

A notebook asks for rows in the course of its story, and later rows may depend on earlier ones (the best combination
is timed once all are predicted), so which runs there are is known by rounds: plan, run what is missing, plan again.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from memstudy import layers, records
from memstudy.attention import Unavailable
from memstudy.configs import LayerRun
from memstudy.parameters import read_parameters
from memstudy.prediction_configs import PredictionRun, PublishedRowRun
from memstudy.profiler import MIB, predict
from memstudy.step import foretell
from memstudy.trainers import Run

PROCESS_MIB = 1500  # what a process holds before its first tensor, and what it reads in: Python, PyTorch, data
SLACK = 1.3  # over the predicted peak, for what an allocator keeps and for evaluation


def missing(stem: str, scale: str, results: Path) -> dict[str, dict]:
    """By run id, the configs of the runs that study ``stem`` asks for now and that have no record in ``results``.

    Raises
    ------
    ValueError
        For an unknown study or scale, and when a cell fails for another reason than a missing record.
    """
    values = read_parameters(stem, scale)
    notebook = load_notebook_node(str(records.ROOT / "notebooks" / f"{stem}.ipynb"))
    with tempfile.TemporaryDirectory() as scratch:
        plan = Path(scratch, "plan")
        plan.mkdir()
        places = {"results_dir": str(results.resolve()), "out_dir": scratch, "run_missing": True}
        notebook = parameterize_notebook(notebook, values | places)
        # A cell that lacks rows fails, and so do those that need them; the others are executed all the same.
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            allow_errors=True,
            timeout=None,
            resources={"metadata": {"path": str(records.ROOT / "notebooks")}},
        )
        client.execute(env=os.environ | {records.PLAN: str(plan)})
        configs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(plan.glob("*.json"))}
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    error = next((output for output in outputs if output.output_type == "error"), None)
    if error and error.ename != records.MissingRecords.__name__:
        raise ValueError(f"study {stem}: {error.ename}: {error.evalue}")
    return configs


def needs(run: Run, *, gpu: str = "") -> dict[str, int]:
    """What a job that carries out ``run`` has to ask for, predicted; in MB of 10^6 bytes, as schedulers count.

    Returns
    -------
    dict
        ``mem_mb``, of the host, of all processes; with ``gpu``, unless the run is itself a prediction, ``gpu`` (how
        many) and ``gpu_mem_mb`` (of each) too.
    """
    if isinstance(run, PredictionRun | PublishedRowRun):
        return {"mem_mb": _mb(2 * PROCESS_MIB)}  # of what is followed, millions of small objects
    try:
        if isinstance(run, LayerRun):
            peak = layers.peak_bytes(run, predict) / MIB
            return {"mem_mb": _mb(PROCESS_MIB + SLACK * peak)}
        report = foretell(run, gpu)
    except Unavailable:  # the run will say so itself
        return {"mem_mb": _mb(PROCESS_MIB)}
    if gpu:
        gpus = {"gpu": run.processes, "gpu_mem_mb": _mb(report.whole_gpu_mib)}
        return {"mem_mb": run.processes * _mb(2 * PROCESS_MIB), **gpus}
    return {"mem_mb": run.processes * _mb(PROCESS_MIB + SLACK * report.peak_allocated_mib)}


def _mb(mib: float) -> int:
    return math.ceil(mib * MIB / 1e6)
