"""The command line: ``memstudy run | report | predict | fit | serve | list``."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from memstudy import forecast, parameters, runs
from memstudy.bad_input import one_line
from memstudy.qa.serve import serve

QUICK_S = 25 * 60  # for all studies at quick scale, on two cores with AVX2: half an hour with the set-up

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""Which memory technique for which Transformer?

    A study is a notebook. It asks for rows; rows that have no record yet are run, each in a fresh process; every
    table, figure and number of the report is computed from the rows.

    memstudy predict --model gpt2 --batch 8 --seq-len 512 --gpu T4       will it fit? no GPU needed\n
    memstudy fit --model gpt2 --seq-len 512 --gpu T4 --advise            the largest batch\n
    memstudy advise --model gpt2 --batch 64 --seq-len 512 --gpu T4       what makes it fit\n
    memstudy list studies            what there is\n
    memstudy report lab4_grid        run one study at quick scale, typeset build/report.pdf\n
    memstudy run CONFIG.json         one run: a record in results/, whatever becomes of it\n
    memstudy list runs               the records there are\n
    memstudy serve                   ask the trained models, on a web page

    Stopped half-way? The same command goes on: finished runs are never repeated.
    """,
)


class Listing(StrEnum):
    """What `memstudy list` can list."""

    variants = "variants"
    techniques = "techniques"
    datasets = "datasets"
    gpus = "gpus"
    models = "models"
    studies = "studies"
    runs = "runs"


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="JSON file with the run's every choice.")],
    results: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("results/single"),
) -> None:
    """Carry out one run in this process and write its record.

    The file's "kind" says what is run: "language_model", "reformer", "seq2seq", "hub_model", "inference", "fine_tune",
    "layer", or "prediction" of another of them.

    {"kind": "language_model", "experiment": "mine", "n_layers": 2, "hidden_size": 64, "n_heads": 2,
    "feed_forward": 256, "vocab_size": 1000, "seq_len": 128, "batch_size": 4, "techniques": ["bf16"],
    "measure_steps": 3}

    Exit status: 0 with status ok, unavailable or oom in the record; 1 when the run failed; 2 for bad input.
    """
    with one_line():
        try:
            given = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ValueError(f"{config}: {reason}; a JSON file is needed") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{config}: not JSON: {error}") from None
        runs.check_writable(results)
        import torch

        from memstudy import trainers
        from memstudy.attention import Unavailable

        planned = trainers.parse_run(given)
        processes = getattr(planned, "processes", 1)
        together = int(os.environ.get("WORLD_SIZE", 1))
        if "RANK" in os.environ and together != processes:
            raise ValueError(f"{config}: processes={processes}, but {together} were started; start as many, or none")
        if processes > 1 and "RANK" not in os.environ:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command = [*launch, "-m", "memstudy.cli", "run", str(config), "--results", str(results)]
            raise typer.Exit(subprocess.run(command).returncode)
        trains = getattr(planned, "train_steps", 0)
        if trains or isinstance(planned, trainers.FineTuneRun):
            trainers.load_data(planned)
        try:
            if int(os.environ.get("RANK", 0)):  # the first process writes the record
                trainers.execute(planned, runs.checkpoints_of(planned.model_dump(mode="json")))
                return
            record = runs.perform(
                planned.model_dump(mode="json"),
                results.resolve(),
                lambda checkpoints: trainers.execute(planned, checkpoints),
                out_of_memory=(MemoryError, torch.OutOfMemoryError),
                unavailable=(Unavailable,),
            )
        finally:
            if torch.distributed.is_initialized():  # else its threads may crash a process that ends
                torch.distributed.destroy_process_group()
    typer.echo(f"{record['run_id']}: {record['status']} {record['reason']}".strip())
    for name, value in record["metrics"].items():
        typer.echo(f"  {name} = {value:,.3f}" if isinstance(value, float) else f"  {name} = {value}")
    raise typer.Exit(1 if record["status"] == "failed" else 0)


@app.command()
def report(
    studies: Annotated[list[str] | None, typer.Argument(help="Studies; all when left out.")] = None,
    scale: Annotated[str, typer.Option(help="Parameters: a folder of params/.")] = "quick",
    results: Annotated[Path, typer.Option(help="Folder of the records; a study's are in its own below it.")] = runs.ROOT
    / "results",
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
        stems = studies or [s for s in parameters.studies() if scale in parameters.scales(s)]
        if not stems:
            raise ValueError(f"no study has parameters at scale {scale!r}")
        chosen = {stem: parameters.read_parameters(stem, scale) for stem in stems}
        if not reference:
            runs.check_writable(results)
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # also in the notebooks, which cannot see where their bars are printed
    generated = runs.ROOT if scale == "full" else runs.ROOT / "build" / scale
    places = {"results_dir": str(results.resolve()), "out_dir": str(generated), "run_missing": not reference}
    with tempfile.TemporaryDirectory() as scratch:
        if no_run:
            os.environ[runs.PLAN] = scratch  # and nothing runs
        share_s = QUICK_S / len(parameters.studies()) if scale == "quick" else None
        errors = _execute_all(chosen, places, at_once=2 if reference or no_run else 1, share_s=share_s)
    done = [stem for stem, error in errors.items() if not error]
    left_out = [stem for stem, error in errors.items() if error == runs.MissingRecords.__name__ and not studies]
    failed = [stem for stem in errors if stem not in done + left_out]
    status = 1 if failed or not done else 0
    if done:
        from memstudy import synthesis

        (generated / "report").mkdir(parents=True, exist_ok=True)
        synthesis.draw(generated, done)
        (generated / "report" / "studies.tex").write_text(f"\\studies{{{','.join(done)}}}\n")
        status = subprocess.run([runs.ROOT / "report" / "tex.sh", generated]).returncode or status
    if left_out:
        typer.echo(f"left out, not all records are there: {', '.join(left_out)}", err=True)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}; the failing cell is marked in build/", err=True)
    if (runs.ROOT / "build" / "report.pdf").exists() and done:
        typer.echo(str(runs.ROOT / "build" / "report.pdf"))
    raise typer.Exit(status)


@app.command()
def plan(
    study: Annotated[str, typer.Argument(help="A study; memstudy list studies shows them.")],
    into: Annotated[Path, typer.Argument(help="Folder for one JSON file a run, and for needs.json.")],
    scale: Annotated[str, typer.Option(help="A folder of params/.")] = "quick",
    results: Annotated[Path, typer.Option(help="Folder of the records; a study's are in its own below it.")] = runs.ROOT
    / "results",
    gpu: Annotated[str, typer.Option(help="The jobs' GPU, a name of memstudy list gpus; empty: none.")] = "",
) -> None:
    """Write the runs that a study lacks now, and what memory each job must ask for, by prediction.

    For a workflow engine (see the Snakefile): run them with memstudy run, then plan again, until none is missing; then
    memstudy report --no-run.
    """
    with one_line():
        from memstudy import jobs
        from memstudy.trainers import parse_run

        configs = jobs.missing(study, scale, results)
        into.mkdir(parents=True, exist_ok=True)
        needs = {
            run_id: jobs.needs(parse_run(config), gpu=gpu)
            for run_id, config in tqdm(configs.items(), desc=f"{study}: memory of its runs", unit="run")
        }
        for run_id, config in configs.items():
            (into / f"{run_id}.json").write_text(json.dumps(config), encoding="utf-8")
        (into / "needs.json").write_text(json.dumps(needs, indent=1), encoding="utf-8")
    typer.echo(f"{study}: {len(configs)} runs are missing")


app.command()(forecast.predict)
app.command()(forecast.fit)
app.command()(forecast.advise)
app.command()(serve)


@app.command(name="list")
def list_(
    what: Annotated[Listing, typer.Argument(help="What to list.")],
    results: Annotated[Path, typer.Option(help="Folder of the records, for runs.")] = runs.ROOT / "results",
) -> None:
    """List variants, techniques, datasets, gpus, models, studies or runs."""
    from rich.console import Console
    from rich.table import Table

    with one_line():
        rows = _LISTINGS[what](results)
    if not rows:
        typer.echo(f"no {what.value} yet")
        return
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*(str(cell) for cell in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table, markup=False)


def _variants(results: Path) -> list[dict]:
    from memstudy.attention import ATTENTION

    return [{"variant": name, "causal": config.causal, "paper": config.paper} for name, config in ATTENTION.items()]


def _techniques(results: Path) -> list[dict]:
    from memstudy.techniques import TECHNIQUES

    return [
        {
            "technique": name,
            "for": " ".join(["training"] * lever.in_training + ["inference"] * lever.at_inference),
            "exact": "yes" if lever.exact else "no",
            "needs": lever.requires or "–",
            "what it does": lever.summary,
        }
        for name, lever in TECHNIQUES.items()
    ]


def _datasets(results: Path) -> list[dict]:
    from memstudy import data

    return data.datasets_available()


def _gpus(results: Path) -> list[dict]:
    from memstudy.profiler import gpus

    return [
        {
            "gpu": card.name,
            "memory [GiB]": f"{card.memory_mib / 1024:.2f}",
            "CUDA context [MiB]": f"{card.context_mib:.0f}",
            "compute capability": ".".join(map(str, card.compute_capability)),
            "source of the context": re.split(r":| \(|,", card.context_source)[0],
        }
        for card in gpus().values()
    ]


def _models(results: Path) -> list[dict]:
    from memstudy.hub_configs import hub_models

    return [
        {"model": name, "family": settings["model_type"], "class": settings["architectures"][0]}
        for name, settings in hub_models().items()
    ]


def _studies(results: Path) -> list[dict]:
    return [{"study": stem, "scales": ", ".join(parameters.scales(stem))} for stem in parameters.studies()]


def _runs(results: Path) -> list[dict]:
    return [
        {
            "study": folder.name,
            "run": record["run_id"],
            "experiment": record["config"].get("experiment", ""),
            "status": record["status"],
            "device": record["provenance"]["device"],
            "ended": record["provenance"]["ended"][:19],
        }
        for folder in sorted(path for path in results.glob("*") if path.is_dir())
        for record in runs.read_records(folder)
    ]


_LISTINGS = {
    Listing.variants: _variants,
    Listing.techniques: _techniques,
    Listing.datasets: _datasets,
    Listing.gpus: _gpus,
    Listing.models: _models,
    Listing.studies: _studies,
    Listing.runs: _runs,
}


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
    (runs.ROOT / "build").mkdir(exist_ok=True)
    try:
        papermill.execute_notebook(
            runs.ROOT / "notebooks" / f"{stem}.ipynb",
            runs.ROOT / "build" / f"{stem}.ipynb",
            parameters=values,
            cwd=runs.ROOT / "notebooks",
            kernel_name="python3",
            progress_bar=progress and sys.stderr.isatty(),
            stderr_file=sys.stderr,
            extra_arguments=["--log-level=50"],
        )
    except papermill.PapermillExecutionError as error:
        typer.echo(f"{stem}, cell {error.exec_count}: {error.ename}: {error.evalue}", err=True)
        return error.ename
    return ""


if __name__ == "__main__":
    app()
