"""The options that ask for an epoch of batches of unequal lengths, and how its prediction is printed."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from memstudy.cli.answers import readable
from memstudy.cli.asked import Asked, AskedOfText

if TYPE_CHECKING:
    from memstudy.profiler import Gpu, LengthsReport, StepShape


@dataclass(frozen=True)
class OfLengths:
    """The options, one field each; without ``lengths`` and ``dataset``, every batch has one length."""

    lengths: Annotated[
        Path | None,
        typer.Option(
            help="A .csv with a column of token counts, a text each: all steps of an epoch are predicted. Texts longer "
            "than --seq-len, if given, are cut to it."
        ),
    ] = None
    dataset: Annotated[
        str | None,
        typer.Option(help="In place of --lengths: a name from `memstudy list datasets`, or a file of texts."),
    ] = None
    tokenizer: Annotated[
        str | None, typer.Option(help="With --dataset: the tokenizer's folder, or its name on the hub.")
    ] = None
    field: Annotated[
        str, typer.Option(help="The column of the text or of the token counts; several, joined to one text, by comma.")
    ] = ""
    sampler: Annotated[
        Literal["shuffled", "grouped", "buckets", "packed"] | None,
        typer.Option(
            help="With lengths: shuffled (the default); grouped by length, as the Trainer does; sorted buckets of 20 "
            "batches; or packed to --seq-len tokens."
        ),
    ] = None
    padding_free: Annotated[
        bool, typer.Option("--padding-free", help="With lengths: the texts of a batch share one row; packs always do.")
    ] = False
    seed: Annotated[int, typer.Option(help="Of the sampler.", min=0, max=2**31)] = 0
    empty_cache: Annotated[
        int | None, typer.Option(help="With lengths: empty the allocator's cache every so many steps.", min=1)
    ] = None

    @property
    def of_lengths(self) -> bool:
        """Whether an epoch of batches of unequal lengths is asked for."""
        return self.lengths is not None or self.dataset is not None

    @functools.cached_property
    def texts(self) -> list[int]:
        """The tokens of each text, cut as asked."""
        from memstudy.data.lengths import read_lengths, token_lengths

        if self.lengths is not None:
            found = read_lengths(self.lengths, self.field or None)
        else:
            found = token_lengths(self.dataset, self.tokenizer, tuple(filter(None, self.field.split(","))))
        return found if self.seq_len is None else [min(length, self.seq_len) for length in found]

    def checked(self):
        if not self.of_lengths:
            given = [field.name for field in fields(OfLengths) if getattr(self, field.name) != field.default]
            if given:
                option = given[0].replace("_", "-")
                raise ValueError(f"--{option} is for batches of unequal lengths: give --lengths or --dataset")
            return super().checked()
        self._check()
        return replace(self, seq_len=self.seq_len or max(max(self.texts), 2))

    def _check(self) -> None:
        from memstudy.huggingface.catalogue import model_config
        from memstudy.trainers.hub_model import positions_of

        if self.lengths is not None and (self.dataset is not None or self.tokenizer is not None):
            raise ValueError("--lengths has counts already: leave --dataset and --tokenizer out")
        if self.dataset is not None and self.tokenizer is None:
            raise ValueError("--dataset needs --tokenizer, which counts the tokens of its texts")
        if getattr(self, "generate", None) is not None:
            raise ValueError("--lengths is for training: leave --generate out")
        if self.sampler == "packed" and self.seq_len is None:
            raise ValueError("--sampler packed needs --seq-len, the tokens of a pack")
        positions = positions_of(model_config(self.model))
        if positions is not None and max(self.texts) > positions:
            row = next(row for row, length in enumerate(self.texts, start=1) if length > positions)
            raise ValueError(
                f"text {row} has {self.texts[row - 1]:,} tokens, and {self.model} {positions:,} positions: give "
                f"--seq-len {positions}, to cut longer texts, or leave them out"
            )

    def takes(self, batch_size, techniques):
        accumulates = any(text.partition("=")[0] == "accumulation" for text in techniques)
        return not (self.of_lengths and accumulates) and super().takes(batch_size, techniques)

    def batches(self, batch_size: int) -> list[tuple[int, ...]]:
        """The lengths of the texts of each batch, or of each part of one that is accumulated."""
        from memstudy.data.lengths import batches

        return batches(
            self.texts,
            batch_size,
            self.sampler or "shuffled",
            longest=self.seq_len,
            seed=self.seed,
            parts=self.accumulation,
        )

    @property
    def accumulation(self) -> int:
        """How many steps, each a part, make an update."""
        from memstudy.techniques import accumulation_of, parse

        return accumulation_of(parse(self.techniques))

    @property
    def flattened(self) -> bool:
        """Whether the texts of a batch share a row."""
        return self.padding_free or self.sampler == "packed"

    @property
    def how(self) -> str:
        """How batches are made, in words."""
        return f"{self.sampler or 'shuffled'}{', without padding' * self.padding_free}"

    @property
    def options(self) -> str:
        """The options that make batches so; none where all are at their defaults."""
        given = [f"--sampler {self.sampler}"] if self.sampler else []
        given += ["--padding-free"] if self.padding_free else []
        given += [f"--seq-len {self.seq_len}"] if self.sampler == "packed" else []
        return " ".join([*given, f"--attention {self.attention}"] if self.attention != "sdpa" else given)

    def epoch(self, batch_size: int, techniques: tuple[str, ...], card: Gpu | None = None) -> LengthsReport:
        """The prediction of every step of an epoch, on ``card`` or the GPU asked for; a terminal shows how far."""
        from rich.console import Console
        from rich.progress import Progress

        from memstudy.profiler import StepShape

        run = self.run(batch_size, techniques)
        shapes = [StepShape.of(batch, flattened=self.flattened) for batch in self.batches(batch_size)]
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(f"{run.model}, batch {batch_size}: tracing some lengths", total=None)

            def watched(steps: Sequence[StepShape]) -> Iterable[StepShape]:
                progress.update(task, description=f"{run.model}, batch {batch_size}: replay", total=len(steps))
                for step in steps:
                    yield step
                    progress.advance(task)

            return run.foretell_lengths(
                shapes,
                card or self.card(),
                expandable_segments=self.expandable_segments,
                empty_cache_every=self.empty_cache,
                progress=watched,
            )

    def padding(self, batch_size: int) -> float:
        """The share of padding among the tokens of an epoch."""
        from memstudy.data.lengths import padded_share

        return 0.0 if self.flattened else padded_share(self.batches(batch_size))


@dataclass(frozen=True)
class AskedOfAny(OfLengths, AskedOfText):
    """As `AskedOfText`; with ``lengths`` or ``dataset``, an epoch of training steps is asked for."""


@dataclass(frozen=True)
class AskedOfTraining(OfLengths, Asked):
    """As `Asked`; with ``lengths`` or ``dataset``, an epoch of training steps is asked for."""

    seq_len: Annotated[int | None, typer.Option(help="Tokens per sequence.", min=2, max=2**31)] = None

    def checked(self):
        if self.seq_len is None and not self.of_lengths:
            raise ValueError("missing option --seq-len, or --lengths for batches of unequal lengths")
        return super().checked()


QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def quantiles(report: LengthsReport) -> dict[str, dict[str, float]]:
    """The distribution over steps: tokens, and memory [MiB]."""
    import numpy as np

    kinds = {
        "tokens": [shape.tokens * shape.rows for shape in report.shapes],
        "allocated_mib": np.array(report.step_peaks) / 2**20,
        "reserved_mib": np.array(report.reserved_peaks) / 2**20,
    }
    return {
        kind: {name: float(np.quantile(values, at)) for name, at in QUANTILES.items()}
        for kind, values in kinds.items()
        if len(values)
    }


def epoch_as_dict(asked: OfLengths, batch_size: int, techniques: tuple[str, ...], report: LengthsReport) -> dict:
    """The prediction of an epoch as JSON values."""
    return {
        "run": dict(asked.run(batch_size, techniques)),
        "device": report.device,
        "kind": "predicted",
        "sampler": asked.sampler or "shuffled",
        "flattened": asked.flattened,
        "steps": len(report.shapes),
        "padded_share": asked.padding(batch_size),
        "quantiles": quantiles(report),
        "worst_step": report.worst,
        "whole_gpu_mib": report.whole_gpu_mib,
        "fits": None if report.memory_bytes is None else not report.refused,
        "out_of_memory": str(report.out_of_memory) if report.out_of_memory else None,
        "steps_out_of_memory": list(report.refused),
        "bytes_per_token": report.bytes_per_token,
        "bytes_besides": report.bytes_besides,
        "worst_deviation": report.worst_deviation,
        "lengths_traced": report.traced,
        "step_peaks": list(report.step_peaks),
        "step_reserved": list(report.step_reserved),
        "unverified": list(report.unverified),
    }


def show_epoch(asked: OfLengths, batch_size: int, report: LengthsReport) -> None:
    """Print the distribution of the steps' memory, the worst step, and the first that does not fit."""
    from rich.console import Console
    from rich.table import Table

    count = len(report.shapes)
    steps = f"steps, {asked.accumulation} to an update," if asked.accumulation > 1 else "steps"
    table = Table("", *QUANTILES, box=None, title=f"{count:,} {steps} on {report.device}, predicted")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, values in quantiles(report).items():
        tokens = kind == "tokens"
        name = "tokens a step" if tokens else f"{kind.removesuffix('_mib')} at most in a step"
        table.add_row(name, *(f"{value:,.0f}" if tokens else readable(value) for value in values.values()))
    console = Console(highlight=False)
    console.print(table)
    worst = report.shapes[report.worst - 1]
    lines = [
        f"{len(asked.texts):,} texts, {asked.how}; padding: {100 * asked.padding(batch_size):.1f} % of the tokens",
        f"worst step: {report.worst:,}, {worst.rows} × {worst.tokens:,} tokens",
    ]
    if report.bytes_per_token:
        besides, each = readable(report.bytes_besides / 2**20), report.bytes_per_token / 1024
        lines.append(
            f"by tokens: {besides} and {each:,.1f} KiB for each; line within {100 * report.worst_deviation:.2g} % of "
            f"{report.traced} lengths traced"
        )
    if report.memory_bytes is not None:
        whole, have = readable(report.whole_gpu_mib), readable(report.memory_bytes / 2**20)
        if report.out_of_memory is None:
            lines.append(f"fits: {whole} of {have}")
        else:
            refused = f"{len(report.refused):,} of {count:,} steps do not fit"
            lines.append(f"does not fit: {report.out_of_memory}; {refused} {have}")
    if report.unverified:
        lines.append(f"not checked against CUDA, ops taken as on a CPU: {', '.join(report.unverified)}")
    for line in lines:
        console.print(line, soft_wrap=True)
