"""``memstudy report``: studies' notebooks, executed, and their report typeset."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from memstudy import project, records
from memstudy.cli.errors import one_line
from memstudy.cli.list import RESULTS

QUICK_S = 25 * 60  # for all studies at quick scale, on two cores with AVX2: half an hour with the set-up


def report(
    studies: Annotated[list[str] | None, typer.Argument(help="Studies; all when left out.")] = None,
    scale: Annotated[str, typer.Option(help="Parameters: a folder of params/.")] = "quick",
    results: Annotated[Path, typer.Option(help=RESULTS)] = records.ROOT / "results",
    reference: Annotated[
        bool, typer.Option("--reference", help="Use the committed records only; run nothing.")
    ] = False,
    no_run: Annotated[
        bool, typer.Option("--no-run", help="Use the records that memstudy plan asked for; run nothing.")
    ] = False,
) -> None:
    """Run studies and typeset build/report.pdf.

    Each notebook is executed with params/SCALE/<study>.yaml; the executed copy is build/<study>.ipynb. At full
    scale tables and figures go to report/ and figures/, at any other to build/SCALE/. With --reference a study whose
    records are not all there yet is named and left out.
    """
    with one_line():
        stems = studies or [s for s in project.studies() if scale in project.scales(s)]
        if not stems:
            raise ValueError(f"no study has parameters at scale {scale!r}")
        chosen = {stem: project.read_parameters(stem, scale) for stem in stems}
        if not reference:
            records.check_writable(results)
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # also in the notebooks, which cannot see where their bars are printed
    generated = records.ROOT if scale == "full" else records.ROOT / "build" / scale
    places = {"results_dir": str(results.resolve()), "out_dir": str(generated), "run_missing": not reference}
    with tempfile.TemporaryDirectory() as scratch:
        if no_run:
            os.environ[records.PLAN] = scratch  # and nothing runs
        share_s = QUICK_S / len(project.studies()) if scale == "quick" else None
        errors = _execute_all(chosen, places, at_once=2 if reference or no_run else 1, share_s=share_s)
    done = [stem for stem, error in errors.items() if not error]
    left_out = [stem for stem, error in errors.items() if error == records.MissingRecords.__name__ and not studies]
    failed = [stem for stem in errors if stem not in done + left_out]
    status = 1 if failed or not done else 0
    if done:
        from memstudy.cli import synthesis

        (generated / "report").mkdir(parents=True, exist_ok=True)
        synthesis.draw(generated, done)
        (generated / "report" / "studies.tex").write_text(f"\\studies{{{','.join(done)}}}\n")
        status = subprocess.run([records.ROOT / "report" / "tex.sh", generated]).returncode or status
    if left_out:
        typer.echo(f"left out, not all records are there: {', '.join(left_out)}", err=True)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}; the failing cell is marked in build/", err=True)
    if (records.ROOT / "build" / "report.pdf").exists() and done:
        typer.echo(str(records.ROOT / "build" / "report.pdf"))
    raise typer.Exit(status)


def _took(seconds: float, share_s: float | None) -> str:
    """The time of a study, and whether it passes twice its share."""
    said = f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if share_s is None or seconds <= 2 * share_s:
        return said
    return f"{said}, more than twice its share of {share_s / 60:.0f} min: its parameters are too large for this machine"


def _execute_all(
    chosen: dict[str, dict], places: dict, *, at_once: int, share_s: float | None = None
) -> dict[str, str]:
    """Execute each study's notebook; by study, the name of the error that ended it, empty when none did.

    Each prints its time at the end, held against ``share_s`` [s] where that is given. Two may go ``at_once`` only where
    nothing is run: timings suffer from company.
    """
    if at_once == 1:
        errors = {}
        for number, (stem, values) in enumerate(chosen.items(), 1):
            typer.echo(f"== study {number}/{len(chosen)}: {stem}", err=True)
            began = time.monotonic()
            errors[stem] = _execute(stem, values | places, progress=True)
            typer.echo(f"== {stem}: {_took(time.monotonic() - began, share_s)}", err=True)
        return errors
    with ThreadPoolExecutor(at_once) as pool:
        started = {
            pool.submit(_execute, stem, values | places, progress=False): stem for stem, values in chosen.items()
        }
        quiet = not sys.stderr.isatty()
        for _ in tqdm(as_completed(started), desc="studies", unit="study", total=len(started), disable=quiet):
            pass
    return {stem: future.result() for future, stem in started.items()}


def _execute(stem: str, values: dict, *, progress: bool) -> str:
    """Execute one study's notebook with papermill; the name of the error that ended it, empty when none did."""
    import papermill

    # It reads a parameters cell line by line, and warns of each "=" within a value and of the names it then lacks;
    # `parameters` has held names and types to the cell.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    (records.ROOT / "build").mkdir(exist_ok=True)
    try:
        papermill.execute_notebook(
            records.ROOT / "notebooks" / f"{stem}.ipynb",
            records.ROOT / "build" / f"{stem}.ipynb",
            parameters=values,
            cwd=records.ROOT / "notebooks",
            kernel_name="python3",
            progress_bar=progress and sys.stderr.isatty(),
            stderr_file=sys.stderr,
            extra_arguments=["--log-level=50"],
        )
    except papermill.PapermillExecutionError as error:
        typer.echo(f"{stem}, cell {error.exec_count}: {error.ename}: {error.evalue}", err=True)
        return error.ename
    return ""
