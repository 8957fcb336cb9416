"""The runs of a study that have no record yet, as jobs for a cluster.

A notebook asks for rows as it goes, and later rows may depend on earlier ones (the best combination is timed after all
combinations are predicted). The runs are therefore planned in rounds: plan, run the missing runs, plan again.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from memstudy import records
from memstudy.project import read_parameters


def missing(stem: str, scale: str, results: Path) -> dict[str, dict]:
    """Configs by run id: the runs that study ``stem`` asks for in this round and that have no record in ``results``.

    Raises
    ------
    ValueError
        For an unknown study or scale, and when a cell fails for any reason but a missing record.
    """
    values = read_parameters(stem, scale)
    notebook = load_notebook_node(str(records.ROOT / "notebooks" / f"{stem}.ipynb"))
    with tempfile.TemporaryDirectory() as scratch:
        plan = Path(scratch, "plan")
        plan.mkdir()
        places = {"results_dir": str(results.resolve()), "out_dir": scratch, "run_missing": True}
        notebook = parameterize_notebook(notebook, values | places)
        # A cell without its rows fails, as do the cells that depend on it; allow_errors executes all others.
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
