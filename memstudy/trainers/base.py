"""Runs: frozen descriptions of every choice, which can be built, predicted and executed.

The hash of a description's JSON names the run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, model_serializer

from memstudy.profiler import MIB, MemoryReport

PROCESS_MIB = 1500  # host memory of a process besides tensors: Python, PyTorch, data
SLACK = 1.3  # factor on the predicted peak, for the allocator's cache and for evaluation
START_MINUTES = 10  # of a job before its first step: imports, weights, data, tokenizer
MARGIN = 2  # factor on the upper end of the predicted time, for evaluation and whatever else is beside the steps

# Fields that change how many steps are taken, and on what, but not the memory and time of one.
BESIDE_THE_STEP = {
    "experiment", "seed", "learning_rate", "measure_steps", "budget_mib", "dataset", "data_hash", "train_steps",
    "schedule", "train_rows", "epochs", "eval_rows", "eval_blocks", "validations",
}  # fmt: skip
_FORETOLD: dict[tuple[str, str], object] = {}
T = TypeVar("T")


class Run(BaseModel, ABC):
    """Base class of all runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    experiment: str
    timed: ClassVar[bool] = True  # takes times, which other runs beside it would spoil

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump):
        """The kind and the choices that differ from their defaults: a new field with a default renames no record."""
        defaults = {
            name: field.get_default(call_default_factory=True) for name, field in type(self).model_fields.items()
        }
        chosen = {name: value for name, value in dump(self).items() if getattr(self, name) != defaults[name]}
        return {"kind": self.kind} | chosen

    @property
    def n_processes(self) -> int:
        """Number of processes that execute the run together."""
        return 1

    def load_data(self) -> object:
        """The training data set, or None for a run that does not train.

        Raises
        ------
        ValueError
            For a missing data set, one that changed since the run was planned, or rows that do not suit the run.
        """
        return None

    @abstractmethod
    def execute(self, checkpoints: Path) -> dict:
        """Execute the run in this process.

        Parameters
        ----------
        checkpoints : Path
            Folder for training checkpoints; a killed training resumes from the last one.

        Returns
        -------
        dict
            ``metrics`` (flat, units in the names), ``curves`` and ``data``. A run in emulated bfloat16 has the metric
            ``emulated`` and no times, which would be those of the emulation.

        Raises
        ------
        Unavailable
            When a technique, the attention or a peer cannot run on this machine.
        MemoryError
            When the measured peak exceeds the run's budget.
        ValueError
            When the data set is not the one that the run names.
        """

    @abstractmethod
    def needs(self, gpu: str = "") -> dict[str, object]:
        """Predict what a scheduler job must request for the run; memory in MB (10^6 bytes).

        Returns
        -------
        dict
            ``mem_mb``, host memory of all processes; with ``gpu``, unless the run is itself a prediction, also those of
            `gpu_needs`.
        """


def once_for_equal_steps(run: Run, gpu: str, foretell: Callable[[], T]) -> T:
    """What ``foretell`` returns for ``run`` on ``gpu``, called once in this process for all runs with the same step."""
    step = run.model_dump_json(exclude=BESIDE_THE_STEP), gpu
    if step not in _FORETOLD:
        _FORETOLD[step] = foretell()
    return _FORETOLD[step]


def gpu_needs(report: MemoryReport, n_steps: int, *, processes: int = 1) -> dict[str, object]:
    """What a job must request for ``n_steps`` steps as predicted in ``report``.

    Returns
    -------
    dict
        ``gpu`` (number of GPUs), ``gpu_mem_mb`` (memory of each), ``fits``. If the GPU's speed is known, also
        ``runtime`` [minutes], with `MARGIN` and `START_MINUTES`; ``gpu_s``, the seconds of the steps by a fast, a
        typical and a slow host, 0 if the step does not fit and the run ends at once; and ``untimed``, what they leave
        out.
    """
    fits = report.out_of_memory is None
    needs = {"gpu": processes, "gpu_mem_mb": megabytes(report.whole_gpu_mib), "fits": fits}
    if report.time is None:
        return needs
    time = report.time
    seconds = [round(fits * n_steps * ms / 1e3, 3) for ms in (time.low_ms, time.step_time_ms, time.high_ms)]
    runtime = START_MINUTES + math.ceil(MARGIN * seconds[-1] / 60)
    return needs | {"runtime": runtime, "gpu_s": seconds, "untimed": list(time.untimed)}


def megabytes(mib: float) -> int:
    """``mib`` [MiB] in MB of 10^6 bytes, rounded up."""
    return math.ceil(mib * MIB / 1e6)


class ForetellingRun(Run):
    """A run that only predicts: it takes no times, and its process holds objects but no tensors' bytes."""

    timed: ClassVar[bool] = False

    def needs(self, gpu=""):
        return {"mem_mb": megabytes(2 * PROCESS_MIB)}  # the trace of a step has millions of objects
