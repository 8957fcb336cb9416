"""``memstudy report``: execute the studies' notebooks and typeset the report."""

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

QUICK_S = 25 * 60  # all studies at quick scale on two cores with AVX2; with the set-up half an hour


def report(
    studies: Annotated[list[str] | None, typer.Argument(help="Names of studies; all if left out.")] = None,
    scale: Annotated[str, typer.Option(help="A folder of params/: quick, full or gpu.")] = "quick",
    results: Annotated[Path, typer.Option(help=RESULTS)] = records.ROOT / "results",
    reference: Annotated[
        bool, typer.Option("--reference", help="Use the committed records only; run nothing.")
    ] = False,
    no_run: Annotated[
        bool, typer.Option("--no-run", help="Use the records made by memstudy plan's jobs; run nothing.")
    ] = False,
) -> None:
    """Run studies and typeset build/report.pdf.

    Each notebook is executed with params/SCALE/<study>.yaml; the executed copy is build/<study>.ipynb. At full
    scale, tables and figures go to report/ and figures/; at other scales, to build/SCALE/. With --reference, a study
    that lacks records is named and left out.
    """
    with one_line():
        stems = studies or [s for s in project.studies() if scale in project.scales(s)]
        if not stems:
            raise ValueError(f"no study has parameters at scale {scale!r}")
        chosen = {stem: project.read_parameters(stem, scale) for stem in stems}
        if not reference:
            records.check_writable(results)
        import papermill  # noqa: F401 - if not installed, to be said before the first study
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # also in the notebooks, which cannot see whether stderr is a terminal
    generated = records.ROOT if scale == "full" else records.ROOT / "build" / scale
    places = {"results_dir": str(results.resolve()), "out_dir": str(generated), "run_missing": not reference}
    with tempfile.TemporaryDirectory() as scratch:
        if no_run:
            os.environ[records.PLAN] = scratch  # missing runs are written there, not run
        share_s = QUICK_S / len(project.studies()) if scale == "quick" else None
        errors = _execute_all(chosen, places, at_once=2 if reference or no_run else 1, share_s=share_s)
    done = [stem for stem, error in errors.items() if not error]
    left_out = [stem for stem, error in errors.items() if error == records.MissingRecords.__name__ and not studies]
    failed = [stem for stem in errors if stem not in done + left_out]
    status = 1 if failed or not done else 0
    if done:
        (generated / "report").mkdir(parents=True, exist_ok=True)
        if any((generated / "report" / "tradeoffs" / f"{stem}.csv").exists() for stem in done):
            _execute(project.SYNTHESIS, places | {"run_missing": False, "studies": done}, progress=False)
        every_row = "\\everyrow\n" * (scale == "full")  # makes a number without a row an error
        (generated / "report" / "studies.tex").write_text(f"\\studies{{{','.join(done)}}}\n{every_row}")
        status = subprocess.run([records.ROOT / "report" / "tex.sh", generated]).returncode or status
    if left_out:
        typer.echo(f"left out, not all records are there: {', '.join(left_out)}", err=True)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}; the failing cell is marked in build/", err=True)
    if (records.ROOT / "build" / "report.pdf").exists() and done:
        typer.echo(str(records.ROOT / "build" / "report.pdf"))
    raise typer.Exit(status)


def _took(seconds: float, share_s: float | None) -> str:
    """The time of a study as text, with a remark when it is over twice its share."""
    said = f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if share_s is None or seconds <= 2 * share_s:
        return said
    return f"{said}, more than twice its share of {share_s / 60:.0f} min: its parameters are too large for this machine"


def _execute_all(
    chosen: dict[str, dict], places: dict, *, at_once: int, share_s: float | None = None
) -> dict[str, str]:
    """Execute each study's notebook; return by study the name of the error that ended the notebook, or "".

    With ``at_once`` 1, each study's time is printed and compared with ``share_s`` [s], if given. ``at_once`` 2 is for
    notebooks that run nothing: parallel runs would spoil the timings.
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
    """Execute one study's notebook with papermill; return the name of the error that ended the notebook, or ""."""
    import papermill

    # Papermill parses the parameters cell line by line and warns about each "=" within a value and about the names it
    # then misses. `read_parameters` has already checked names and types.
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
