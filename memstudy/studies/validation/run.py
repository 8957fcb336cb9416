"""A step on this machine's GPU, measured by CUDA's allocator, the device's own count and CUDA's clock."""

from __future__ import annotations

import itertools
import statistics
import subprocess
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt

from memstudy.attention import Unavailable
from memstudy.profiler import MIB
from memstudy.profiler.roles import Step
from memstudy.trainers.base import PROCESS_MIB, Run, megabytes
from memstudy.trainers.hub_model import HubModelRun
from memstudy.trainers.language_model import LanguageModelRun
from memstudy.trainers.timing import WARM_UP


class ValidationRun(Run):
    """The step of the run ``of``, measured as a prediction of the step is to be compared; ``timed_steps`` are timed.

    No profiler watches: the peaks are those of PyTorch's caching allocator, and the whole GPU's memory is what the
    device counts as used less what others used before.
    """

    kind: Literal["validation"] = "validation"
    of: Annotated[HubModelRun | LanguageModelRun, Field(discriminator="kind")]
    timed_steps: PositiveInt = 10

    def execute(self, checkpoints):
        if not torch.cuda.is_available():
            raise Unavailable("a validation needs a CUDA device")
        before = dict(ask_nvidia_smi("uuid", "memory.used"))
        step = self.of.build()()
        for _ in range(self.of.steps_to_settle() + WARM_UP):
            step()
        times = event_times_ms(step, self.timed_steps)
        free, total = torch.cuda.mem_get_info()
        uuid = str(torch.cuda.get_device_properties(0).uuid)
        others_mib = float(next((used for name, used in before.items() if name.endswith(uuid)), 0))
        reserved, used = torch.cuda.max_memory_reserved(), total - free
        metrics = {
            "peak_allocated_mib": torch.cuda.max_memory_allocated() / MIB,
            "peak_reserved_mib": reserved / MIB,
            "whole_gpu_mib": used / MIB - others_mib,
            "context_mib": (used - torch.cuda.memory_reserved()) / MIB - others_mib,
            "others_mib": others_mib,
            "step_time_ms": statistics.median(times),
            "step_time_min_ms": min(times),
            "step_time_max_ms": max(times),
        }
        return {"metrics": metrics, "curves": {"step_times_ms": times}, "data": {}}

    def needs(self, gpu=""):
        return {"mem_mb": megabytes(2 * PROCESS_MIB)} | ({"gpu": 1} if gpu else {})


def event_times_ms(step: Step, count: int) -> list[float]:
    """Times of ``count`` runs of ``step`` on the CUDA stream [ms], with the waits for the host between kernels."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [round(begin.elapsed_time(end), 4) for begin, end in itertools.pairwise(events)]


def ask_nvidia_smi(*fields: str) -> list[list[str]]:
    """What ``nvidia-smi --query-gpu`` says of each GPU, memory in MiB; nothing where it is not installed."""
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in said.strip().splitlines()]
