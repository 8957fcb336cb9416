"""``memstudy predict``: the memory and the time of a training step, or of generation, on a GPU that is not here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from memstudy.cli.answers import as_dict, show
from memstudy.cli.asked import AskedOfText, Batch, about_a_step


@about_a_step
def predict(
    asked: AskedOfText,
    batch: Batch,
    snapshot: Annotated[
        Path | None, typer.Option(help="Write a memory snapshot there, for PyTorch's viewer: pytorch.org/memory_viz.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace (JSON) there, for ui.perfetto.dev: memory, and ops.")
    ] = None,
) -> None:
    """Predict the memory of a training step or of generation, whether it fits, and how long it takes; nothing is run.

    memstudy predict --model bert-base-uncased --batch 16 --seq-len 128 --technique bf16,checkpointing --gpu T4\n
    memstudy predict --model gpt2-xl --batch 32 --seq-len 512 --technique fsdp,bf16 --processes 8 --gpu RTX4090\n
    memstudy predict --model qwen2.5-7b --batch 1 --prompt 6144 --generate 2048 --gpu RTX4090\n
    memstudy predict --model gpt2 --batch 8 --seq-len 512 --gpu T4 --snapshot gpt2.pickle --trace gpt2.json

    The step is Hugging Face Trainer's own, and generation transformers' own, traced on fake tensors. The band of the
    times spans fast and slow hosts and the error of the GPU's calibration. Exit status 0 whether or not it fits.
    """
    with _whole_file("--snapshot", snapshot) as put_snapshot, _whole_file("--trace", trace) as put_trace:
        report, run = asked.report(batch, asked.techniques), asked.run(batch, asked.techniques)
        if snapshot:
            from memstudy.profiler.snapshot import pickled

            put_snapshot(pickled(report))
        if trace:
            put_trace(json.dumps(report.trace()).encode())
    if asked.as_json:
        typer.echo(json.dumps(as_dict(report, run), indent=2))
    else:
        show(report, run)


@contextmanager
def _whole_file(option: str, path: Path | None) -> Iterator[Callable[[bytes], object]]:
    """A function that writes the file at ``path``, which appears at the end of the block, or not at all.

    Raises ValueError before the block for a place that cannot be written.
    """
    if path is None:
        yield lambda data: None
        return
    unfinished = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    try:
        if path.is_dir():
            raise ValueError(f"{option} {path}: is a folder; give the path of a file")
        with _naming(option, path):
            unfinished.touch()

        def put(data: bytes) -> None:
            with _naming(option, path):
                unfinished.write_bytes(data)

        yield put
        with _naming(option, path):
            os.replace(unfinished, path)
    finally:
        if unfinished.parent.is_dir():
            unfinished.unlink(missing_ok=True)


@contextmanager
def _naming(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = f"cannot be written ({error.strerror}); give a file in a folder that exists and can be written"
        raise ValueError(f"{option} {path}: {why}") from None
