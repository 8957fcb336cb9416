"""Turns a stream of memory events into a report: the only place where categories and phases are decided.

Categories of a block of memory:

- ``parameters``: storage of a registered ``nn.Parameter``
- ``gradients``: storage of a parameter's ``.grad``
- ``optimizer``: storage of a tensor in an optimizer's ``state``
- ``activations``: allocated in a forward pass and still alive when its backward pass begins
- ``temporary``: any other block allocated and freed within one step (recomputed activations, gradients of activations,
  scratch)
- ``other``: the rest: inputs, buffers, blocks that outlive the step
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memstudy.profiler.events import CATEGORIES, PHASES, WORKSPACE, Event
from memstudy.profiler.report import MemoryReport


@dataclass
class Block:
    """A block of memory: its bytes, where it was allocated, and its category."""

    bytes: int
    module: str
    iteration: int
    in_forward: bool
    category: str = ""


def account(
    events: Iterable[Event], *, device: str, kind: str, categories: tuple[str, ...] = CATEGORIES, **others
) -> MemoryReport:
    """Replay ``events`` into a report.

    Parameters
    ----------
    events : iterable of Event
        In order of time. A ``free`` of an unknown block is ignored: the block is older than the recording. An ``alloc``
        of a block in use means that another thread, such as a communication library's, has freed the block.
    categories : tuple of str
        The names of all categories, ``temporary`` and ``other`` among them.
    device, kind, others
        Passed on to :class:`MemoryReport`.

    Raises
    ------
    ValueError
        When ``events`` has no iteration.
    """
    events = list(events)
    blocks = categorise(events)
    live = dict.fromkeys(categories, 0)
    forward_end: dict[str, int] = dict(live)
    modules: dict[str, int] = {}
    peak, peak_by_category, workspaces, workspaces_at_peak = 0, dict(live), 0, 0
    by_phase = dict.fromkeys(PHASES, 0)
    iteration_peaks: list[int] = []
    timeline: list[tuple[float, str, dict[str, int]]] = []
    alive: dict[int, Block] = {}
    phase, step_began = "build", 0.0

    def release(key: int) -> None:
        block = alive.pop(key)
        live[block.category] -= block.bytes

    for index, event in enumerate(events):
        if event.kind == "iteration":
            iteration_peaks.append(sum(live.values()))
            timeline, step_began = [], event.time_ms
        elif event.kind == "phase":
            if phase == "forward" and event.label == "backward":
                forward_end, modules = dict(live), _by_module(alive)
            phase = event.label
        elif event.kind == "alloc":
            if event.block in alive:
                release(event.block)
            block = alive[event.block] = blocks[index]
            live[block.category] += block.bytes
            workspaces += block.bytes if block.module == WORKSPACE else 0  # never freed
        elif event.kind == "free" and event.block in alive:
            release(event.block)
        else:
            continue
        total = sum(live.values())
        by_phase[phase] = max(by_phase[phase], total)
        if total > peak:
            peak, peak_by_category, workspaces_at_peak = total, dict(live), workspaces
        if iteration_peaks:
            iteration_peaks[-1] = max(iteration_peaks[-1], total)
            timeline.append((event.time_ms - step_began, phase, dict(live)))
    if not iteration_peaks:
        raise ValueError("no step was run: iterations must be at least 1")
    return MemoryReport(
        device=device,
        kind=kind,
        peak_bytes=peak,
        peak_by_category=peak_by_category,
        peak_by_phase=by_phase,
        forward_end_by_category=forward_end,
        iteration_peaks=tuple(iteration_peaks),
        timeline=timeline,
        modules=modules,
        workspace_bytes=workspaces_at_peak,
        events=events,
        **others,
    )


def categorise(events: list[Event]) -> dict[int, Block]:
    """The block of each ``alloc`` event, with its category, by the event's index."""
    made: dict[int, Block] = {}
    alive: dict[int, Block] = {}
    iteration, phase = 0, "build"

    def release(key: int) -> None:
        block = alive.pop(key)
        if not block.category:
            within = block.iteration == iteration and iteration > 0
            block.category = "temporary" if within else "other"

    for index, event in enumerate(events):
        if event.kind == "alloc":
            if event.block in alive:
                release(event.block)
            category = "other" if event.label == WORKSPACE else ""
            block = Block(event.bytes, event.label, iteration, phase == "forward", category)
            made[index] = alive[event.block] = block
        elif event.kind == "free" and event.block in alive:
            release(event.block)
        elif event.kind == "is" and event.block in alive:
            alive[event.block].category = event.label
        elif event.kind == "iteration":
            iteration += 1
            for block in alive.values():
                if block.category == "activations":  # no activation outlives its step
                    block.category = "other"
        elif event.kind == "phase":
            if phase == "forward" and event.label == "backward":
                for block in alive.values():
                    if not block.category and block.in_forward and block.iteration == iteration:
                        block.category = "activations"
            phase = event.label
    for block in alive.values():
        block.category = block.category or "other"
    return made


def _by_module(alive: dict[int, Block]) -> dict[str, int]:
    table: dict[str, int] = {}
    for block in alive.values():
        if block.category == "activations":
            table[block.module] = table.get(block.module, 0) + block.bytes
    return table
