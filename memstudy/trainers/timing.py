"""How a step is measured, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from memstudy.profiler import MemoryReport, measure
from memstudy.profiler.roles import Step

WARM_UP = 2  # steps before any is timed


def measured(build: Callable[[], Step], *, iterations: int) -> tuple[MemoryReport, Step]:
    """Measure the memory of what ``build`` makes, once made; give the step too, to be timed."""
    steps: list[Step] = []

    def kept() -> Step:
        steps.append(build())
        return steps[0]

    return measure(kept, iterations=iterations), steps[0]


def timed(step: Step) -> float:
    """Seconds that one ``step`` takes."""
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
