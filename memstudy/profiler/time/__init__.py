"""Step time, predicted: what each op asks of the GPU (`ops`), and the time that takes (`cost`)."""

from memstudy.profiler.time.cost import StepTime, TimedOp, schedule, step_time
from memstudy.profiler.time.ops import WAIT, Work, is_untimed, one_kernel, work_of

__all__ = ["WAIT", "StepTime", "TimedOp", "Work", "is_untimed", "one_kernel", "schedule", "step_time", "work_of"]
