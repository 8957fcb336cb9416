"""``memstudy fit``: the largest batch that fits, by prediction."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from memstudy.cli.answers import fit_row, show, verdict
from memstudy.cli.asked import Asked, Budget, about_a_step

if TYPE_CHECKING:
    from memstudy.profiler import Fit


@about_a_step
def fit(
    asked: Asked,
    budget_mib: Budget = None,
    effective_batch: Annotated[
        int | None,
        typer.Option(help="Sequences per update; the batch found divides it, by accumulation.", min=1, max=2**31),
    ] = None,
    advise: Annotated[bool, typer.Option("--advise", help="If nothing fits, find techniques to add.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Run the batch found on this CPU, as a test.")] = False,
) -> None:
    """Find the largest batch that fits, by prediction.

    memstudy fit --model gpt2-large --seq-len 1024 --gpu RTX4090 --effective-batch 64 --advise

    With --advise, techniques are added one by one, fastest step first, until a batch fits; for a batch of your own
    choice, use `memstudy advise`. With --verify (only without --gpu), the batch found is run on this CPU and reported
    as tested. Exit status 0 whether or not a batch fits.
    """
    from memstudy.studies.ablation.advice import first_that_fits

    if verify and asked.gpu is not None:
        raise ValueError("--verify runs on this CPU: leave --gpu out and give --budget-mib")
    if verify and asked.processes > 1:
        raise ValueError("--verify runs in one process: leave --processes out")
    if asked.gpu is None and budget_mib is None:
        raise ValueError("fit needs a budget: give --gpu, or --budget-mib for this CPU")
    chosen = asked.techniques
    if any(text.partition("=")[0] == "accumulation" for text in chosen):
        raise ValueError("accumulation follows from the batch that fits: give --effective-batch instead")
    tried: dict[tuple[str, ...], Fit] = {}

    def search(techniques: tuple[str, ...], **options) -> bool:
        tried[techniques] = _search(asked, techniques, budget_mib, effective_batch, **options)
        return tried[techniques].batch_size > 0

    rungs = [chosen]
    if not search(chosen, verify=verify) and advise:
        more = _additions(asked, effective_batch or 1)
        place = first_that_fits(more, partial(search, limit=asked.processes))  # the smallest batch
        rungs += more if place is None else more[: place + 1]
        if place is not None:
            search(more[place], verify=verify)
    steps = [(rung, tried[rung]) for rung in rungs if rung in tried]
    if asked.as_json:
        typer.echo(json.dumps([fit_row(techniques, found) for techniques, found in steps], indent=2))
        return
    for techniques, found in steps:
        typer.echo(f"{', '.join(techniques) or 'no technique'}: {verdict(found)}")
    if steps[-1][1].batch_size:
        show(steps[-1][1].report, asked.processes)
    elif not advise:
        typer.echo("add --advise to find techniques that make a batch fit")


def _search(
    asked: Asked,
    techniques: tuple[str, ...],
    budget_mib: float | None,
    effective_batch: int | None,
    *,
    limit: int | None = None,
    verify: bool = False,
) -> Fit:
    from rich.console import Console

    from memstudy.profiler import fit as largest_fit
    from memstudy.profiler import measure
    from memstudy.profiler.search import LIMIT

    card = asked.card()

    def build_for_batch(size: int):
        whole = effective_batch or size
        parts = (f"accumulation={whole // size}",) if whole > size else ()
        status.update(f"{asked.model}: batch {size}, {', '.join(techniques) or 'no technique'}")
        return asked.run(whole, (*techniques, *parts)).build(gpu=card, parts=2)

    def run_batch(size: int) -> float | None:
        try:
            peak = measure(build_for_batch(size)).peak_allocated_mib
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            return None
        return peak if peak <= budget_mib else None

    with Console(stderr=True).status("predicting") as status:
        return largest_fit(
            build_for_batch,
            gpu=card,
            budget_mib=budget_mib,
            effective_batch=effective_batch,
            expandable_segments=asked.expandable_segments,
            processes=asked.processes,
            limit=limit or LIMIT,
            run=run_batch if verify else None,
        )


def _additions(asked: Asked, batch: int) -> list[tuple[str, ...]]:
    """Growing lists of techniques, fastest first, for a batch of 1 that is accumulated to ``batch``."""
    from memstudy.studies.ablation import advice

    parts = (f"accumulation={batch}",) if batch > 1 else ()
    rungs = advice.reference_ladder(advice.reference(), asked.advised(batch), start=(*asked.techniques, *parts))
    return [tuple(text for text in rung if text not in parts) for rung in rungs[1:]]
