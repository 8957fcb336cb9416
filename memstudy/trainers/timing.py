"""Memory and time of a step, measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from memstudy.profiler import MemoryReport, measure
from memstudy.profiler.roles import Step

WARM_UP = 2  # untimed steps before the timed ones


def measured(build: Callable[[], Step], *, iterations: int) -> tuple[MemoryReport, Step]:
    """Measure the memory of the step that ``build`` returns; return the report and the step, for timing."""
    steps: list[Step] = []

    def kept() -> Step:
        steps.append(build())
        return steps[0]

    return measure(kept, iterations=iterations), steps[0]


def timed(step: Step) -> float:
    """Time of one ``step`` [s]."""
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
