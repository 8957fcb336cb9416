"""From a stream of memory events to a report: the one place where categories and phases are defined.

Whoever knows what a step allocates (`trace` on a real device, `predict` on fake tensors) tells it as
:class:`Event` s in the order in which they happened; :func:`account` turns them into a
:class:`MemoryReport`. Both therefore mean the same by "activations".

Categories of a block of memory:

- ``parameters``: storage of a registered ``nn.Parameter``
- ``gradients``: storage of a parameter's ``.grad``
- ``optimizer``: storage of a tensor in an optimizer's ``state``
- ``activations``: allocated in a forward pass and still alive when its backward pass begins
- ``temporary``: any other block allocated and freed within one step (recomputed activations, gradients of activations,
  scratch)
- ``other``: the rest: inputs, buffers, what outlives the step
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20
CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "temporary", "other")
PHASES = ("build", "forward", "backward", "optimizer")
WORKSPACE = "cuBLAS workspace"  # in an event's place for the module


@dataclass(frozen=True)
class Event:
    """One thing that happened: ``kind`` says which of the other fields count.

    ``alloc`` (block, bytes, module, CUDA stream, of which 0 computes) · ``free`` (block) · ``is`` (block has been seen
    to be of category ``label``) · ``phase`` (``label`` begins) · ``iteration`` (the next step begins) · ``empty_cache``
    (a caching allocator gives back what it does not use).
    """

    kind: str
    time_ms: float
    block: int = 0
    bytes: int = 0
    label: str = ""
    stream: int = 0


@dataclass(frozen=True)
class OutOfMemory:
    """The first request that a GPU could not have met: its bytes, and the phase, the step and the module it came in.

    ``iteration`` counts steps from 1; 0 is building.
    """

    bytes: int
    phase: str
    iteration: int
    module: str

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        when = f"in {self.phase} of step {self.iteration}{where}" if self.iteration else "moving the model to the GPU"
        return f"out of memory {when}, asking for {self.bytes / MIB:,.1f} MiB"


@dataclass(frozen=True)
class MemoryReport:
    """What a training step held in memory, in bytes; ``*_mib`` in MiB (2^20 bytes).

    Attributes
    ----------
    device : str
        Where it was measured, or for which it was predicted.
    kind : str
        ``measured`` or ``predicted``.
    peak_bytes : int
        Most bytes allocated at once, over building and all steps.
    peak_by_category : dict
        The same moment, by category; the values add up to ``peak_bytes``.
    peak_by_phase : dict
        Most bytes allocated at once in each phase, over all steps.
    forward_end_by_category : dict
        When the last forward pass had ended and its backward pass began.
    iteration_peaks : tuple of int
        The peak of each step; the first has no optimizer state before its end.
    timeline : list of tuple
        ``(time since the step began [ms], phase, bytes by category)`` after each event of the last step.
    modules : dict
        Bytes of activations alive at the end of the last forward pass, by the module that made them.
    peak_reserved_bytes : int or None
        What the CUDA caching allocator had taken from the device at most; None elsewhere.
    requested_bytes : int or None
        On a predicted GPU: the most that tensors alone asked for at once, before the allocator rounds it up and without
        what kernels use inside themselves.
    workspace_bytes : int
        On a predicted GPU: cuBLAS's workspaces among ``peak_bytes``, counted under ``other``.
    context_bytes : int
        On a predicted GPU: what the process takes besides the allocator's segments.
    memory_bytes : int or None
        All memory of the predicted GPU.
    out_of_memory : OutOfMemory or None
        On a predicted GPU: the request that would fail there; None when the step fits.
    unverified : tuple of str
        On a predicted GPU: ops that no rule covers, predicted as their CPU kernels, and what is not counted.
    """

    device: str
    kind: str
    peak_bytes: int
    peak_by_category: dict[str, int]
    peak_by_phase: dict[str, int]
    forward_end_by_category: dict[str, int]
    iteration_peaks: tuple[int, ...]
    timeline: list[tuple[float, str, dict[str, int]]]
    modules: dict[str, int]
    peak_reserved_bytes: int | None = None
    requested_bytes: int | None = None
    workspace_bytes: int = 0
    context_bytes: int = 0
    memory_bytes: int | None = None
    out_of_memory: OutOfMemory | None = None
    unverified: tuple[str, ...] = ()

    @property
    def peak_allocated_mib(self) -> float:
        """Most memory allocated at once [MiB]."""
        return self.peak_bytes / MIB

    @property
    def most_by_category(self) -> dict[str, int]:
        """Most bytes of each category at any time of the last step; at different times, so they don't add up."""
        return {name: max(live[name] for _, _, live in self.timeline) for name in CATEGORIES}

    @property
    def peak_reserved_mib(self) -> float | None:
        """Most memory reserved by the caching allocator [MiB]; None without one."""
        return None if self.peak_reserved_bytes is None else self.peak_reserved_bytes / MIB

    @property
    def whole_gpu_mib(self) -> float | None:
        """What the GPU's own monitor would show of the process [MiB]: segments and context; None without a GPU."""
        return None if self.peak_reserved_bytes is None else (self.peak_reserved_bytes + self.context_bytes) / MIB

    def waterfall_mib(self) -> dict[str, float]:
        """The whole of the peak in parts that add up [MiB]: the categories, then what a GPU adds to them.

        ``other`` without the workspace; ``fragmentation`` is what the allocator has reserved beyond its peak.
        """
        parts = dict(self.peak_by_category)
        if self.peak_reserved_bytes is not None:
            parts["other"] -= self.workspace_bytes
            parts["workspace"] = self.workspace_bytes
            parts["fragmentation"] = self.peak_reserved_bytes - self.peak_bytes
            parts["context"] = self.context_bytes
        return {name: size / MIB for name, size in parts.items()}

    def scalars(self) -> dict[str, float]:
        """Flat metrics for a record, each with its unit in its name."""
        peaks = self.iteration_peaks
        row = {
            "peak_allocated_mib": self.peak_allocated_mib,
            "step_peak_mean_mib": sum(peaks) / len(peaks) / MIB,
            "step_peak_max_mib": max(peaks) / MIB,
        }
        row |= {f"peak_{name}_mib": n / MIB for name, n in self.peak_by_category.items()}
        row |= {f"most_{name}_mib": n / MIB for name, n in self.most_by_category.items()}
        row |= {f"peak_in_{name}_mib": n / MIB for name, n in self.peak_by_phase.items()}
        row |= {f"forward_end_{name}_mib": n / MIB for name, n in self.forward_end_by_category.items()}
        if self.peak_reserved_mib is not None:
            row["peak_reserved_mib"] = self.peak_reserved_mib
        return row

    def timeline_mib(self, points: int) -> list[list]:
        """The timeline thinned to ``points`` rows ``[ms, phase, MiB of each category]``.

        Of each stretch the highest moment is kept, so a thinned timeline has the step's peak.
        """
        stretch = max(1, -(-len(self.timeline) // points))
        highest = (
            max(self.timeline[i : i + stretch], key=lambda row: sum(row[2].values()))
            for i in range(0, len(self.timeline), stretch)
        )
        return [
            [round(ms, 3), phase, *(round(live[name] / MIB, 3) for name in CATEGORIES)] for ms, phase, live in highest
        ]


@dataclass
class _Block:
    bytes: int
    module: str
    iteration: int
    in_forward: bool
    category: str = ""


def account(events: Iterable[Event], *, device: str, kind: str, **others) -> MemoryReport:
    """Replay ``events`` and report.

    Parameters
    ----------
    events : iterable of Event
        In order. A ``free`` of a block that was never allocated is of memory from before: ignored. An ``alloc`` of one
        that is in use says that it has been freed by another thread, such as a communication library's.
    device, kind, others
        Passed on to :class:`MemoryReport`.

    Raises
    ------
    ValueError
        When there is no iteration among the events.
    """
    events = list(events)
    blocks = _categorise(events)
    live = dict.fromkeys(CATEGORIES, 0)
    forward_end: dict[str, int] = dict(live)
    modules: dict[str, int] = {}
    peak, peak_by_category, workspaces, workspaces_at_peak = 0, dict(live), 0, 0
    by_phase = dict.fromkeys(PHASES, 0)
    iteration_peaks: list[int] = []
    timeline: list[tuple[float, str, dict[str, int]]] = []
    alive: dict[int, _Block] = {}
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
            workspaces += block.bytes if block.module == WORKSPACE else 0  # which is kept for good
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
        **others,
    )


def _categorise(events: list[Event]) -> dict[int, _Block]:
    """The block of each ``alloc`` event, by the event's index, with its category decided."""
    made: dict[int, _Block] = {}
    alive: dict[int, _Block] = {}
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
            block = _Block(event.bytes, event.label, iteration, phase == "forward", category)
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


def _by_module(alive: dict[int, _Block]) -> dict[str, int]:
    table: dict[str, int] = {}
    for block in alive.values():
        if block.category == "activations":
            table[block.module] = table.get(block.module, 0) + block.bytes
    return table
