"""What happens to memory in a step, one event after another.

Whoever knows what a step allocates (`measurement` on a real device, `recorder` on fake tensors) tells :class:`Event` s
in the order in which they happened; `accounting` turns them into a report. Both therefore mean the same by
"activations".
"""

from __future__ import annotations

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
