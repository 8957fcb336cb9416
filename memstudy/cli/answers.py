"""How the command line prints predictions and searches."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memstudy.profiler import Fit, MemoryReport
    from memstudy.profiler.time.cost import StepTime
    from memstudy.trainers.hub_model import HubModelRun

WIDTH = 100  # of wide tables [characters]; a wider terminal is used


def as_dict(report: MemoryReport, run: HubModelRun) -> dict:
    """A prediction as JSON values."""
    return {
        "run": dict(run),
        "device": report.device,
        "kind": report.kind,
        "waterfall_mib": report.waterfall_mib(),
        **_totals(report),
        "fused": report.fused and _totals(report.fused),
        "at_rest_mib": report.at_rest_bytes / 2**20,
        "peak_by_phase_mib": {phase: size / 2**20 for phase, size in report.peak_by_phase.items()},
        "fits": None if report.memory_bytes is None else report.out_of_memory is None,
        "out_of_memory": str(report.out_of_memory) if report.out_of_memory else None,
        "unverified": list(report.unverified),
        "time": time_as_dict(report, run),
        "time_by_pass": {name: asdict(time) for name, time in report.time_by_pass.items()},
    }


def _totals(report: MemoryReport) -> dict[str, float | None]:
    names = ("peak_allocated_mib", "peak_reserved_mib", "whole_gpu_mib")
    return {name: getattr(report, name) for name in names}


def time_as_dict(report: MemoryReport, run: HubModelRun) -> dict | None:
    """The predicted step time as JSON values; None without one."""
    return report.time and asdict(report.time) | {"tokens_per_s": tokens_per_s(report.time, run)}


def tokens_per_s(time: StepTime, run: HubModelRun) -> float:
    """Tokens of all processes per second of predicted step time."""
    return 1e3 * run.batch_size * run.seq_len / time.step_time_ms


@dataclass(frozen=True)
class Answer:
    """The largest batch, or the longest sequence, found with ``techniques``.

    ``seq_len`` [tokens] and ``batch_size`` are 0 when nothing fits; ``refused_at`` is the smallest that was found not
    to fit, in the unit of the search. ``result`` says what the techniques change, as `Asked.result`.
    """

    techniques: tuple[str, ...]
    result: str
    batch_size: int
    seq_len: int
    accumulation: int
    refused_at: int | None
    found: Fit

    @property
    def fits(self) -> bool:
        """Whether anything fits."""
        return self.found.batch_size > 0

    def row(self) -> dict:
        """The answer as JSON values."""
        numbers = ("budget_mib", "needed_mib", "headroom_percent", "tested")
        return {
            "techniques": self.techniques,
            "same_result": self.result,
            "device": self.found.report.device,
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "accumulation": self.accumulation,
            "effective_batch": self.batch_size * self.accumulation,
            "refused_at": self.refused_at,
            "time": self.found.report.time and asdict(self.found.report.time),
            **{name: getattr(self.found, name) for name in numbers},
        }

    def line(self, search: str) -> str:
        """The result of a ``search`` for the largest ``batch`` or the longest ``seq-len``, in one line."""
        found, names = self.found, ", ".join(self.techniques) or "no technique"
        if not self.fits:
            least = "a batch of 1" if search == "batch" else "the shortest sequence"
            needed, budget = readable(found.needed_mib), readable(found.budget_mib)
            return f"{names}: nothing fits: {least} needs {needed}, the budget is {budget}"
        what = f"largest batch {self.batch_size}" if search == "batch" else f"longest sequence {self.seq_len:,} tokens"
        parts = f"{self.accumulation} batches per update, " if self.accumulation > 1 else ""
        said = "tested" if found.tested else "predicted"
        changes = {"yes": "", "no": "; other arithmetic"}.get(self.result, f"; {self.result} of the weights")
        effective = f"effective batch {self.batch_size * self.accumulation}"
        time = f"; {found.report.time} an update" if found.report.time else ""
        return f"{names}: {what}, {parts}{effective} ({said}), {found.headroom_percent:.1f} % left{time}{changes}"


def readable(mib: float) -> str:
    """``mib`` as text, in GiB from 1024 MiB on."""
    return f"{mib / 1024:,.1f} GiB" if mib >= 1024 else f"{mib:.1f} MiB"


def show(report: MemoryReport, run: HubModelRun) -> None:
    """Print where the memory of a predicted step goes, whether it fits, and how long it takes."""
    from rich.console import Console

    from memstudy.profiler.waterfall import verdict, waterfall

    where = report.device if run.processes == 1 else f"each of {run.processes} × {report.device}"
    console = Console(highlight=False)
    console.print(waterfall(report, f"{run.what} on {where}, predicted"))
    if report.memory_bytes is not None:
        console.print(verdict(report), soft_wrap=True)
    if report.fused:
        least, most = (readable(sum(end.waterfall_mib().values())) for end in (report.fused, report))
        console.print(
            f"compiled: from {least}, with all fused that can be, to {most}, op by op as above; "
            "its time is not predicted",
            soft_wrap=True,
        )
    if report.unverified:
        console.print(
            f"not checked against CUDA, ops taken as on a CPU: {', '.join(report.unverified)}", soft_wrap=True
        )
    if report.time:
        show_time(report.time, run)
    for name, time in report.time_by_pass.items():
        # generate prepares each pass in Python, which no constant of the host has been fitted on.
        bound = ", which does more than issue these ops: a lower bound" * (time.bound_by == "host")
        console.print(f"{name}: {time}, predicted; bound by the {time.bound_by}{bound}", soft_wrap=True)


def show_time(time: StepTime, run: HubModelRun) -> None:
    """Print a predicted step time, its band, and where the time goes."""
    from rich.console import Console

    console = Console(highlight=False)
    parts = sorted(((ms / time.step_time_ms, kind) for kind, ms in time.by_kind_ms.items()), reverse=True)
    shares = ", ".join(f"{kind} {100 * share:.0f} %" for share, kind in parts if share >= 0.005)
    console.print(
        f"step time: {time}, predicted; {tokens_per_s(time, run):,.0f} tokens/s, "
        f"{100 * time.share_of_peak:.0f} % of the tensor cores' peak; bound by the {time.bound_by}\n"
        f"where the time goes: {shares}",
        soft_wrap=True,
    )
    if time.untimed:
        console.print(f"not in the time: {', '.join(time.untimed)}", soft_wrap=True)
