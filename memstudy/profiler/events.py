"""The memory events of a step.

`measurement` (on a real device) and `recorder` (on fake tensors) emit :class:`Event` s in order of time; `accounting`
turns events from either source into a report, so that "activations" has one meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MIB = 2**20
CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "temporary", "other")
PHASES = ("build", "forward", "backward", "optimizer")
WORKSPACE = "cuBLAS workspace"  # in an event's ``label`` instead of a module


@dataclass(frozen=True)
class Event:
    """One memory event: ``kind`` decides which of the other fields count.

    ``alloc`` (block, bytes, ``label`` = module, CUDA stream, where 0 is the compute stream; ``fused``: a fused kernel
    would not write the block) · ``free`` (block) · ``is``
    (block belongs to category ``label``) · ``phase`` (``label`` begins) · ``iteration`` (the next step begins) ·
    ``empty_cache`` (a caching allocator gives back its unused memory).
    """

    kind: str
    time_ms: float
    block: int = 0
    bytes: int = 0
    label: str = ""
    stream: int = 0
    fused: bool = False


def with_fused_kernels(events: Iterable[Event]) -> Iterator[Event]:
    """``events`` without the blocks that fused kernels would not write."""
    unwritten: set[int] = set()
    for event in events:
        if event.kind == "alloc" and event.fused:
            unwritten.add(event.block)
        elif event.block not in unwritten:
            yield event
        elif event.kind == "free":
            unwritten.remove(event.block)


@dataclass(frozen=True)
class OutOfMemory:
    """The first request that does not fit on the GPU: its bytes, phase, step and module.

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
