"""How the command line prints predictions and searches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memstudy.profiler import Fit, MemoryReport
    from memstudy.trainers.hub_model import HubModelRun


def as_dict(report: MemoryReport, run: HubModelRun) -> dict:
    """A prediction as JSON values."""
    return {
        "run": dict(run),
        "device": report.device,
        "kind": report.kind,
        "waterfall_mib": report.waterfall_mib(),
        "peak_allocated_mib": report.peak_allocated_mib,
        "peak_reserved_mib": report.peak_reserved_mib,
        "whole_gpu_mib": report.whole_gpu_mib,
        "peak_by_phase_mib": {phase: size / 2**20 for phase, size in report.peak_by_phase.items()},
        "fits": None if report.memory_bytes is None else report.out_of_memory is None,
        "out_of_memory": str(report.out_of_memory) if report.out_of_memory else None,
        "unverified": list(report.unverified),
    }


def fit_row(techniques: tuple[str, ...], found: Fit) -> dict:
    """One search for the largest batch as JSON values."""
    return {
        "techniques": techniques,
        "device": found.report.device,
        "batch_size": found.batch_size,
        "accumulation": found.accumulation,
        "budget_mib": found.budget_mib,
        "needed_mib": found.needed_mib,
        "headroom_percent": found.headroom_percent,
        "refused_at": found.refused_at,
        "tested": found.tested,
    }


def verdict(found: Fit) -> str:
    """The result of a search in one line."""
    said = "tested" if found.tested else "predicted"
    if not found.batch_size:
        return (
            f"nothing fits: a batch of 1 needs {readable(found.needed_mib)}, the budget is {readable(found.budget_mib)}"
        )
    parts = f", {found.accumulation} batches per update" if found.accumulation > 1 else ""
    return f"largest batch {found.batch_size}{parts} ({said}), {found.headroom_percent:.1f} % left"


def readable(mib: float) -> str:
    """``mib`` as text, in GiB from 1024 MiB on."""
    return f"{mib / 1024:,.1f} GiB" if mib >= 1024 else f"{mib:.1f} MiB"


def show(report: MemoryReport, processes: int) -> None:
    """Print where the memory of a predicted step goes, and whether it fits."""
    from rich.console import Console
    from rich.table import Table

    parts = report.waterfall_mib()
    whole = sum(parts.values())
    where = report.device if processes == 1 else f"each of {processes} × {report.device}"
    table = Table("", "MiB", "of the whole", "", box=None, title=f"training step on {where}, predicted")
    for column in (1, 2):
        table.columns[column].justify = "right"
    for name, size in parts.items():
        table.add_row(name, f"{size:,.0f}", f"{100 * size / whole:.0f} %", "█" * round(30 * size / whole))
    table.add_row("whole GPU" if report.memory_bytes else "peak", f"{whole:,.0f}", "", "", style="bold")
    console = Console(highlight=False)
    console.print(table)
    if report.memory_bytes is not None:
        have = report.memory_bytes / 2**30
        if report.out_of_memory is None:
            console.print(f"fits: {whole / 1024:.1f} of {have:.1f} GiB")
        else:
            said = f"does not fit: {whole / 1024:.1f} GiB needed, {have:.1f} available; {report.out_of_memory}"
            console.print(said, soft_wrap=True)
    if report.unverified:
        console.print(
            f"not checked against CUDA, ops taken as on a CPU: {', '.join(report.unverified)}", soft_wrap=True
        )
