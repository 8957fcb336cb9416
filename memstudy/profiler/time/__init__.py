"""Step time, predicted: what each op asks of the GPU (`ops`), and the time that takes (`cost`)."""

from memstudy.profiler.time.cost import StepTime, step_time
from memstudy.profiler.time.ops import WAIT, Work, is_untimed, one_kernel, work_of

__all__ = ["WAIT", "StepTime", "Work", "is_untimed", "one_kernel", "step_time", "work_of"]
