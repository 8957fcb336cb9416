"""What a run is: a frozen description of every choice, which can be built, predicted and carried out.

A run of a training step does up to two things. It *measures* a step on random tokens (memory needs no data) at its
exact size, and it *trains* on a data set and evaluates. The step that is measured is the Trainer's own: its autocast,
its loss, its optimizer. The hash of a description's JSON names the run.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_serializer, model_validator
from transformers import set_seed

from memstudy import machine, techniques
from memstudy.attention import Unavailable
from memstudy.profiler import MIB, Gpu, MemoryReport, find_gpu, predict
from memstudy.profiler.roles import Step
from memstudy.profiler.search import steps_to_settle
from memstudy.trainers.timing import measured, timed
from memstudy.trainers.trainer import make_trainer

TAKE_SHARDS = ("adamw_torch_fused", "adamw_torch", "sgd")  # of the Trainer's optimizers, see Technique.takes_shards
TIMELINE_POINTS = 400
PROCESS_MIB = 1500  # what a process holds before its first tensor, and what it reads in: Python, PyTorch, data
SLACK = 1.3  # over the predicted peak, for what an allocator keeps and for evaluation


class Run(BaseModel, ABC):
    """What all kinds of run share."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    experiment: str

    @property
    def n_processes(self) -> int:
        """How many processes carry it out together."""
        return 1

    def load_data(self) -> object:
        """The data set that it trains on, None where it trains on none.

        Raises
        ------
        ValueError
            When there is no such data set, it is not the one that the run was planned with, or its rows do not suit.
        """
        return None

    @abstractmethod
    def execute(self, checkpoints: Path) -> dict:
        """Carry it out in this process.

        Parameters
        ----------
        checkpoints : Path
            Folder for the checkpoints of a training that may be killed; it resumes from the last.

        Returns
        -------
        dict
            ``metrics`` (flat, units in the names), ``curves`` and ``data``. Of a run in emulated bfloat16 the metrics
            say so (``emulated``) and have no times: these would be the emulation's.

        Raises
        ------
        Unavailable
            When a technique, the attention or a peer cannot run on this machine.
        MemoryError
            When the measured peak passes the run's budget.
        ValueError
            When the data set is not the one that the run names.
        """

    @abstractmethod
    def needs(self, gpu: str = "") -> dict[str, int]:
        """What a job that carries it out has to ask for, predicted; in MB of 10^6 bytes, as schedulers count.

        Returns
        -------
        dict
            ``mem_mb``, of the host, of all processes; with ``gpu``, unless the run is itself a prediction, ``gpu`` (how
            many) and ``gpu_mem_mb`` (of each) too.
        """


def megabytes(mib: float) -> int:
    """``mib`` [MiB] in MB of 10^6 bytes, rounded up."""
    return math.ceil(mib * MIB / 1e6)


class StepRun(Run):
    """What every run of a training step chooses; sizes in tokens and sequences, memory in MiB.

    ``measure_steps`` timed steps are taken on random tokens. With ``budget_mib`` the measured step is refused when
    its peak passes the budget. Several ``processes``, each with a GPU where there are any, share every batch; a run in
    one is named without the field.
    """

    seq_len: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt
    techniques: tuple[str, ...] = ()
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    measure_steps: NonNegativeInt = 0
    budget_mib: Annotated[float, Field(gt=0)] | None = None
    seed: NonNegativeInt = 0
    processes: PositiveInt = 1

    @model_serializer(mode="wrap")
    def _named_as_ever(self, dump):
        return {name: value for name, value in dump(self).items() if name != "processes" or value > 1}

    @model_validator(mode="after")
    def _techniques_are_for_this(self):
        for text, lever in zip(self.techniques, self.levers(), strict=True):
            if not self._takes(lever):
                raise ValueError(f"technique {text!r} is for {'training' if lever.in_training else 'inference'} alone")
            if lever.several_processes and self.processes == 1:
                raise ValueError(f"technique {text!r} is for several processes, and processes=1")
        if "fsdp" in self.techniques and self.flags().get("optim", "sgd") not in TAKE_SHARDS:
            raise ValueError(f"optimizer {self.flags()['optim']!r} needs whole parameters and so excludes fsdp")
        if "optimizer_in_backward" in self.techniques and self.processes > 1 and "fsdp" not in self.techniques:
            raise ValueError("optimizer_in_backward updates before processes have exchanged gradients: add fsdp")
        return self

    @staticmethod
    def _takes(lever: techniques.Technique) -> bool:
        return lever.in_training

    @model_validator(mode="after")
    def _parts_are_equal(self):
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} does not divide batch_size={self.batch_size}")
        if self.batch_size % (self.accumulation * self.processes):
            raise ValueError(
                f"processes={self.processes} do not share batch_size={self.batch_size} "
                f"in {self.accumulation} parts evenly"
            )
        return self

    def levers(self) -> tuple[techniques.Technique, ...]:
        """The techniques as objects."""
        return techniques.parse(self.techniques)

    @property
    def accumulation(self) -> int:
        """In how many parts a batch is run."""
        flags = (lever.flags() for lever in self.levers())
        return next((f[k] for f in flags for k in f if k == "gradient_accumulation_steps"), 1)

    def emulated(self) -> bool:
        """Whether products are made in bfloat16, and this machine has no fast ones."""
        return any(lever.in_bf16 for lever in self.levers()) and not machine.bf16_is_fast()

    def flags(self) -> dict[str, object]:
        """Flags for ``transformers.TrainingArguments`` besides those of the techniques."""
        return {}

    @property
    def n_processes(self):
        return self.processes

    def build(self, *, gpu: str | Gpu | None = None, parts: int | None = None) -> Callable[[], Step]:
        """What ``profiler.measure`` and ``profiler.predict`` take: makes everything and returns the step.

        The step runs one whole update on random tokens, through ``Trainer.training_step``. ``gpu`` names the GPU that
        it is to be predicted for, so that what only a GPU can do is not refused. Of an accumulated batch only the
        first ``parts`` parts are run when they are given; two take all the memory that more do.

        Raises
        ------
        Unavailable
            When a technique, the attention or the optimizer cannot run on this machine, or on that GPU.
        """
        levers = self.levers()
        card = find_gpu(gpu) if isinstance(gpu, str) else gpu
        techniques.check_available(levers, capability=card and card.compute_capability)
        if card and str(self.flags().get("optim", "")).startswith("paged_"):
            raise Unavailable("how much of a paged optimizer's state a GPU holds is its driver's to say: not predicted")

        def make() -> Step:
            set_seed(self.seed)
            trainer = make_trainer(
                self, self.make_model(), Path("build/unused"), train_steps=1, predicted=card is not None
            )
            try:
                trainer.create_optimizer()
            except ImportError as error:
                raise Unavailable(" ".join(str(error).split())) from None
            # As the Trainer does it. The model is on its device already: under fake tensors it could not be moved.
            accelerator = trainer.accelerator
            if trainer.is_distributed_loading_by_transformers:
                model = accelerator.prepare_model(trainer.model, device_placement=False, evaluation_mode=True)
                optimizer = accelerator.prepare(trainer.optimizer, device_placement=[False])
                keep = trainer._defer_fsdp_gradient_reduction
            else:
                model, optimizer = accelerator.prepare(
                    trainer.model, trainer.optimizer, device_placement=[False, False]
                )
                keep = partial(accelerator.no_sync, model)
            trainer.current_gradient_accumulation_steps = self.accumulation
            batch = self.make_batch()
            size = self.batch_size // self.accumulation
            share, place = size // self.processes, trainer.args.process_index  # of each part
            starts = range(place * share, self.batch_size, size)[:parts]
            split = [{name: tensor[start : start + share] for name, tensor in batch.items()} for start in starts]

            def step():
                for number, part in enumerate(split, start=1):
                    with nullcontext() if number == len(split) else keep():  # the last part's go to the other processes
                        trainer.training_step(model, part)
                optimizer.step()
                optimizer.zero_grad()

            return step

        return make

    def steps_to_settle(self) -> int:
        """How many of its steps show all that it takes."""
        return steps_to_settle(self.processes)

    def foretell(self, gpu: str | Gpu | None = None, *, expandable_segments: bool = False) -> MemoryReport:
        """Its step, predicted for ``gpu``, or for this CPU where that is empty; raises as `build`."""
        return predict(
            self.build(gpu=gpu or None, parts=2),
            gpu=gpu or None,
            iterations=self.steps_to_settle(),
            expandable_segments=expandable_segments,
            processes=self.processes,
        )

    def execute(self, checkpoints):
        result = self.carry_out(checkpoints)
        return _without_times(result) if self.emulated() else result

    def carry_out(self, checkpoints: Path) -> dict:
        """As `execute`, with all times."""
        result: dict = {"metrics": {}, "curves": {}, "data": {}}
        if self.measure_steps:
            self._measure(result)
        return result

    def _measure(self, result: dict) -> None:
        if self.budget_mib and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.budget_mib * MIB / total))
        report, step = measured(self.build(), iterations=self.steps_to_settle())
        if self.budget_mib and report.peak_allocated_mib > self.budget_mib:
            raise MemoryError(f"peak {report.peak_allocated_mib:.1f} MiB passes the budget of {self.budget_mib:g} MiB")
        result["metrics"] |= report.scalars() | {"n_parameters": sum(p.numel() for p in self.make_model().parameters())}
        result["curves"] |= {
            "memory_timeline": report.timeline_mib(TIMELINE_POINTS),
            "activations_by_module_mib": {
                name: round(size / MIB, 3) for name, size in report.modules.items() if size > MIB / 1000
            },
        }
        if self.emulated():
            return
        times = [timed(step) for _ in range(self.measure_steps)]
        median = statistics.median(times)
        result["metrics"] |= {
            "step_time_ms": median * 1e3,
            "step_time_min_ms": min(times) * 1e3,
            "step_time_max_ms": max(times) * 1e3,
            "tokens_per_s": self.batch_size * self.seq_len / median,
        }
        result["curves"]["step_times_ms"] = [round(t * 1e3, 3) for t in times]

    def needs(self, gpu=""):
        try:
            report = self.foretell(gpu)
        except Unavailable:  # the run will say so itself
            return {"mem_mb": megabytes(PROCESS_MIB)}
        if gpu:
            gpus = {"gpu": self.processes, "gpu_mem_mb": megabytes(report.whole_gpu_mib)}
            return {"mem_mb": self.processes * megabytes(2 * PROCESS_MIB), **gpus}
        return {"mem_mb": self.processes * megabytes(PROCESS_MIB + SLACK * report.peak_allocated_mib)}


def _without_times(result: dict) -> dict:
    def timeless(values: dict) -> dict:
        return {name: value for name, value in values.items() if not name.endswith(("_ms", "_s"))}

    return result | {"metrics": timeless(result["metrics"]) | {"emulated": True}, "curves": timeless(result["curves"])}
