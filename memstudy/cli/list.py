"""``memstudy list``: the names that other commands take, and the runs recorded so far."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from memstudy import project, records
from memstudy.cli.errors import one_line

RESULTS = "Folder of the records, with a subfolder for each study."


Listing = Literal["variants", "techniques", "datasets", "gpus", "models", "studies", "runs"]


def list_(
    what: Annotated[Listing, typer.Argument(help="What to list.")],
    results: Annotated[Path, typer.Option(help=RESULTS)] = records.ROOT / "results",
) -> None:
    """List variants, techniques, datasets, GPUs, models, studies or runs."""
    from rich.console import Console
    from rich.table import Table

    with one_line():
        rows = _LISTINGS[what](results)
    if not rows:
        typer.echo(f"no {what} yet")
        return
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*(str(cell) for cell in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table, markup=False)


def _variants(results: Path) -> list[dict]:
    from memstudy.attention import ATTENTION

    return [
        {
            "variant": name,
            "for": ", ".join(["encoders"] * (False in config.causal) + ["decoders"] * (True in config.causal)),
            "paper": config.paper,
        }
        for name, config in ATTENTION.items()
    ]


def _techniques(results: Path) -> list[dict]:
    from memstudy.techniques import TECHNIQUES

    return [
        {
            "technique": name,
            "for": " ".join(["training"] * technique.in_training + ["inference"] * technique.at_inference),
            "exact": "yes" if technique.exact else "no",
            "needs": technique.requires or "–",
            "what it does": technique.summary,
        }
        for name, technique in TECHNIQUES.items()
    ]


def _datasets(results: Path) -> list[dict]:
    from memstudy import data

    return data.datasets_available()


def _gpus(results: Path) -> list[dict]:
    from memstudy.profiler import gpus

    return [
        {
            "gpu": card.name,
            "memory [GiB]": f"{card.memory_mib / 1024:.2f}",
            "CUDA context [MiB]": f"{card.context_mib:.0f}",
            "bandwidth [GB/s]": f"{card.speed.bandwidth_gb_s:,.0f}",
            "tensor peak [TFLOP/s]": f"{card.speed.tensor_tflops:,.0f}",
            "compute capability": ".".join(map(str, card.compute_capability)),
            "source of the context": re.split(r":| \(|,", card.context_source)[0],
        }
        for card in gpus().values()
    ]


def _models(results: Path) -> list[dict]:
    from memstudy.huggingface.catalogue import hub_models

    return [
        {
            "model": name,
            "hub id": known.hub[0] if known.hub else "–",
            "family": known.config["model_type"],
            "parameters": f"{known.parameters:,}" if known.parameters else "–",
        }
        for name, known in hub_models().items()
    ]


def _studies(results: Path) -> list[dict]:
    return [{"study": stem, "scales": ", ".join(project.scales(stem))} for stem in project.studies()]


def _runs(results: Path) -> list[dict]:
    return [
        {
            "study": folder.name,
            "run": record["run_id"],
            "experiment": record["config"].get("experiment", ""),
            "status": record["status"],
            "device": record["provenance"]["device"],
            "ended": record["provenance"]["ended"][:19],
        }
        for folder in sorted(path for path in results.glob("*") if path.is_dir())
        for record in records.read_records(folder)
    ]


_LISTINGS = {
    "variants": _variants,
    "techniques": _techniques,
    "datasets": _datasets,
    "gpus": _gpus,
    "models": _models,
    "studies": _studies,
    "runs": _runs,
}
