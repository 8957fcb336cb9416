"""Step time, predicted: what each op asks of the GPU (`ops`), and the time that takes (`cost`)."""

from memstudy.profiler.time.cost import StepTime, step_time
from memstudy.profiler.time.ops import VIEW, WAIT, Work, work_of

__all__ = ["VIEW", "WAIT", "StepTime", "Work", "step_time", "work_of"]
