"""The cost of planning, resuming and tabulating a study as its records grow: seconds and MiB, with generated records.

    python benchmarks/records.py                     # 1,000 and 10,000; targets: 5 s and 500 MiB for 10,000
    python benchmarks/records.py --counts 100000

Each generated record is a committed record of the ablation with another seed, so sizes are real. *Plan*: list the
missing runs when no run has a record. *Resume*: the same when half of the runs have one. *Tabulate*: make the table
when all runs have one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
TARGET_S, TARGET_MIB = 5, 500


def generate(folder: Path, count: int) -> list[dict]:
    """Write ``count`` records to ``folder`` and return their configs."""
    from memstudy import records

    found = [json.loads(p.read_text("utf-8")) for p in sorted((ROOT / "results" / "memory_ablation").glob("*.json"))]
    models = [record for record in found if record["status"] == "ok" and "of" not in record["config"]]
    configs = []
    for number in range(count):
        record = models[number % len(models)]
        config = record["config"] | {"seed": 1000 + number}
        configs.append(config)
        record = record | {"config": config, "run_id": records.run_id(config)}
        (folder / f"{record['run_id']}.json").write_text(json.dumps(record), encoding="utf-8")
    return configs


class Planned(dict):
    """A run that is only its choices."""

    timed = True

    def model_dump(self, *, mode: str) -> dict:
        return dict(self)


def measure(folder: Path) -> dict:
    """Seconds and MiB that this process takes for a sweep over the records in ``folder``."""
    from memstudy import records
    from memstudy.project import notebook_parameters
    from memstudy.study import Study

    configs = json.loads((folder / "configs.json").read_text())
    os.environ[records.PLAN] = str(folder / "plan")
    (folder / "plan").mkdir(exist_ok=True)
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    places = {"results_dir": str(folder), "out_dir": str(folder / "out"), "run_missing": False}
    study = Study("memory_ablation", notebook_parameters("memory_ablation") | places)
    try:
        rows = study.sweep(map(Planned, configs))
    except records.MissingRecords:
        pass
    else:
        study.table(rows.groupby("experiment")[["peak_allocated_mib", "step_time_ms"]].median(), "all", 1)
        study.values({})
    return {"seconds": time.perf_counter() - began, "mib": (process.memory_info().rss - before) / 2**20}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000])
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.folder:
        print(json.dumps(measure(given.folder)))
        return
    for count in given.counts:
        with tempfile.TemporaryDirectory() as scratch:
            records = Path(scratch, "memory_ablation")
            records.mkdir()
            Path(scratch, "configs.json").write_text(json.dumps(generate(records, count)))
            files = sorted(records.glob("*.json"))
            for stage, kept in (("tabulate", count), ("resume", count // 2), ("plan", 0)):
                for path in files[kept:]:
                    path.unlink(missing_ok=True)
                command = [sys.executable, __file__, "--folder", scratch]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                told = f"{count:>9,} records, {stage:8}: {found['seconds']:6.2f} s, {found['mib']:5.0f} MiB"
                of_target = f"  {found['seconds'] / TARGET_S:.2f} and {found['mib'] / TARGET_MIB:.2f} of the target"
                print(told + of_target * (count == 10_000), flush=True)


if __name__ == "__main__":
    main()
