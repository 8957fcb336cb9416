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


@dataclass(frozen=True, slots=True)
class Event:
    """One memory event: ``kind`` decides which of the other fields count.

    ``alloc`` (block, bytes, ``label`` = module, CUDA stream, where 0 is the compute stream; ``in_register``: a fused
    kernel would not write the block) · ``free`` (block) · ``is`` (block belongs to category ``label``) · ``phase``
    (``label`` begins) · ``iteration`` (the next step begins) · ``empty_cache`` (a caching allocator gives back its
    unused memory). A prediction's event has the number of ops ``issued`` before it, and the number of the fused
    ``kernel`` that it would belong to, or 0.

    A replay of the caching allocator gives each ``alloc`` its ``address``, and its block's size as ``bytes``, in place
    of the bytes ``requested``. It adds the kinds ``segment_alloc``, ``segment_free`` and, of expandable segments,
    ``segment_map``, ``segment_unmap`` (address, bytes, ``label`` = small or large, stream), and ``oom`` (bytes) before
    the first request that does not fit.
    """

    kind: str
    time_ms: float
    block: int = 0
    bytes: int = 0
    label: str = ""
    stream: int = 0
    issued: int = 0
    address: int = 0
    requested: int = 0
    in_register: bool = False
    kernel: int = 0


def with_fused_kernels(events: Iterable[Event]) -> Iterator[Event]:
    """``events`` as fused kernels would cause them: without what stays in registers, and each written in place.

    A kernel that reads a block for the last time writes over it: its results come after what it frees.
    """
    in_registers: set[int] = set()
    written: dict[int, Event] = {}
    kernel = 0
    for event in events:
        if event.kernel != kernel:
            yield from written.values()
            written, kernel = {}, event.kernel
        if event.kind == "alloc" and event.in_register:
            in_registers.add(event.block)
        elif event.kind == "alloc" and kernel:
            written[event.block] = event
        elif event.kind == "free" and event.block in written:
            del written[event.block]  # one of several results, which nothing reads
        elif event.block not in in_registers:
            yield event
        elif event.kind == "free":
            in_registers.remove(event.block)
    yield from written.values()


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
