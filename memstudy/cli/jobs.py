"""The runs of a study that have no record yet, as jobs for a cluster.

A notebook asks for rows as it goes, and later rows may depend on earlier ones (the best combination is timed after all
combinations are predicted). The runs are therefore planned in rounds: plan, run the missing runs, plan again. What a
round would take is predicted before it runs.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from tqdm import tqdm

from memstudy import records
from memstudy.kinds import parse_run
from memstudy.profiler import find_gpu
from memstudy.project import read_parameters
from memstudy.trainers.base import MARGIN, START_MINUTES


def missing(stem: str, scale: str, results: Path, gpu: str = "") -> dict[str, dict]:
    """Configs by run id: the runs that study ``stem`` asks for in this round and that have no record in ``results``.

    With ``gpu``, where the runs will be, precision ``auto`` means what is fast there.

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
        precision = {records.PRECISION: "bf16" if find_gpu(gpu).bf16_is_fast else "fp32"} if gpu else {}
        client.execute(env=os.environ | {records.PLAN: str(plan)} | precision)
        configs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(plan.glob("*.json"))}
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    error = next((output for output in outputs if output.output_type == "error"), None)
    if error and error.ename != records.MissingRecords.__name__:
        raise ValueError(f"study {stem}: {error.ename}: {error.evalue}")
    return configs


def needs(configs: Mapping[str, dict], gpu: str, *, of: str) -> dict[str, dict]:
    """What the job of each config must request (`Run.needs`), by run id; a bar named ``of`` shows the progress."""
    return {
        run_id: parse_run(config).needs(gpu)
        for run_id, config in tqdm(configs.items(), desc=f"{of}: what its runs need", unit="run")
    }


@dataclass(frozen=True)
class Total:
    """What the runs of one round would take on a GPU, predicted.

    Attributes
    ----------
    runs, on_gpu, refused, unpredicted : int
        All runs; those that need a GPU; of these, those that do not fit it, and those whose time is not predicted.
    hours : tuple of float
        GPU hours of the steps by a fast, a typical and a slow host, of the runs that fit.
    requested_hours : float
        GPU hours that the jobs request, where a time is predicted.
    record_mb : float
        What the records take on disk [MB], each as much as the study's committed ones on average.
    untimed : tuple of str
        What the hours leave out or only bound.
    """

    runs: int
    on_gpu: int
    refused: int
    unpredicted: int
    hours: tuple[float, float, float]
    requested_hours: float
    record_mb: float
    untimed: tuple[str, ...]

    @classmethod
    def of(cls, stem: str, needs: Mapping[str, dict]) -> Total:
        """The total of the jobs of study ``stem``, from what they need."""
        jobs = [asked for asked in needs.values() if "gpu" in asked]
        timed = [asked for asked in jobs if "gpu_s" in asked]
        committed = [path.stat().st_size for path in (records.ROOT / "results" / stem).glob("*.json")]
        return cls(
            runs=len(needs),
            on_gpu=len(jobs),
            refused=sum(not asked.get("fits", True) for asked in jobs),
            unpredicted=len(jobs) - len(timed),
            hours=tuple(sum(asked["gpu"] * asked["gpu_s"][n] for asked in timed) / 3600 for n in range(3)),
            requested_hours=sum(asked["gpu"] * asked["runtime"] for asked in timed) / 60,
            record_mb=len(needs) * statistics.mean(committed or [0]) / 1e6,
            untimed=tuple(sorted({kind for asked in timed for kind in asked["untimed"]})),
        )

    def lines(self, gpu: str) -> list[str]:
        """The total in words."""
        low, middle, high = (f"{hours:,.1f}" for hours in self.hours)
        said = [
            f"on {gpu}, {self.on_gpu} of them: {middle} GPU hours ({low} to {high}) of steps, predicted; "
            f"{self.requested_hours:,.1f} requested: {START_MINUTES} minutes for the start of each, and {MARGIN} × the "
            "upper end, for evaluation and decoding"
        ]
        said += [f"{self.refused} do not fit it and end at once"] * bool(self.refused)
        said += [f"{self.unpredicted} have no predicted time, and are not in the hours"] * bool(self.unpredicted)
        said += [f"not in the hours: {', '.join(self.untimed)}"] * bool(self.untimed)
        return [*said, f"{self.runs} records, about {self.record_mb:,.2f} MB; later rounds may ask for more runs"]
