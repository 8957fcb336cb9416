"""Notes what the ops of a step ask of a GPU, from which `time` makes the step's time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from memstudy.profiler.internals import OpOverload
from memstudy.profiler.time.ops import WAIT, Work, is_untimed, size_of, work_of


class Issued:
    """The work of each op, with its phase.

    Attributes
    ----------
    now : list of tuple
        The ops of the present step: ``(phase, work)``.
    by_step : list of list
        The ops of each step so far, the present one included; those of building are in none.
    untimed : set of str
        What the time of the steps leaves out or only bounds.
    """

    def __init__(self):
        self.now: list[tuple[str, Work]] = []
        self.by_step: list[list[tuple[str, Work]]] = []
        self.untimed: set[str] = set()
        self._works: dict[tuple, Work] = {}

    def begin_step(self) -> None:
        self.now = []
        self.by_step.append(self.now)

    def note(
        self, phase: str, func: OpOverload, args: tuple, kwargs: dict, result: object, key: tuple | None = None
    ) -> None:
        """Note an op; ops of equal ``key`` have equal work."""
        work = self._works.get(key) if key else None
        if work is None:
            work = replace(work_of(func, args, kwargs, result), name=func._schema.name)
            if is_untimed(func):
                self.untimed.add(func._schema.name)
            if key:
                self._works[key] = work
        self.now.append((phase, work))

    def note_compiled(self, phase: str, given: Iterable[torch.Tensor], made: Iterable[torch.Tensor]) -> None:
        """Note a compiled function: one kernel, which reads ``given``, writes it back, and writes ``made``."""
        moved = 2 * sum(map(size_of, given)) + sum(map(size_of, made))
        self.now.append((phase, Work("elementwise and norms", moved_bytes=moved, name="compiled function")))
        self.untimed.add("compiled functions (each counted as one kernel)")

    def note_transfer(self, phase: str, tensor: torch.Tensor, *, to_host: bool) -> None:
        """Note a copy between the GPU and the host's pinned memory; the host waits for one to itself."""
        size = tensor.numel() * tensor.element_size()
        self.now.append((phase, Work("transfers", moved_bytes=size, name=f"copy to {'host' if to_host else 'GPU'}")))
        if to_host:
            self.now.append((phase, WAIT))
