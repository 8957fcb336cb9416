"""The reference's records, and the part of a run's result that repeated runs share."""

import subprocess
from pathlib import Path

from memstudy.records import ROOT, read_record


def committed(study: str = "*") -> dict[Path, dict]:
    """The committed records of ``study`` by file: a user's own runs lie in the same folders.

    Outside of a git checkout nothing tells the two apart, and all records are returned.
    """
    pattern = f"results/{study}/*.json"
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True)
    paths = ROOT.glob(pattern) if listed.returncode else [ROOT / line for line in listed.stdout.splitlines()]
    return {path: read_record(path) for path in sorted(paths)}


def without_times(result):
    """The metrics without times, the curves and the data of a result: equal in every run of one config."""
    metrics = {name: value for name, value in result["metrics"].items() if not name.endswith(("_s", "_ms"))}
    return metrics, result["curves"], result["data"]
