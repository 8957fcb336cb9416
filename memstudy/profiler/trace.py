"""The last step of a report as a Chrome trace (JSON), which https://ui.perfetto.dev and chrome://tracing open.

Counters: bytes by category, and allocated and reserved in all. Where the step's time is predicted, the ops have a
track, and memory changes where the GPU begins the op that asks for it; the host asks when it issues the op, which may
be long before. An accumulated batch has two parts. A measured step has its own times. Else order alone is known: each
event takes 1 µs, and all steps are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from memstudy.profiler.accounting import categorise
from memstudy.profiler.events import Event
from memstudy.profiler.time.cost import schedule

if TYPE_CHECKING:
    from memstudy.profiler.report import MemoryReport
    from memstudy.profiler.time.cost import TimedOp

PROCESS, PHASES, OPS = 1, 1, 2


def trace(report: MemoryReport) -> dict:
    """The trace; times in µs from the beginning of the step."""
    ops = schedule(report.issued, report.gpu) if report.issued else []
    iterations = [index for index, event in enumerate(report.events) if event.kind == "iteration"]
    begins = iterations[-1 if ops or report.kind == "measured" else 0]
    times = dict(zip(range(begins, len(report.events)), _times(report, ops, begins), strict=True))
    axis = "predicted" if ops else "measured" if report.kind == "measured" else "order of events alone, 1 µs each"
    return {
        "displayTimeUnit": "ms",
        "otherData": {"kind": report.kind, "device": report.device, "times": axis, "peak_bytes": report.peak_bytes},
        "traceEvents": [
            _named("process_name", 0, f"one step on {report.device}, {report.kind}; times: {axis}"),
            _named("thread_name", PHASES, "phases"),
            *([_named("thread_name", OPS, "ops, on the GPU")] if ops else []),
            *_phases(report.events, times, ops[-1].ends_us if ops else max(times.values())),
            *(_op(op) for op in ops if op.work.kernels),
            *_counters(report, times),
        ],
    }


def _times(report: MemoryReport, ops: list[TimedOp], begins: int) -> Iterator[float]:
    """The time of each event from the index ``begins`` on [µs]."""
    events = report.events[begins:]
    if ops:
        begins_at = [0.0, *(op.begins_us for op in ops), ops[-1].ends_us]
        for number, same in groupby(events, key=lambda event: event.issued):
            same = list(same)
            # Spread, so that a buffer's allocation and release are two moments.
            step = (begins_at[number + 1] - begins_at[number]) / len(same)
            yield from (begins_at[number] + place * step for place in range(len(same)))
    elif report.kind == "measured":
        yield from (1e3 * (event.time_ms - events[0].time_ms) for event in events)
    else:
        yield from map(float, range(len(events)))


def _named(kind: str, thread: int, name: str) -> dict:
    return {"ph": "M", "name": kind, "pid": PROCESS, "tid": thread, "args": {"name": name}}


def _op(op: TimedOp) -> dict:
    return {
        "ph": "X",
        "name": op.work.name,
        "cat": op.work.kind,
        "pid": PROCESS,
        "tid": OPS,
        **_span(op.begins_us, op.ends_us),
        "args": {"phase": op.phase, "kind": op.work.kind, "issued [µs]": round(op.issued_us, 3)},
    }


def _span(begin: float, end: float) -> dict[str, float]:
    """Both ends rounded to ns: a viewer drops slices that overlap by one."""
    begin, end = round(begin, 3), round(end, 3)
    return {"ts": begin, "dur": round(end - begin, 3)}


def _phases(events: Sequence[Event], times: dict[int, float], end: float) -> Iterator[dict]:
    """A slice for each phase, until the next begins, or until ``end``."""
    phase, told = "forward", []
    for index, time in times.items():
        phase = events[index].label if events[index].kind == "phase" else phase
        told.append((phase, time))
    begun = [next(same) for _, same in groupby(told, key=itemgetter(0))]
    for (phase, begin), (_, until) in zip(begun, [*begun[1:], ("", end)], strict=True):
        slice_ = {"ph": "X", "name": phase, "cat": "phase", "pid": PROCESS, "tid": PHASES}
        yield slice_ | _span(begin, until)


def _counters(report: MemoryReport, times: dict[int, float]) -> Iterator[dict]:
    """The counters at the beginning of the step, and after each event that changes them."""
    blocks = categorise(report.events)
    live = dict.fromkeys(report.peak_by_category, 0)
    alive: dict[int, object] = {}
    reserved = 0
    for index, event in enumerate(report.events):
        if event.kind in ("alloc", "free") and event.block in alive:
            block = alive.pop(event.block)
            live[block.category] -= block.bytes
        if event.kind == "alloc":
            block = alive[event.block] = blocks[index]
            live[block.category] += block.bytes
        elif event.kind in ("segment_alloc", "segment_map"):
            reserved += event.bytes
        elif event.kind in ("segment_free", "segment_unmap"):
            reserved -= event.bytes
        elif event.kind not in ("free", "iteration"):
            continue
        if index in times:
            counter = {"ph": "C", "pid": PROCESS, "ts": round(times[index], 3)}
            yield counter | {"name": "memory by category [bytes]", "args": dict(live)}
            total = {"allocated": sum(live.values())} | ({"reserved": reserved} if report.gpu else {})
            yield counter | {"name": "memory [bytes]", "args": total}
