"""``memstudy plan``: a study's missing runs as a cluster's jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from memstudy import records
from memstudy.cli.errors import one_line
from memstudy.cli.list import RESULTS
from memstudy.project import read_parameters


def plan(
    study: Annotated[str, typer.Argument(help="A study; memstudy list studies shows them.")],
    into: Annotated[
        Path | None, typer.Argument(help="Folder for one JSON file per run, and for needs.json; without it, none.")
    ] = None,
    scale: Annotated[str, typer.Option(help="A folder of params/: quick, full or gpu.")] = "quick",
    results: Annotated[Path, typer.Option(help=RESULTS)] = records.ROOT / "results",
    gpu: Annotated[str, typer.Option(help="The jobs' GPU, a name from memstudy list gpus; empty: none.")] = "",
) -> None:
    """Write a study's missing runs as job files. Predicts what each job needs, and prints what all would take.

    \b
    memstudy plan lab4_grid --scale gpu --gpu T4          what it would take
    memstudy plan lab4_grid jobs --scale gpu --gpu T4     and the jobs, into a folder

    For a workflow engine (see the Snakefile): run each file with memstudy run and plan again, until no run is missing;
    then memstudy report --no-run. What a job needs: memory, and for a GPU whose speed is known the run's time.
    """
    with one_line():
        read_parameters(study, scale)  # refuses before the imports, which take seconds
        from memstudy.cli import jobs

        configs = jobs.missing(study, scale, results, gpu)
        needs = jobs.needs(configs, gpu, of=study)
        if into is not None:
            into.mkdir(parents=True, exist_ok=True)
            for run_id, config in configs.items():
                (into / f"{run_id}.json").write_text(json.dumps(config), encoding="utf-8")
            (into / "needs.json").write_text(json.dumps(needs, indent=1), encoding="utf-8")
    typer.echo(f"{study}: {len(configs)} runs are missing")
    if gpu and configs:
        for line in jobs.Total.of(study, needs).lines(gpu):
            typer.echo(line)
