"""``memstudy predict``: the memory and the time of a training step, or of generation, on a GPU that is not here."""

from __future__ import annotations

import json

import typer

from memstudy.cli.answers import as_dict, show
from memstudy.cli.asked import AskedOfText, Batch, about_a_step


@about_a_step
def predict(asked: AskedOfText, batch: Batch) -> None:
    """Predict the memory of a training step or of generation, whether it fits, and how long it takes; nothing is run.

    memstudy predict --model bert-base-uncased --batch 16 --seq-len 128 --technique bf16,checkpointing --gpu T4\n
    memstudy predict --model gpt2-xl --batch 32 --seq-len 512 --technique fsdp,bf16 --processes 8 --gpu RTX4090\n
    memstudy predict --model qwen2.5-7b --batch 1 --prompt 6144 --generate 2048 --gpu RTX4090

    The step is Hugging Face Trainer's own, and generation transformers' own, traced on fake tensors. The band of the
    times spans fast and slow hosts and the error of the GPU's calibration. Exit status 0 whether or not it fits.
    """
    report, run = asked.report(batch, asked.techniques), asked.run(batch, asked.techniques)
    if asked.as_json:
        typer.echo(json.dumps(as_dict(report, run), indent=2))
    else:
        show(report, run)
