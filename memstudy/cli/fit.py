"""``memstudy fit``: the largest batch, or the longest sequence, that fits, by prediction."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from memstudy.cli.answers import Answer, show
from memstudy.cli.asked import Asked, Budget, Keep, about_a_step
from memstudy.cli.of_lengths import AskedOfAny, show_epoch

if TYPE_CHECKING:
    from memstudy.profiler import Gpu, LengthsReport, MemoryReport
    from memstudy.trainers.hub_model import HubModelRun


@about_a_step
def fit(
    asked: AskedOfAny,
    budget_mib: Budget = None,
    search: Annotated[
        Literal["batch", "seq-len"],
        typer.Option(
            help="seq-len: the longest sequence up to --seq-len, or text up to --prompt and --generate, one per "
            "batch, in steps of 8 tokens."
        ),
    ] = "batch",
    effective_batch: Annotated[
        int | None,
        typer.Option(help="Sequences per update; the batch found divides it, by accumulation.", min=1, max=2**31),
    ] = None,
    advise: Annotated[bool, typer.Option("--advise", help="If nothing fits, find techniques to add.")] = False,
    keep: Keep = None,
    verify: Annotated[bool, typer.Option("--verify", help="Run the batch found on this CPU, as a test.")] = False,
) -> None:
    """Find the largest batch that fits, by prediction.

    \b
    memstudy fit --model gpt2-large --seq-len 1024 --gpu RTX4090 \\
        --effective-batch 64 --advise
    memstudy fit --model qwen2.5-7b --gpu RTX4090 \\
        --prompt 30720 --generate 2048 --search seq-len
    memstudy fit --model gpt2-large --gpu RTX4090 --lengths lengths.csv

    With --lengths or --dataset, the largest batch with which all steps of an epoch fit. With --advise, techniques are
    added one by one, those that change least first, in the order of `memstudy advise`, until a batch fits; for a batch
    of your own choice, use that command. With --verify (only without --gpu), the batch found is run on this CPU and
    reported as tested. Exit status 0 whether or not a batch fits.
    """
    from memstudy.studies.ablation.advice import first_that_fits

    _check(asked, budget_mib, search, verify, effective_batch)
    if asked.generate and (advise or effective_batch):
        raise ValueError("--advise and --effective-batch are for training: leave --generate out")
    sought = _Search(asked, budget_mib, search, effective_batch, verify)
    tried: dict[tuple[str, ...], Answer] = {}

    def fits(techniques: tuple[str, ...], *, smallest: bool = False) -> bool:
        tried[techniques] = sought.answer(techniques, smallest=smallest)
        return tried[techniques].fits

    rungs = [asked.techniques]
    if not fits(asked.techniques) and advise:
        more = _additions(asked, effective_batch or asked.processes, keep)
        place = first_that_fits(more, partial(fits, smallest=True)) if more else None
        rungs += more if place is None else more[: place + 1]
        if place is not None:
            fits(more[place])
    answers = [tried[rung] for rung in rungs if rung in tried]
    if asked.as_json:
        typer.echo(json.dumps([answer.row() for answer in answers], indent=2))
        return
    for answer in answers:
        typer.echo(answer.line(search))
    if answers[-1].fits and asked.of_lengths:
        show_epoch(asked, answers[-1].batch_size, answers[-1].found.report)
    elif answers[-1].fits:
        show(answers[-1].found.report, sought.run(answers[-1]))
    elif not advise:
        typer.echo("add --advise to find techniques that make a batch fit")


def _check(asked: AskedOfAny, budget_mib: float | None, search: str, verify: bool, effective_batch: int | None) -> None:
    """Raise ValueError for options that exclude each other."""
    from memstudy.profiler.search import STEP_TOKENS

    if verify and asked.gpu is not None:
        raise ValueError("--verify runs on this CPU: leave --gpu out and give --budget-mib")
    if verify and asked.processes > 1:
        raise ValueError("--verify runs in one process: leave --processes out")
    if asked.gpu is None and budget_mib is None:
        raise ValueError("fit needs a budget: give --gpu, or --budget-mib for this CPU")
    if any(text.partition("=")[0] == "accumulation" for text in asked.techniques):
        raise ValueError("accumulation follows from the batch that fits: give --effective-batch instead")
    if asked.of_lengths and (search == "seq-len" or verify or effective_batch):
        raise ValueError("--lengths and --dataset look for a batch: leave --search, --verify and --effective-batch out")
    tokens = asked.prompt or asked.seq_len
    if search == "seq-len" and tokens < STEP_TOKENS:
        raise ValueError(f"{tokens} tokens: --search seq-len looks for multiples of {STEP_TOKENS} up to them")


@dataclass(frozen=True)
class _Search:
    """A search for the largest batch, or for the longest sequence with one in each process's batch."""

    asked: AskedOfAny
    budget_mib: float | None
    over: str
    effective_batch: int | None
    verify: bool

    def answer(self, techniques: tuple[str, ...], *, smallest: bool) -> Answer:
        """The largest that fits with ``techniques``; ``smallest`` tries the smallest size alone."""
        from rich.console import Console

        from memstudy.profiler import fit as largest_fit

        processes, over_batch = self.asked.processes, self.over == "batch"
        card = self.asked.card()
        with Console(stderr=True).status("predicting") as status:

            def run(size: int) -> HubModelRun:
                batch, seq_len = self._sizes(size)
                status.update(f"{self.asked.model}: batch {batch}, {seq_len} tokens, {', '.join(techniques)}")
                return self._sized(batch, seq_len, techniques)

            def build(size: int):
                return run(size).build(gpu=card, parts=2)

            def generates(size: int, card: Gpu | None) -> MemoryReport:
                return run(size).foretell(card, expandable_segments=self.asked.expandable_segments)

            def over_an_epoch(size: int, card: Gpu | None) -> LengthsReport:
                status.stop()  # has a line of its own
                return self.asked.epoch(size, techniques, card)

            found = largest_fit(
                build,
                gpu=card,
                budget_mib=self.budget_mib,
                effective_batch=self.effective_batch if over_batch else None,
                expandable_segments=self.asked.expandable_segments,
                processes=processes,
                limit=processes if smallest else self._limit(),
                run=partial(self._run, build) if self.verify else None,
                foretell=over_an_epoch if self.asked.of_lengths else generates if self.asked.generate else None,
            )
        batch, seq_len = self._sizes(found.batch_size)
        refused = found.refused_at and self._sizes(found.refused_at)[0 if over_batch else 1]
        parts = found.accumulation if over_batch else (self.effective_batch or processes) // processes
        return Answer(techniques, self.asked.result(techniques), batch, seq_len, parts, refused, found)

    def _limit(self) -> int:
        """The largest size to consider: of all texts where there are texts, and of the length asked for."""
        from memstudy.profiler.search import LIMIT, STEP_TOKENS

        if self.over != "batch":
            return self.asked.processes * ((self.asked.prompt or self.asked.seq_len) // STEP_TOKENS)
        return min(LIMIT, len(self.asked.texts)) if self.asked.of_lengths else LIMIT

    def run(self, answer: Answer) -> HubModelRun:
        """The run that takes the step of ``answer``."""
        return self._sized(answer.batch_size, answer.seq_len, answer.techniques)

    def _sized(self, batch: int, seq_len: int, techniques: tuple[str, ...]) -> HubModelRun:
        whole = max(self.effective_batch or batch, batch)
        parts = (f"accumulation={whole // batch}",) if whole > batch else ()
        return replace(self.asked, seq_len=seq_len).run(whole, (*techniques, *parts))

    def _sizes(self, size: int) -> tuple[int, int]:
        """Batch and sequence length of a ``size`` of the search, which are multiples of the number of processes."""
        from memstudy.profiler.search import STEP_TOKENS

        if self.over == "batch":
            return size, self.asked.seq_len
        return self.asked.processes, (self.asked.generate or 0) + size // self.asked.processes * STEP_TOKENS

    def _run(self, build, size: int) -> float | None:
        """The measured peak [MiB] of ``size``; None if the step does not fit."""
        from memstudy.huggingface.out_of_memory import is_out_of_memory
        from memstudy.profiler import measure

        try:
            peak = measure(build(size)).peak_allocated_mib
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return peak if peak <= self.budget_mib else None


def _additions(asked: Asked, batch: int, keep: str | None) -> list[tuple[str, ...]]:
    """Growing lists of techniques for the smallest batch, which is accumulated to ``batch``."""
    from memstudy.studies.ablation import advice

    parts = (f"accumulation={batch // asked.processes}",) if batch > asked.processes else ()
    rungs = advice.climb(
        asked.alone(batch, asked.estimates(batch)),
        partial(asked.takes, batch),
        start=(*asked.techniques, *parts),
        keep=keep,
    )
    return [tuple(text for text in rung if text not in parts) for rung in rungs[1:]]
