"""``memstudy advise``: which techniques make a batch fit."""

from __future__ import annotations

import json
from functools import partial

import typer

from memstudy.cli.answers import readable
from memstudy.cli.asked import Asked, Batch, Budget, Keep, about_a_step


@about_a_step
def advise(asked: Asked, batch: Batch, budget_mib: Budget = None, keep: Keep = None) -> None:
    """Find the techniques that make a batch fit, those that change least first.

    memstudy advise --model llama-3-8b --gpu RTX4090 --batch 8 --seq-len 2048

    Techniques are added until the step is predicted to fit: first those that keep the arithmetic exact, then gradient
    accumulation in more and more parts, techniques that change the arithmetic, adapters, which train few weights, and
    4-bit weights beside them. Techniques with a measured time come fastest first, by the memory ablation's reference
    rows: another model on another machine, so a hint for a GPU. Exit status 0 whether or not anything fits.
    """
    from memstudy.profiler.search import check_budget
    from memstudy.studies.ablation import advice

    if (asked.gpu is None) == (budget_mib is None):
        raise ValueError("advise needs one budget: give --gpu, or --budget-mib for this CPU")
    if asked.gpu is None:
        check_budget(budget_mib)
    asked.run(batch, asked.techniques)  # refuses impossible choices before the search
    rows = advice.reference()
    rungs = advice.climb(
        rows,
        asked.advised(batch),
        partial(asked.takes, batch),
        start=asked.techniques,
        parts_of=batch // asked.processes,
        keep=keep,
    )
    tried = {}

    def fits(rung: tuple[str, ...]) -> bool:
        report = asked.report(batch, rung)
        needed = report.peak_allocated_mib if asked.gpu is None else report.whole_gpu_mib
        row = rows.get(frozenset(rung))
        tried[rung] = {
            "techniques": rung,
            "needed_mib": needed,
            "fits": needed <= budget_mib if asked.gpu is None else report.out_of_memory is None,
            "time": row and row["metrics"]["step_time_ms"] / rows[frozenset()]["metrics"]["step_time_ms"],
            "same_result": asked.result(rung),
            "effective_batch": batch,
            "accumulation": asked.run(batch, rung).accumulation,
        }
        return tried[rung]["fits"]

    found = advice.first_that_fits(rungs, fits)
    climbed = [tried[rung] for rung in rungs[: None if found is None else found + 1] if rung in tried]
    if asked.as_json:
        typer.echo(json.dumps(climbed, indent=2))
        return
    _show(climbed, asked.gpu or "this CPU", rows[frozenset()]["provenance"]["device"])
    if found is None:
        typer.echo("nothing fits: take a shorter sequence, a smaller model or a larger GPU")
        return
    typer.echo(f"fits: --technique {','.join(rungs[found])}" if rungs[found] else "fits as it is")
    typer.echo(f"effective batch {batch}: {climbed[-1]['accumulation']} × {batch // climbed[-1]['accumulation']}")


def _show(climbed: list[dict], where: str, device: str) -> None:
    """Print the rungs tried; ``device`` is the machine that measured their step times."""
    from rich.console import Console
    from rich.table import Table

    table = Table("techniques", "needs", "step time", "same result", box=None, title=f"on {where}, predicted")
    for column in (1, 2):
        table.columns[column].justify = "right"
    for row in climbed:
        time = "" if row["time"] is None else f"{row['time']:.2f} ×"
        names = ", ".join(row["techniques"]) or "none"
        table.add_row(names, readable(row["needed_mib"]), time, row["same_result"], style="bold" * row["fits"])
    console = Console(highlight=False)
    console.print(table)
    console.print(f"step time: relative to no technique, measured on {device} (ablation's model)", soft_wrap=True)
