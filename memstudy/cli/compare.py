"""``memstudy compare``: a step's memory and time for sets of techniques on several GPUs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from memstudy.cli.answers import WIDTH, as_dict, readable, tokens_per_s
from memstudy.cli.asked import Asked, Batch, about_a_step

if TYPE_CHECKING:
    from memstudy.profiler import Gpu, MemoryReport
    from memstudy.trainers.hub_model import HubModelRun


@dataclass(frozen=True)
class Cell:
    """A step of ``run`` on ``card``; without a ``report``, ``refused`` says why it cannot run there."""

    run: HubModelRun
    card: Gpu
    report: MemoryReport | None
    refused: str = ""

    @property
    def name(self) -> str:
        """The techniques and the GPU, in words."""
        return f"{', '.join(self.run.techniques) or 'no technique'} on {self.card.name}"

    @property
    def speed(self) -> float:
        """Tokens per second; 0 if the step does not fit or its time is not predicted."""
        fits = self.report is not None and self.report.out_of_memory is None
        return tokens_per_s(self.report.time, self.run) if fits and self.report.time else 0.0


@about_a_step
def compare(
    asked: Asked,
    batch: Batch,
    gpu: Annotated[
        str, typer.Option(help="Names from `memstudy list gpus`, or .yaml files, comma-separated: the columns.")
    ],
    technique: Annotated[
        list[str] | None,
        typer.Option(help="Names as in `memstudy predict`, comma-separated: a row. Repeat it for more rows."),
    ] = None,
) -> None:
    """Compare GPUs, and sets of techniques, by memory and step time. Both are predicted; nothing is run.

    \b
    memstudy compare --model gpt2-xl --batch 8 --seq-len 1024 \\
        --gpu RTX4090,A100-80GB --technique bf16 --technique bf16,checkpointing

    A row for each --technique, after one without any; a column for each GPU. A cell has the memory of the whole GPU,
    the step time with its band (fast to slow hosts, and the error of the GPU's calibration) and tokens per second. For
    a GPU described without its speed, it has the memory alone. Exit status 0 whether or not anything fits.
    """
    from rich.console import Console

    from memstudy.profiler import find_gpu

    names = [name.strip() for name in gpu.split(",") if name.strip()]
    if not names:
        raise ValueError("compare needs at least one GPU: give --gpu, such as T4,RTX4090")
    cards = [find_gpu(name) for name in dict.fromkeys(names)]
    rows = [replace(asked, technique=text) for text in dict.fromkeys(["", *(technique or [])])]
    steps = [(row.run(batch, row.techniques), card) for row in rows for card in cards]
    cells = []
    with Console(stderr=True).status("") as status:
        for run, card in steps:
            status.update(f"{len(cells) + 1} of {len(steps)}: {', '.join(run.techniques)} on {card.name}")
            cells.append(_predicted(run, card, expandable_segments=asked.expandable_segments))
    if asked.as_json:
        typer.echo(json.dumps([_as_dict(cell) for cell in cells], indent=2))
    else:
        _show(cells, len(cards))


def _predicted(run: HubModelRun, card: Gpu, **options) -> Cell:
    from memstudy.attention import Unavailable

    try:
        report = run.foretell(card, **options)
    except Unavailable as error:  # on this GPU, or without a package
        return Cell(run, card, None, str(error))
    return Cell(run, card, report)


def _as_dict(cell: Cell) -> dict:
    if cell.report is None:
        return {"run": dict(cell.run), "device": cell.card.name, "kind": "predicted", "unavailable": cell.refused}
    return as_dict(cell.report, cell.run)


def _text(cell: Cell) -> str:
    """What the table has of ``cell``: memory, step time, its band, tokens per second, a line each."""
    if cell.report is None:
        return "[dim]not here[/]"
    needed = readable(cell.report.whole_gpu_mib)
    fits = cell.report.out_of_memory is None
    lines = [f"[green]fits: {needed}[/]" if fits else f"[red]no: {needed}[/]"]
    if cell.report.time:
        time, _, band = str(cell.report.time).partition(" (")
        speed = f"{tokens_per_s(cell.report.time, cell.run):,.0f} tokens/s"
        lines += [f"[bold]{time}[/]" if fits else time, f"[dim]{band.rstrip(')')}[/]", speed]
    return "\n".join(lines)


def _show(cells: list[Cell], n_cards: int) -> None:
    """Print the table of ``cells``, which come row by row, and what it leaves out."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    run = cells[0].run
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    where = f", each of {run.processes} GPUs" if run.processes > 1 else ""
    title = f"{run.model}, {run.batch_size} × {run.seq_len} tokens: a training step{where}, predicted"
    table = Table("techniques", box=SIMPLE, title=title, show_lines=True)
    for cell in cells[:n_cards]:
        table.add_column(f"{cell.card.name}\n[dim]{readable(cell.card.memory_mib)}[/]", justify="right")
    for start in range(0, len(cells), n_cards):
        row = cells[start : start + n_cards]
        table.add_row("\n".join(row[0].run.techniques) or "none", *map(_text, row))
    console.print(table)
    best = max(cells, key=lambda cell: cell.speed)
    if best.speed:
        console.print(f"fastest that fits: {best.name}, {best.speed:,.0f} tokens/s", soft_wrap=True)
    for note in _notes(cells):
        console.print(note, soft_wrap=True, markup=False)


def _notes(cells: list[Cell]) -> list[str]:
    """What the table does not say: why a step cannot run, what the times leave out, what is not checked."""
    reports = [cell.report for cell in cells if cell.report]
    untimed = sorted({kind for report in reports if report.time for kind in report.time.untimed})
    unverified = sorted({op for report in reports for op in report.unverified})
    notes = [f"{cell.name}: {cell.refused}" for cell in cells if cell.refused]
    notes += [f"not in the times: {', '.join(untimed)}"] * bool(untimed)
    return notes + [f"not checked against CUDA, ops taken as on a CPU: {', '.join(unverified)}"] * bool(unverified)
