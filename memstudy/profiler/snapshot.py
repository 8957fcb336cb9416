"""A report as PyTorch's own memory snapshot: the format of ``torch.cuda.memory._dump_snapshot``.

https://pytorch.org/memory_viz and ``python -m torch.cuda._memory_viz`` open such a file. What the viewer
(torch/utils/viz/MemoryViz.js) needs, beyond what the docstring of ``torch.cuda.memory._snapshot`` says: the blocks of a
segment tile the segment; each live block lies in a listed segment, since the viewer replays events backwards; with
categories, one event has the category ``unknown``; pickle protocol 4 without bytes and sets.

A stack of frames is the module that allocates, the modules around it, and the phase with the number of the step. A
device without PyTorch's caching allocator, as a CPU, has no segments: each block is shown as a segment of its own.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from memstudy.profiler.accounting import categorise
from memstudy.profiler.allocator import LARGE_SEGMENT, SMALL_SEGMENT
from memstudy.profiler.events import Event

if TYPE_CHECKING:
    from memstudy.profiler.report import MemoryReport

# Our categories as torch.profiler names its own; the viewer calls a block without a category unknown.
CATEGORIES = {
    "parameters": "parameter",
    "gradients": "gradient",
    "optimizer": "optimizer_state",
    "activations": "activation",
    "other": "unknown",
}
_POOL = (0, 0)  # id of the memory pool that serves all but CUDA graphs


def snapshot(report: MemoryReport) -> dict:
    """The events of ``report``, from building on, and the memory after its last step."""
    events = list(report.events if report.gpu else _each_its_own_segment(report.events))
    blocks, frames = categorise(events), _frames()
    trace: list[dict] = []
    live: dict[int, tuple[dict, int]] = {}  # the allocation, and the bytes of its block
    mapped: dict[int, tuple[int, str, int, bool]] = {}  # bytes, small or large, stream, expandable; by address
    phase, step = "build", 0
    for index, event in enumerate(events):
        where = frames(event.label, phase, step)
        if event.kind == "phase":
            phase = event.label
        elif event.kind == "iteration":
            step += 1
        elif event.kind == "alloc" and event.bytes:
            category = blocks[index].category
            entry = _entry("alloc", event, where) | {"category": CATEGORIES.get(category, category)}
            live[event.block] = entry | {"size": event.requested}, event.bytes
            trace.append(live[event.block][0])
        elif event.kind == "free" and event.block in live:
            entry, _ = live.pop(event.block)
            trace += [entry | {"action": action} for action in ("free_requested", "free_completed")]
        elif event.kind == "oom":
            reserved = sum(size for size, *_ in mapped.values())
            free = max(0, report.gpu.capacity_bytes - reserved)
            trace.append(_entry("oom", event, where) | {"device_free": free})
        elif event.kind.startswith("segment"):
            trace.append(_entry(event.kind, event, frames("", phase, step)))
            for address, size in _pieces(event):
                if event.kind in ("segment_alloc", "segment_map"):
                    mapped[address] = size, event.label, event.stream, event.kind == "segment_map"
                else:
                    del mapped[address]
    end = Event("snapshot", 0.0)
    trace.append(_entry("snapshot", end, frames("", phase, step)) | {"category": "unknown"})
    segments = _segments(mapped, [*live.values()])
    return {
        "segments": segments,
        "device_traces": [trace],
        "allocator_settings": {"expandable_segments": any(segment["is_expandable"] for segment in segments)},
        "memstudy": {"kind": report.kind, "device": report.device},
    }


def pickled(report: MemoryReport) -> bytes:
    """The snapshot of ``report`` as ``torch.cuda.memory._dump_snapshot`` writes it."""
    return pickle.dumps(snapshot(report), protocol=4)


def _entry(action: str, event: Event, frames: list[dict]) -> dict:
    return {
        "action": action,
        "addr": event.address,
        "size": event.bytes,
        "stream": event.stream,
        "pool_id": _POOL,
        "timestamp": None,  # otherwise the viewer shows a date
        "frames": frames,
    }


def _frames() -> Callable[[str, str, int], list[dict]]:
    """A function that makes stacks, the innermost frame first; equal stacks are one object, and one in a pickle."""

    @functools.cache
    def frame(filename: str, line: int, name: str) -> dict:
        return {"filename": filename, "line": line, "name": name}

    @functools.cache
    def stack(module: str, phase: str, step: int) -> list[dict]:
        parts = module.split(".") if module else []
        paths = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
        return [*(frame("module", 0, path) for path in paths), frame("step", step, phase)]

    return stack


def _each_its_own_segment(events: Iterable[Event]) -> Iterator[Event]:
    """``events`` with addresses, as if each block were asked of the device alone."""
    live: dict[int, Event] = {}
    address = 0

    def release(event: Event) -> Iterator[Event]:
        yield replace(event, kind="free")
        yield replace(live.pop(event.block), kind="segment_free", label="large")

    for event in events:
        if event.kind == "alloc" and event.bytes:
            if event.block in live:  # another thread has freed the block
                yield from release(event)
            placed = live[event.block] = replace(event, address=address, requested=event.bytes)
            yield replace(placed, kind="segment_alloc", label="large")
            yield placed
            address += event.bytes
        elif event.kind != "free":
            yield event
        elif event.block in live:
            yield from release(event)


def _pieces(event: Event) -> Iterator[tuple[int, int]]:
    """Address and bytes of what a segment's event maps or unmaps: of an expandable segment, granule by granule."""
    expandable = event.kind in ("segment_map", "segment_unmap")
    size = (SMALL_SEGMENT if event.label == "small" else LARGE_SEGMENT) if expandable else event.bytes
    for address in range(event.address, event.address + event.bytes, size):
        yield address, size


def _segments(mapped: dict[int, tuple[int, str, int, bool]], live: list[tuple[dict, int]]) -> list[dict]:
    """The segments, adjacent pieces of an expandable one together, each with blocks from its beginning to its end."""
    segments: list[dict] = []
    for address, (size, label, stream, expandable) in sorted(mapped.items()):
        last = segments[-1] if segments else None
        if expandable and last and last["is_expandable"] and last["address"] + last["total_size"] == address:
            last["total_size"] += size
            continue
        segments.append(
            {
                "device": 0,
                "address": address,
                "total_size": size,
                "stream": stream,
                "segment_type": label,
                "segment_pool_id": _POOL,
                "is_expandable": expandable,
                "frames": [],
            }
        )
    waiting = sorted(live, key=lambda each: each[0]["addr"], reverse=True)
    for segment in segments:
        end, blocks = segment["address"] + segment["total_size"], []
        at = segment["address"]
        while at < end:
            entry, size = waiting[-1] if waiting else (None, 0)
            if entry and entry["addr"] == at:
                waiting.pop()
                blocks.append(_block(at, size, entry["size"], "active_allocated", entry["frames"]))
            else:
                size = min(entry["addr"] if entry else end, end) - at
                blocks.append(_block(at, size, 0, "inactive", []))
            at += size
        used = [block for block in blocks if block["state"] != "inactive"]
        segment["blocks"] = blocks
        segment["allocated_size"] = segment["active_size"] = sum(block["size"] for block in used)
        segment["requested_size"] = sum(block["requested_size"] for block in used)
    return segments


def _block(address: int, size: int, requested: int, state: str, frames: list[dict]) -> dict:
    return {"address": address, "size": size, "requested_size": requested, "state": state, "frames": frames}
