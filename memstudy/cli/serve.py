"""``memstudy serve``: a web page that answers questions with the models trained on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memstudy import records
from memstudy.cli.errors import one_line

QUESTIONS = "place-value-100000"


def quick_runs(data_hash: str) -> list:
    """The two runs of ``--train``: exact attention, and MemSizer in every attention; three minutes each."""
    from memstudy.studies.memsizer.run import Seq2SeqRun

    sizes = {"n_layers": 2, "hidden_size": 128, "n_heads": 4, "feed_forward": 512, "vocab_size": 48, "seq_len": 56}
    training = {"batch_size": 128, "learning_rate": 2e-3, "dropout": 0.0, "eval_rows": 2000}
    slots = {"encoder": {"slots": 32}, "decoder": {"slots": 4}, "cross": {"slots": 32}}
    return [
        Seq2SeqRun(
            experiment="serve", memsizer=memsizer, train_steps=1200, dataset=QUESTIONS, data_hash=data_hash,
            target_vocab_size=16, target_len=4, **sizes, **training,
        )
        for memsizer in ({}, slots)
    ]  # fmt: skip


def serve(
    models: Annotated[Path, typer.Option(help="Folder of trained models, a subfolder each.")] = Path("build/models"),
    host: Annotated[str, typer.Option(help="Address to listen on; any but 127.0.0.1 opens the page to others.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    train: Annotated[bool, typer.Option("--train", help="Train two small models first, in about six minutes.")] = False,
) -> None:
    """Answer questions about digits on a web page. Models: Transformer, MemSizer, or both side by side.

    The models are the newest of each kind that the MemSizer study trained here. If there are none, --train trains two
    small ones first. Ctrl-C stops the server.
    """
    with one_line():
        import flask  # noqa: F401 - if not installed, to be said before six minutes of training

        if not train and not any(models.glob("*/run.json")):
            typer.echo(f"no trained models in {models}", err=True)
            train = typer.confirm("Train two small ones now? That takes about six minutes", abort=True, err=True)
        if train:
            _train()
        from memstudy.studies.memsizer.page.app import make_server_for

        server = make_server_for(models, host, port)
    typer.echo(f"http://{host}:{server.server_port}/ (Ctrl-C stops it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        typer.echo("stopped")
    finally:
        server.server_close()


def _train() -> None:
    from memstudy import data

    for run in quick_runs(data.load(QUESTIONS).content_hash):
        record = records.perform(
            run.model_dump(mode="json"),
            records.ROOT / "results" / "serve",
            run.execute,
        )
        if record["status"] != "ok":
            raise ValueError(f"training failed: {record['reason']}")
        typer.echo(f"exact match on new questions: {record['metrics']['test_exact_match']:.3f}")
