"""A report as text: where the memory goes, and whether it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from memstudy.profiler.report import MemoryReport


def waterfall(report: MemoryReport, title: str) -> Table:
    """The parts of the peak (`MemoryReport.waterfall_mib`) as a table."""
    from rich.table import Table

    parts = report.waterfall_mib()
    whole = sum(parts.values())
    table = Table("", "MiB", "of the whole", "", box=None, title=title)
    for column in (1, 2):
        table.columns[column].justify = "right"
    for name, size in parts.items():
        table.add_row(name, f"{size:,.0f}", f"{100 * size / whole:.0f} %", "█" * round(30 * size / whole))
    table.add_row("whole GPU" if report.memory_bytes else "peak", f"{whole:,.0f}", "", "", style="bold")
    return table


def verdict(report: MemoryReport) -> str:
    """Whether the step of a ``report`` predicted for a GPU fits there, in one line."""
    need, have = report.whole_gpu_mib / 1024, report.memory_bytes / 2**30
    if report.out_of_memory is None:
        return f"fits: {need:.1f} of {have:.1f} GiB"
    return f"does not fit: {need:.1f} GiB needed, {have:.1f} available; {report.out_of_memory}"
