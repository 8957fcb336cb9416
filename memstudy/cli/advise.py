"""``memstudy advise``: which techniques make a batch fit."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import typer

from memstudy.cli.answers import WIDTH, readable, time_as_dict
from memstudy.cli.asked import Batch, Budget, Keep, about_a_step
from memstudy.cli.of_lengths import AskedOfTraining


@about_a_step
def advise(asked: AskedOfTraining, batch: Batch, budget_mib: Budget = None, keep: Keep = None) -> None:
    """Find techniques that make a batch fit. Those that change least come first.

    \b
    memstudy advise --model llama-3-8b --gpu RTX4090 --batch 8 --seq-len 2048
    memstudy advise --model llama-3-8b --gpu RTX4090 --batch 8 \\
        --lengths lengths.csv

    Techniques are added until the step is predicted to fit: first those that keep the arithmetic exact, then gradient
    accumulation in more and more parts, techniques that change the arithmetic, adapters, which train few weights, and
    4-bit weights beside them. What changes as much comes fastest first: on a GPU by the step time predicted for your
    model with each technique alone; on this CPU, and for a GPU described without its speed, by the memory ablation's
    reference rows, of another model. On a GPU, techniques that are needless beside later ones are then left out again,
    and accumulation takes fewer parts, where that is predicted to save time and still fits: the last line.

    With --lengths or --dataset, all steps of an epoch have to fit. The batches come first: as asked, grouped by length,
    without padding, and packed to --seq-len or the longest text; then techniques, for the batches that need least. Exit
    status 0 whether or not anything fits.
    """
    from memstudy.profiler.search import check_budget
    from memstudy.studies.ablation import advice
    from memstudy.studies.ablation.reference import reference

    if (asked.gpu is None) == (budget_mib is None):
        raise ValueError("advise needs one budget: give --gpu, or --budget-mib for this CPU")
    if asked.gpu is None:
        check_budget(budget_mib)
    asked.run(batch, asked.techniques)  # refuses impossible choices before the search
    ways: list[dict] = []
    if asked.of_lengths:
        asked, ways = _ways_to_batch(asked, batch, budget_mib, keep)
        if any(way["fits"] for way in ways):
            _finish(asked, batch, ways, [""] * len(ways))
            return
    elsewhere = None if asked.is_timed or asked.of_lengths else reference()
    figures = asked.estimates(batch)
    alone = asked.alone(batch, figures)
    rungs = advice.climb(
        alone,
        partial(asked.takes, batch),
        start=asked.techniques,
        parts_of=1 if asked.of_lengths else batch // asked.processes,
        keep=keep,
    )
    tried, times = {}, {}
    if ways:
        tried[asked.techniques], times[asked.techniques] = min(ways, key=_needed), ""

    def fits(rung: tuple[str, ...]) -> bool:
        if rung in tried:
            return tried[rung]["fits"]
        if asked.of_lengths:
            tried[rung], times[rung] = _epoch(asked, batch, rung, budget_mib), ""
            return tried[rung]["fits"]
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
        times[rung] = str(report.time) if report.time else f"{measured:.2f} ×" if measured else ""
        return tried[rung]["fits"]

    def likely(rung: tuple[str, ...], slack: float = 1.0) -> bool:
        return figures(rung)[1] <= slack * asked.card().memory_mib

    searched = figures and not asked.of_lengths
    found = advice.first_that_fits(rungs, fits, likely if searched else None)
    climbed = [rung for rung in rungs[: None if found is None else found + 1] if rung in tried]
    if found and searched:
        slow = [text for text in rungs[found] if alone.times.get(text, 0) > 1 or text.startswith("accumulation=")]
        loose = [text for text in slow if text not in asked.techniques]
        # Few layers understate the memory of all: the peak is the largest of several sums that are linear in layers.
        quickest = advice.quickest(
            rungs[found],
            loose,
            lambda rung: figures(rung)[0],
            lambda rung: likely(rung, slack=1.1) and fits(rung),
        )
        climbed = list(dict.fromkeys([*climbed, quickest]))
    if ways:
        climbed = [rung for rung in climbed if rung != asked.techniques]  # among the ways already
    answers = ways + [tried[rung] for rung in climbed]
    lasted = [""] * len(ways) + [times[rung] for rung in climbed]
    note = elsewhere and f"step time: relative to no technique, measured on {elsewhere.device} (ablation's model)"
    _finish(asked, batch, answers, lasted, note)


def _needed(answer: dict) -> float:
    return answer["needed_mib"]


def _ways_to_batch(
    asked: AskedOfTraining, batch: int, budget_mib: float | None, keep: str | None
) -> tuple[AskedOfTraining, list[dict]]:
    """Answers for each way of making batches until one fits, and the options of that or of the one that needs least.

    Batches without padding take flash attention where the GPU and the number format have it: other attention gets a
    mask of all pairs of tokens instead.
    """
    from memstudy.techniques import parse

    card = asked.card()
    has_flash = card is not None and card.compute_capability >= (8, 0)
    half = any(technique.in_bf16 for technique in parse(asked.techniques))
    attention = "flash" if has_flash and half else asked.attention
    ways = [asked, replace(asked, padding_free=True, attention=attention)]
    if keep != "exact":
        ways.insert(1, replace(asked, sampler="grouped"))
        ways.append(replace(asked, sampler="packed", attention=attention))
    answers: list[dict] = []
    for way in dict.fromkeys(ways):
        answers.append(_epoch(way, batch, asked.techniques, budget_mib))
        if answers[-1]["fits"]:
            return way, answers
    return [*dict.fromkeys(ways)][min(range(len(answers)), key=lambda place: _needed(answers[place]))], answers


def _epoch(asked: AskedOfTraining, batch: int, techniques: tuple[str, ...], budget_mib: float | None) -> dict:
    """The answer for all steps of an epoch, as JSON values."""
    report = asked.epoch(batch, techniques)
    needed = report.peak_allocated_mib if asked.gpu is None else report.whole_gpu_mib
    same = asked.result(techniques)
    if asked.sampler in ("grouped", "packed") and same == "yes":
        same = "other batches" if asked.sampler == "packed" else "other order"
    return {
        "techniques": techniques,
        "batches": asked.how,
        "padded_share": asked.padding(batch),
        "needed_mib": needed,
        "fits": needed <= budget_mib if asked.gpu is None else not report.refused,
        "steps_out_of_memory": len(report.refused),
        "steps": len(report.shapes),
        "same_result": same,
        "effective_batch": batch,
        "accumulation": 1,
    }


def _finish(asked: AskedOfTraining, batch: int, answers: list[dict], times: list[str], note: str | None = None) -> None:
    """Print the answers, in order of the search, a ``note`` on them, and the last one's options if it fits."""
    if asked.as_json:
        typer.echo(json.dumps(answers, indent=2))
        return
    _show(answers, times, asked.gpu or "this CPU")
    if note:
        typer.echo(note)
    if not answers[-1]["fits"]:
        typer.echo("nothing fits: take a shorter sequence, a smaller model or a larger GPU")
        return
    options = [f"--technique {','.join(answers[-1]['techniques'])}"] if answers[-1]["techniques"] else []
    options += [asked.options] if asked.of_lengths and asked.options else []
    typer.echo(f"fits: {' '.join(options)}" if options else "fits as it is")
    parts = answers[-1]["accumulation"]
    typer.echo(f"effective batch {batch}: {parts} × {batch // parts}")


def _show(answers: list[dict], times: list[str], where: str) -> None:
    """Print the answers tried, and the ``times`` of their steps."""
    from rich.console import Console
    from rich.table import Table

    of_lengths = "batches" in answers[0]
    columns = ["batches", "padding", "techniques", "needs"] if of_lengths else ["techniques", "needs", "step time"]
    table = Table(*columns, "same result", box=None, title=f"on {where}, predicted")
    for column in table.columns[1:-1]:
        column.justify = "left" if column.header == "techniques" else "right"
    for row, time in zip(answers, times, strict=True):
        cells = [", ".join(row["techniques"]) or "none", readable(row["needed_mib"])]
        cells = [row["batches"], f"{100 * row['padded_share']:.1f} %", *cells] if of_lengths else [*cells, time]
        table.add_row(*cells, row["same_result"], style="bold" * row["fits"])
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    console.print(table)
