"""``memstudy validate``: the predictions against the GPU of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memstudy import records
from memstudy.cli.answers import WIDTH
from memstudy.cli.errors import one_line

if TYPE_CHECKING:
    from memstudy.profiler import Gpu

RUN_SHARE = 3  # time of a run, in times of a prediction


def validate(
    quick: Annotated[bool, typer.Option("--quick", help="A few of the steps, in a minute.")] = False,
    results: Annotated[Path, typer.Option(help="Folder for the record.")] = records.ROOT / "results" / "validation",
) -> None:
    """Compare predictions with this machine's GPU. Runs some 30 training steps, in five minutes.

    memstudy validate --quick

    Each step is predicted, and then run in a fresh process if it is predicted to fit: models, techniques and attention
    variants. CUDA's allocator gives the allocated and the reserved memory, the device its memory in use, and CUDA's
    events the time. The errors are printed and written as one record, GPU-DRIVER-TORCH.json, which can be contributed:
    see docs/tutorials/validate.rst. Run nothing else on the GPU meanwhile.
    """
    import torch

    with one_line():
        if not torch.cuda.is_available():
            raise ValueError(
                "validate measures on a GPU, and PyTorch finds no CUDA device here; to predict one, memstudy predict"
            )
        records.check_writable(results)
    from memstudy.profiler.local import local_gpu
    from memstudy.studies.validation.comparison import write
    from memstudy.studies.validation.run import ask_nvidia_smi

    started, card = records.now(), local_gpu()
    drivers = ask_nvidia_smi("driver_version")
    told = {"driver": drivers[0][0] if drivers else "unknown-driver", "torch": torch.__version__}
    typer.echo(f"{torch.cuda.get_device_name()}, driver {told['driver']}, PyTorch {told['torch']}", err=True)
    if card.speed is None:
        typer.echo("not in the catalogue: memory and context are measured, and times are not predicted", err=True)
    with tempfile.TemporaryDirectory() as folder, one_line():
        card = with_context(card, Path(folder))
        rows = list(compare(card, Path(folder), quick=quick))
    show(rows)
    typer.echo(write(results, rows, card, told, started=started, quick=quick))


def with_context(card: Gpu, folder: Path) -> Gpu:
    """``card``; one that the catalogue lacks with the context that a first step, run here, had."""
    from memstudy import launcher
    from memstudy.profiler import gpus
    from memstudy.studies.validation.run import ValidationRun
    from memstudy.studies.validation.steps import standard_steps

    if card.name in gpus():
        return card
    name, step = next(iter(standard_steps(quick=True).items()))
    record = launcher.spawn(ValidationRun(experiment="context", of=step).model_dump(mode="json"), folder)
    if record["status"] != "ok":
        raise ValueError(f"{name}, the step that shows the context of {card.name}: {record['reason']}")
    told = {"context_mib": record["metrics"]["context_mib"], "context_source": f"measured here on the step {name!r}"}
    return card.model_copy(update=told)


def compare(card: Gpu, folder: Path, *, quick: bool) -> Iterator[dict]:
    """Predict the standard steps, run those that fit, and yield a row for each; ``folder`` is for their records."""
    import yaml
    from tqdm import tqdm

    from memstudy import launcher
    from memstudy.kinds import PredictionRun
    from memstudy.profiler import gpus
    from memstudy.studies.validation.comparison import compared
    from memstudy.studies.validation.run import ValidationRun
    from memstudy.studies.validation.steps import standard_steps

    steps, name = standard_steps(quick=quick), card.name
    if name not in gpus():
        name = str(folder / f"{card.name}.yaml")
        told = card.model_dump(mode="json", exclude={"name"}, exclude_none=True)
        capability = ".".join(map(str, card.compute_capability))
        Path(name).write_text(yaml.safe_dump(told | {"compute_capability": capability}), encoding="utf-8")
    predictions = {
        each: PredictionRun(experiment=each, of=step, gpu=name).model_dump(mode="json") for each, step in steps.items()
    }
    predicted = {}
    with tqdm(total=len(steps) * (1 + RUN_SHARE), unit="part", bar_format="{l_bar}{bar}| {remaining} left") as bar:
        bar.set_description("predicting")
        for each, record in launcher.spawn_together(predictions, folder):
            predicted[each] = record
            bar.update()
        for each, step in steps.items():
            bar.set_description(each)
            measured, foreseen = None, predicted[each]
            if foreseen["status"] == "ok" and foreseen["metrics"]["fits"]:
                run = ValidationRun(experiment=each, of=step)
                measured = launcher.spawn(run.model_dump(mode="json"), folder)
            bar.update(RUN_SHARE)
            yield compared(each, foreseen, measured)


def show(rows: Sequence[dict]) -> None:
    """Print the measured values and the errors of the predictions, and their summary."""
    from rich.console import Console
    from rich.table import Table

    from memstudy.studies.validation.comparison import QUANTITIES, in_band, summary

    heads = [text for name in QUANTITIES for text in (f"{name} [{'ms' if 'time' in name else 'MiB'}]", "error")]
    table = Table("step", *heads, "in band", box=None, title="measured, and the error of the prediction")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        if row["status"] != "ok":
            continue
        cells = []
        for name, metric in QUANTITIES.items():
            error = row["errors_percent"].get(name)
            cells += [f"{row['measured'][metric]:,.1f}", "–" if error is None else f"{error:+.2f} %"]
        table.add_row(row["step"], *cells, {True: "yes", False: "no", None: "–"}[in_band(row)])
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH + 30)
    console.print(table)
    for row in rows:
        if row["status"] != "ok":
            console.print(f"{row['step']}: {row['status']}: {row['reason']}", soft_wrap=True, markup=False)
    metrics = summary(rows)
    for name in QUANTITIES:
        key = name.replace(" ", "_").lower()
        if f"{key}_median_percent" in metrics:
            median, worst = metrics[f"{key}_median_percent"], metrics[f"{key}_worst_percent"]
            console.print(f"{name}: median error {median:.2f} %, worst {worst:.2f} %")
