"""``memstudy predict``: the memory and the time of a training step on a GPU that is not here."""

from __future__ import annotations

import json

import typer

from memstudy.cli.answers import as_dict, show
from memstudy.cli.asked import Asked, Batch, about_a_step


@about_a_step
def predict(asked: Asked, batch: Batch) -> None:
    """Predict the memory of a training step, whether the step fits, and how long it takes; nothing is run.

    memstudy predict --model bert-base-uncased --batch 16 --seq-len 128 --technique bf16,checkpointing --gpu T4\n
    memstudy predict --model gpt2-xl --batch 32 --seq-len 512 --technique fsdp,bf16 --processes 8 --gpu RTX4090

    The step is Hugging Face Trainer's own, traced on fake tensors. The band of the step time spans fast and slow hosts
    and the error of the GPU's calibration. Exit status 0 whether or not the step fits.
    """
    report, run = asked.report(batch, asked.techniques), asked.run(batch, asked.techniques)
    if asked.as_json:
        typer.echo(json.dumps(as_dict(report, run), indent=2))
    else:
        show(report, run)
