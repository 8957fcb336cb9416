"""``memstudy predict``: the memory of a training step, or of generation, on a GPU that is not here."""

from __future__ import annotations

import json

import typer

from memstudy.cli.answers import as_dict, show
from memstudy.cli.asked import AskedOfText, Batch, about_a_step


@about_a_step
def predict(asked: AskedOfText, batch: Batch) -> None:
    """Predict the memory of a training step or of generation, and whether it fits; nothing is run.

    memstudy predict --model bert-base-uncased --batch 16 --seq-len 128 --technique bf16,checkpointing --gpu T4\n
    memstudy predict --model gpt2-xl --batch 32 --seq-len 512 --technique fsdp,bf16 --processes 8 --gpu RTX4090\n
    memstudy predict --model qwen2.5-7b --batch 1 --prompt 6144 --generate 2048 --gpu RTX4090

    The step is Hugging Face Trainer's own, and generation transformers' own, traced on fake tensors. Exit status 0
    whether or not it fits.
    """
    report = asked.report(batch, asked.techniques)
    if asked.as_json:
        typer.echo(json.dumps(as_dict(report, asked.run(batch, asked.techniques)), indent=2))
    else:
        show(report, asked.what, asked.processes)
