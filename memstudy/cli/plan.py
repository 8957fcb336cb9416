"""``memstudy plan``: a study's missing runs as a cluster's jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from memstudy import records
from memstudy.cli.errors import one_line
from memstudy.cli.list import RESULTS


def plan(
    study: Annotated[str, typer.Argument(help="A study; memstudy list studies shows them.")],
    into: Annotated[Path, typer.Argument(help="Folder for one JSON file per run, and for needs.json.")],
    scale: Annotated[str, typer.Option(help="A folder of params/: quick, full or gpu.")] = "quick",
    results: Annotated[Path, typer.Option(help=RESULTS)] = records.ROOT / "results",
    gpu: Annotated[str, typer.Option(help="The jobs' GPU, a name from memstudy list gpus; empty: none.")] = "",
) -> None:
    """Write a study's missing runs as job files, and the predicted memory that each job needs.

    For a workflow engine (see the Snakefile): run each file with memstudy run and plan again, until no run is missing;
    then memstudy report --no-run.
    """
    with one_line():
        from memstudy.cli import jobs
        from memstudy.kinds import parse_run

        configs = jobs.missing(study, scale, results)
        into.mkdir(parents=True, exist_ok=True)
        needs = {
            run_id: parse_run(config).needs(gpu)
            for run_id, config in tqdm(configs.items(), desc=f"{study}: memory of its runs", unit="run")
        }
        for run_id, config in configs.items():
            (into / f"{run_id}.json").write_text(json.dumps(config), encoding="utf-8")
        (into / "needs.json").write_text(json.dumps(needs, indent=1), encoding="utf-8")
    typer.echo(f"{study}: {len(configs)} runs are missing")
