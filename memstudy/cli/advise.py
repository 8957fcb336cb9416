"""``memstudy advise``: which techniques make a batch fit."""

from __future__ import annotations

import json
from functools import partial

import typer

from memstudy.cli.answers import WIDTH, duration, readable, time_as_dict
from memstudy.cli.asked import Asked, Batch, Budget, Keep, about_a_step


@about_a_step
def advise(asked: Asked, batch: Batch, budget_mib: Budget = None, keep: Keep = None) -> None:
    """Find the techniques that make a batch fit, those that change least first.

    memstudy advise --model llama-3-8b --gpu RTX4090 --batch 8 --seq-len 2048

    Techniques are added until the step is predicted to fit: first those that keep the arithmetic exact, then gradient
    accumulation in more and more parts, techniques that change the arithmetic, adapters, which train few weights, and
    4-bit weights beside them. What changes as much comes fastest first: on a GPU by the step time predicted for your
    model with each technique alone; on this CPU, and for a GPU described without its speed, by the memory ablation's
    reference rows, of another model. Exit status 0 whether or not anything fits.
    """
    from memstudy.profiler.search import check_budget
    from memstudy.studies.ablation import advice
    from memstudy.studies.ablation.reference import reference

    if (asked.gpu is None) == (budget_mib is None):
        raise ValueError("advise needs one budget: give --gpu, or --budget-mib for this CPU")
    if asked.gpu is None:
        check_budget(budget_mib)
    asked.run(batch, asked.techniques)  # refuses impossible choices before the search
    elsewhere = None if asked.is_timed else reference()
    rungs = advice.climb(
        asked.alone(batch),
        partial(asked.takes, batch),
        start=asked.techniques,
        parts_of=batch // asked.processes,
        keep=keep,
    )
    tried, times = {}, {}

    def fits(rung: tuple[str, ...]) -> bool:
        report, run = asked.report(batch, rung), asked.run(batch, rung)
        needed = report.peak_allocated_mib if asked.gpu is None else report.whole_gpu_mib
        measured = elsewhere and elsewhere.time_ratio(rung)
        tried[rung] = {
            "techniques": rung,
            "needed_mib": needed,
            "fits": needed <= budget_mib if asked.gpu is None else report.out_of_memory is None,
            "time": time_as_dict(report, run),
            "measured_time_ratio": measured,
            "same_result": asked.result(rung),
            "effective_batch": batch,
            "accumulation": run.accumulation,
        }
        times[rung] = duration(report.time) if report.time else f"{measured:.2f} ×" if measured else ""
        return tried[rung]["fits"]

    found = advice.first_that_fits(rungs, fits)
    climbed = [rung for rung in rungs[: None if found is None else found + 1] if rung in tried]
    if asked.as_json:
        typer.echo(json.dumps([tried[rung] for rung in climbed], indent=2))
        return
    _show([tried[rung] for rung in climbed], [times[rung] for rung in climbed], asked.gpu or "this CPU")
    if elsewhere:
        typer.echo(f"step time: relative to no technique, measured on {elsewhere.device} (ablation's model)")
    if found is None:
        typer.echo("nothing fits: take a shorter sequence, a smaller model or a larger GPU")
        return
    parts = tried[rungs[found]]["accumulation"]
    typer.echo(f"fits: --technique {','.join(rungs[found])}" if rungs[found] else "fits as it is")
    typer.echo(f"effective batch {batch}: {parts} × {batch // parts}")


def _show(climbed: list[dict], times: list[str], where: str) -> None:
    """Print the rungs tried, and the ``times`` of their steps."""
    from rich.console import Console
    from rich.table import Table

    table = Table("techniques", "needs", "step time", "same result", box=None, title=f"on {where}, predicted")
    for column in (1, 2):
        table.columns[column].justify = "right"
    for row, time in zip(climbed, times, strict=True):
        names = ", ".join(row["techniques"]) or "none"
        table.add_row(names, readable(row["needed_mib"]), time, row["same_result"], style="bold" * row["fits"])
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    console.print(table)
