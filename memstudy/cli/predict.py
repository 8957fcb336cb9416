"""``memstudy predict``: the memory and the time of a training step, or of generation, on a GPU that is not here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from memstudy import records
from memstudy.cli.answers import as_dict, show
from memstudy.cli.asked import Batch, about_a_step
from memstudy.cli.of_lengths import AskedOfAny, epoch_as_dict, show_epoch


@about_a_step
def predict(
    asked: AskedOfAny,
    batch: Batch,
    figure: Annotated[
        Path | None, typer.Option(help="With lengths: draw the peak of each step to this .pdf, and a .png beside it.")
    ] = None,
    snapshot: Annotated[
        Path | None, typer.Option(help="Write a memory snapshot there, for PyTorch's viewer: pytorch.org/memory_viz.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace (JSON) there, for ui.perfetto.dev: memory, and ops.")
    ] = None,
) -> None:
    """Predict memory and time of a training step or of generation. The step is followed; nothing is run.

    \b
    memstudy predict --model bert-base-uncased --batch 16 --seq-len 128 \\
        --technique bf16,checkpointing --gpu T4
    memstudy predict --model gpt2-xl --batch 32 --seq-len 512 \\
        --technique fsdp,bf16 --processes 8 --gpu RTX4090
    memstudy predict --model qwen2.5-7b --batch 1 --gpu RTX4090 \\
        --prompt 6144 --generate 2048
    memstudy predict --model llama-3.1-8b --batch 2 --gpu RTX4090 \\
        --technique lora=16,convention=trl,checkpointing \\
        --lengths lengths.csv --figure peaks.pdf
    memstudy predict --model gpt2 --batch 8 --seq-len 512 --gpu T4 \\
        --snapshot gpt2.pickle --trace gpt2.json

    The step is Hugging Face Trainer's own, and generation transformers' own, traced on fake tensors. The band of the
    times spans fast and slow hosts and the error of the GPU's calibration. Exit status 0 whether or not it fits.
    """
    if asked.of_lengths and (snapshot or trace):
        raise ValueError("--snapshot and --trace are of one step: leave --lengths and --dataset out")
    if figure is not None and (not asked.of_lengths or figure.suffix != ".pdf" or not figure.parent.is_dir()):
        raise ValueError(f"--figure {figure}: a .pdf in a folder that exists is drawn, with --lengths or --dataset")
    if asked.of_lengths:
        _epoch(asked, batch, figure)
        return
    for option, path in (("--snapshot", snapshot), ("--trace", trace)):
        if path is not None:
            _check_place(option, path)
    report, run = asked.report(batch, asked.techniques), asked.run(batch, asked.techniques)
    if snapshot is not None:
        from memstudy.profiler.snapshot import pickled

        with _naming("--snapshot", snapshot):
            records.write_whole(snapshot, pickled(report))
    if trace is not None:
        with _naming("--trace", trace):
            records.write_whole(trace, json.dumps(report.trace()).encode())
    if asked.as_json:
        typer.echo(json.dumps(as_dict(report, run), indent=2))
    else:
        show(report, run)


def _epoch(asked: AskedOfAny, batch: int, figure: Path | None) -> None:
    report = asked.epoch(batch, asked.techniques)
    if asked.as_json:
        typer.echo(json.dumps(epoch_as_dict(asked, batch, asked.techniques, report), indent=2))
    else:
        show_epoch(asked, batch, report)
    if figure is None:
        return
    import matplotlib.pyplot as plt

    from memstudy.figures import WIDTH, steps_over_budget, use_style, write_figure

    use_style()
    drawn, axes = plt.subplots(figsize=(WIDTH, 3.0))
    memory = {"allocated": report.step_peaks, "reserved": report.reserved_peaks}
    steps_over_budget(axes, memory, report.context_bytes, report.memory_bytes, report.device)
    write_figure(drawn, figure)


def _check_place(option: str, path: Path) -> None:
    """Raise ValueError unless a file can be written at ``path``: before the prediction, which takes seconds."""
    if path.is_dir():
        raise ValueError(f"{option} {path}: is a folder; give the path of a file")
    with _naming(option, path), tempfile.TemporaryFile(dir=path.parent):
        pass


@contextmanager
def _naming(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = f"cannot be written ({error.strerror}); give a file in a folder that exists and can be written"
        raise ValueError(f"{option} {path}: {why}") from None
