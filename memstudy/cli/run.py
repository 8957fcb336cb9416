"""``memstudy run``: one run, in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from memstudy import records
from memstudy.cli.errors import one_line


def run(
    config: Annotated[Path, typer.Argument(help="JSON file that describes the run.")],
    results: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("results/single"),
) -> None:
    """Carry out one run in this process and write its record.

    The file's "kind" names the kind of run: "language_model", "reformer", "seq2seq", "hub_model", "inference",
    "fine_tune", "layer", or "prediction" of another run.

    {"kind": "language_model", "experiment": "mine", "n_layers": 2, "hidden_size": 64, "n_heads": 2,
    "feed_forward": 256, "vocab_size": 1000, "seq_len": 128, "batch_size": 4, "techniques": ["bf16"],
    "measure_steps": 3}

    Exit status: 0 with status ok, unavailable or oom in the record; 1 when the run failed; 2 for bad input.
    """
    with one_line():
        try:
            given = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ValueError(f"{config}: {reason}; a JSON file is needed") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{config}: not JSON: {error}") from None
        records.check_writable(results)
        import torch

        from memstudy.attention import Unavailable
        from memstudy.kinds import parse_run

        planned = parse_run(given)
        processes = planned.n_processes
        together = int(os.environ.get("WORLD_SIZE", 1))
        if "RANK" in os.environ and together != processes:
            raise ValueError(f"{config}: processes={processes}, but {together} were started; start as many, or none")
        if processes > 1 and "RANK" not in os.environ:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command = [*launch, "-m", "memstudy.cli", "run", str(config), "--results", str(results)]
            raise typer.Exit(subprocess.run(command).returncode)
        planned.load_data()
        try:
            if int(os.environ.get("RANK", 0)):  # the first process writes the record
                planned.execute(records.checkpoints_of(planned.model_dump(mode="json")))
                return
            record = records.perform(
                planned.model_dump(mode="json"),
                results.resolve(),
                planned.execute,
                timed=planned.timed,
                out_of_memory=(MemoryError, torch.OutOfMemoryError),
                unavailable=(Unavailable,),
            )
        finally:
            if torch.distributed.is_initialized():  # otherwise its threads may crash the ending process
                torch.distributed.destroy_process_group()
    typer.echo(f"{record['run_id']}: {record['status']} {record['reason']}".strip())
    for name, value in record["metrics"].items():
        typer.echo(f"  {name} = {value:,.3f}" if isinstance(value, float) else f"  {name} = {value}")
    raise typer.Exit(1 if record["status"] == "failed" else 0)
