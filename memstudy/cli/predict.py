"""The commands ``predict``, ``fit`` and ``advise``: what a model will take on a GPU that is not here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from memstudy.cli.answers import as_dict, fit_row, readable, show, verdict
from memstudy.cli.errors import one_line

if TYPE_CHECKING:
    from memstudy.profiler import Fit, MemoryReport
    from memstudy.trainers.hub_model import HubModelRun

Model = Annotated[str, typer.Option(help="A name of `memstudy list models`, or the path of a config.json.")]
Batch = Annotated[int, typer.Option(help="Sequences in one update.", min=1, max=2**31)]
SeqLen = Annotated[int, typer.Option(help="Tokens in a sequence.", min=2, max=2**31)]
GpuName = Annotated[str | None, typer.Option("--gpu", help="`memstudy list gpus`, or a .yaml file; else this CPU.")]
Budget = Annotated[float | None, typer.Option(help="Budget [MiB] instead of the whole GPU; needed without --gpu.")]
Techniques = Annotated[str, typer.Option("--technique", help="Comma-separated names of `memstudy list techniques`.")]
Optimizer = Annotated[str, typer.Option(help="adamw (fused), adamw_torch (foreach), adafactor, sgd, ...")]
Task = Annotated[str, typer.Option(help="lm (what the model was pretrained for) or classification.")]
Attention = Annotated[str, typer.Option(help="sdpa (PyTorch's fused kernels) or eager.")]
Expandable = Annotated[bool, typer.Option("--expandable-segments", help="As PYTORCH_ALLOC_CONF sets it.")]
Processes = Annotated[
    int, typer.Option(help="GPUs that share the batch, by DDP or by technique fsdp.", min=1, max=4096)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def predict(
    model: Model,
    batch: Batch,
    seq_len: SeqLen,
    gpu: GpuName = None,
    technique: Techniques = "",
    optimizer: Optimizer = "adamw",
    task: Task = "lm",
    attention: Attention = "sdpa",
    expandable_segments: Expandable = False,
    processes: Processes = 1,
    as_json: Json = False,
) -> None:
    """Say what training a model takes, and whether it fits; nothing is run.

    memstudy predict --model bert-base-uncased --batch 16 --seq-len 128 --technique bf16,checkpointing --gpu T4\n
    memstudy predict --model gpt2-xl --batch 32 --seq-len 512 --technique fsdp,bf16 --processes 8 --gpu RTX4090

    The step is Hugging Face Trainer's own, followed on tensors without bytes. Exit status 0 whether it fits or not.
    """
    with _one_line():
        run = _plan(
            model=model, batch_size=batch, seq_len=seq_len, techniques=_split(technique), optimizer=optimizer,
            task=task, attention=attention, processes=processes,
        )  # fmt: skip
        report = _report(run, gpu, expandable_segments)
    if as_json:
        typer.echo(json.dumps(as_dict(report, run), indent=2))
    else:
        show(report, processes)


def fit(
    model: Model,
    seq_len: SeqLen,
    gpu: GpuName = None,
    budget_mib: Budget = None,
    effective_batch: Annotated[
        int | None,
        typer.Option(help="Sequences in one update; the batch divides it and is accumulated.", min=1, max=2**31),
    ] = None,
    technique: Techniques = "",
    optimizer: Optimizer = "adamw",
    task: Task = "lm",
    attention: Attention = "sdpa",
    expandable_segments: Expandable = False,
    processes: Processes = 1,
    advise: Annotated[bool, typer.Option("--advise", help="When nothing fits, say what to add.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Run the batch that is found, here on this CPU.")] = False,
    as_json: Json = False,
) -> None:
    """Find the largest batch that fits, by prediction.

    memstudy fit --model gpt2-large --seq-len 1024 --gpu RTX4090 --effective-batch 64 --advise

    With --advise, techniques are added one after another, cheapest in step time first, until a batch fits; `memstudy
    advise` does that for a batch that shall stay. With --verify (without --gpu) the batch is run here, and the
    answer is a tested one. Exit status 0 whether one fits or not.
    """
    with _one_line():
        from memstudy.studies.ablation.advice import first_that_fits

        if verify and gpu is not None:
            raise ValueError("--verify runs on this CPU: leave --gpu out and give --budget-mib")
        if verify and processes > 1:
            raise ValueError("--verify runs in one process: leave --processes out")
        if gpu is None and budget_mib is None:
            raise ValueError("fit needs a budget: give --gpu, or --budget-mib for this CPU")
        chosen = _split(technique)
        if any(text.partition("=")[0] == "accumulation" for text in chosen):
            raise ValueError("accumulation follows from the batch that fits: give --effective-batch instead")
        plan = {
            "model": model, "seq_len": seq_len, "techniques": chosen, "optimizer": optimizer, "task": task,
            "attention": attention, "processes": processes,
        }  # fmt: skip
        tried: dict[tuple[str, ...], Fit] = {}

        def search(techniques: tuple[str, ...], **options) -> bool:
            tried[techniques] = _fit(
                plan | {"techniques": techniques}, gpu, budget_mib, effective_batch, expandable_segments, **options
            )
            return tried[techniques].batch_size > 0

        rungs = [chosen]
        if not search(chosen, verify=verify) and advise:
            more = _additions(plan, gpu, effective_batch)
            place = first_that_fits(more, partial(search, limit=processes))  # the least batch
            rungs += more if place is None else more[: place + 1]
            if place is not None:
                search(more[place], verify=verify)
        steps = [(rung, tried[rung]) for rung in rungs if rung in tried]
    if as_json:
        typer.echo(json.dumps([fit_row(techniques, found) for techniques, found in steps], indent=2))
        return
    for techniques, found in steps:
        typer.echo(f"{', '.join(techniques) or 'no technique'}: {verdict(found)}")
    if steps[-1][1].batch_size:
        show(steps[-1][1].report, processes)
    elif not advise:
        typer.echo("--advise says which techniques to add")


def advise(
    model: Model,
    batch: Batch,
    seq_len: SeqLen,
    gpu: GpuName = None,
    budget_mib: Budget = None,
    technique: Techniques = "",
    optimizer: Optimizer = "adamw",
    task: Task = "lm",
    attention: Attention = "sdpa",
    expandable_segments: Expandable = False,
    processes: Processes = 1,
    as_json: Json = False,
) -> None:
    """Say which techniques make a batch fit, the quickest that do.

    memstudy advise --model gpt2-large --gpu RTX4090 --batch 32 --seq-len 1024

    Techniques are added in the order of their step times in the memory ablation's reference rows, until the step is
    predicted to fit; then the batch is run in ever more parts. Which change the arithmetic is said. The time is that of
    the ablation's model on the machine of the rows, so on a GPU it is a hint. Exit status 0 whether anything fits or
    not.
    """
    from rich.console import Console
    from rich.table import Table

    from memstudy import techniques
    from memstudy.profiler.search import check_budget
    from memstudy.studies.ablation import advice

    with _one_line():
        if (gpu is None) == (budget_mib is None):
            raise ValueError("advise needs one budget: give --gpu, or --budget-mib for this CPU")
        if gpu is None:
            check_budget(budget_mib)
        plan = {
            "model": model, "batch_size": batch, "seq_len": seq_len, "optimizer": optimizer, "task": task,
            "attention": attention, "processes": processes,
        }  # fmt: skip
        _plan(**plan, techniques=_split(technique))
        rows = advice.reference()
        rungs = advice.reference_ladder(rows, _levers(plan, gpu), start=_split(technique))
        rungs += advice.in_more_parts(rungs[-1], batch)
        tried = {}

        def fits(rung: tuple[str, ...]) -> bool:
            report = _report(_plan(**plan, techniques=rung), gpu, expandable_segments)
            needed = report.peak_allocated_mib if gpu is None else report.whole_gpu_mib
            row = rows.get(frozenset(rung))
            tried[rung] = {
                "techniques": rung,
                "needed_mib": needed,
                "fits": needed <= budget_mib if gpu is None else report.out_of_memory is None,
                "time": row and row["metrics"]["step_time_ms"] / rows[frozenset()]["metrics"]["step_time_ms"],
                "exact": all(lever.exact for lever in techniques.parse(rung)),
            }
            return tried[rung]["fits"]

        found = advice.first_that_fits(rungs, fits)
        climbed = [tried[rung] for rung in rungs[: None if found is None else found + 1] if rung in tried]
    if as_json:
        typer.echo(json.dumps(climbed, indent=2))
        return
    table = Table(
        "techniques", "needs", "step time", "same result", box=None, title=f"on {gpu or 'this CPU'}, predicted"
    )
    for column in (1, 2):
        table.columns[column].justify = "right"
    for row in climbed:
        time = "" if row["time"] is None else f"{row['time']:.2f} ×"
        names = ", ".join(row["techniques"]) or "none"
        table.add_row(
            names, readable(row["needed_mib"]), time, "yes" if row["exact"] else "no", style="bold" * row["fits"]
        )
    console = Console(highlight=False)
    console.print(table)
    device = rows[frozenset()]["provenance"]["device"]
    console.print(f"step time: against no technique, measured on {device} with the ablation's model", soft_wrap=True)
    if found is None:
        console.print("nothing fits: take a shorter sequence, a smaller model or a larger GPU", soft_wrap=True)
    else:
        rung = rungs[found]
        console.print(f"fits: --technique {','.join(rung)}" if rung else "fits as it is", soft_wrap=True)


def _fit(plan, gpu, budget_mib, effective_batch, expandable_segments, *, limit=None, verify=False) -> Fit:
    from rich.console import Console

    from memstudy.profiler import find_gpu, measure
    from memstudy.profiler import fit as largest_fit
    from memstudy.profiler.search import LIMIT

    card = gpu and find_gpu(gpu)

    def build_for_batch(size: int):
        whole = effective_batch or size
        parts = (f"accumulation={whole // size}",) if whole > size else ()
        run = _plan(**plan | {"batch_size": whole, "techniques": (*plan["techniques"], *parts)})
        status.update(f"{plan['model']}: batch {size}, {', '.join(plan['techniques']) or 'no technique'}")
        return run.build(gpu=card, parts=2)

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
            expandable_segments=expandable_segments,
            processes=plan["processes"],
            limit=limit or LIMIT,
            run=run_batch if verify else None,
        )


def _levers(plan: dict, gpu: str | None) -> list[str]:
    """The levers that the memory ablation advises, those that suit the model and can be had."""
    from memstudy import techniques
    from memstudy.attention import Unavailable
    from memstudy.profiler import find_gpu
    from memstudy.studies.ablation import advice

    card = gpu and find_gpu(gpu)

    def there(text: str) -> bool:
        try:
            techniques.check_available(techniques.parse((text,)), capability=card and card.compute_capability)
        except Unavailable as error:
            typer.echo(f"not advised: {error}", err=True)
            return False
        return True

    choices = {name: value for name, value in plan.items() if name != "techniques"}
    return [text for text in advice.suited(advice.advised(), **choices) if there(text)]


def _additions(plan: dict, gpu: str | None, effective_batch: int | None) -> list[tuple[str, ...]]:
    """Ever longer lists of techniques, the quickest first."""
    from memstudy.studies.ablation import advice

    # A batch of 1 shall do, and is accumulated to the effective batch.
    batch = effective_batch or 1
    parts = (f"accumulation={batch}",) if batch > 1 else ()
    levers = _levers(plan | {"batch_size": batch, "seq_len": 2}, gpu)
    rungs = advice.reference_ladder(advice.reference(), levers, start=(*plan["techniques"], *parts))
    return [tuple(text for text in rung if text not in parts) for rung in rungs[1:]]


def _split(techniques: str) -> tuple[str, ...]:
    return tuple(text.strip() for text in techniques.split(",") if text.strip())


def _plan(**choices) -> HubModelRun:
    from memstudy.trainers.hub_model import HubModelRun

    return HubModelRun(experiment="forecast", **choices)


def _report(run: HubModelRun, gpu: str | None, expandable_segments: bool) -> MemoryReport:
    from rich.console import Console

    from memstudy.profiler import find_gpu

    card = gpu and find_gpu(gpu)
    with Console(stderr=True).status(f"following two steps of {run.model} on tensors without bytes"):
        return run.foretell(card, expandable_segments=expandable_segments)


@contextmanager
def _one_line() -> Iterator[None]:
    """As `one_line`, also for what the machine or the GPU cannot do, and for tensors that no number can size."""
    from memstudy.cli.quick_imports import import_step

    import_step()
    from memstudy.attention import Unavailable

    with one_line():
        try:
            yield
        except Unavailable as error:
            raise ValueError(str(error)) from None
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            raise ValueError("a tensor would have more than 2^63 bytes: take a smaller batch or sequence") from None
