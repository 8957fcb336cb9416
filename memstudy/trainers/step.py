"""A run of a training step: measured, predicted, and the base of runs that train.

A run *measures* a full-size step on random tokens (memory does not depend on the data), *trains* on a data set and
evaluates, or does both. The measured step is the Trainer's own: its autocast, its loss, its optimizer.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from transformers import DataCollatorWithFlattening, PreTrainedModel, set_seed
from transformers.modeling_utils import local_torch_dtype

from memstudy import machine, techniques
from memstudy.attention import Unavailable
from memstudy.profiler import MIB, Gpu, LengthsReport, MemoryReport, StepShape, find_gpu, over_lengths, predict
from memstudy.profiler.formulas import accumulated
from memstudy.profiler.roles import Step
from memstudy.profiler.search import steps_to_settle
from memstudy.profiler.values import MOST_IN_STEP
from memstudy.trainers.base import PROCESS_MIB, SLACK, Run, gpu_needs, megabytes, once_for_equal_steps
from memstudy.trainers.timing import measured, timed
from memstudy.trainers.trainer import make_trainer

TAKE_SHARDS = ("adamw_torch_fused", "adamw_torch", "sgd")  # optimizers that accept shards, see Technique.takes_shards
TIMELINE_POINTS = 400


class StepRun(Run):
    """Base class of runs of a training step; sizes in tokens and sequences, memory in MiB.

    ``measure_steps`` steps are timed on random tokens. A measured peak above ``budget_mib`` is an error. Several
    ``processes``, each with a GPU if the machine has any, share every batch.
    """

    seq_len: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt
    techniques: tuple[str, ...] = ()
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    measure_steps: NonNegativeInt = 0
    budget_mib: Annotated[float, Field(gt=0)] | None = None
    seed: NonNegativeInt = 0
    processes: PositiveInt = 1

    @model_validator(mode="after")
    def _techniques_are_for_this(self):
        for text, technique in zip(self.techniques, self.parsed_techniques(), strict=True):
            if not self._takes(technique):
                raise ValueError(
                    f"technique {text!r} is for {'training' if technique.in_training else 'inference'} alone"
                )
            if technique.several_processes and self.processes == 1:
                raise ValueError(f"technique {text!r} is for several processes, and processes=1")
            if technique.one_process and self.processes > 1:
                raise ValueError(f"technique {text!r} is for one process, and processes={self.processes}")
        if "fsdp" in self.techniques and self.flags().get("optim", "sgd") not in TAKE_SHARDS:
            raise ValueError(f"optimizer {self.flags()['optim']!r} needs whole parameters and so excludes fsdp")
        if "optimizer_in_backward" in self.techniques and self.processes > 1 and "fsdp" not in self.techniques:
            raise ValueError("optimizer_in_backward updates before processes have exchanged gradients: add fsdp")
        return self

    @staticmethod
    def _takes(technique: techniques.Technique) -> bool:
        return technique.in_training

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

    def parsed_techniques(self) -> tuple[techniques.Technique, ...]:
        """The techniques as objects."""
        return techniques.parse(self.techniques)

    @property
    def accumulation(self) -> int:
        """Number of parts that a batch is run in."""
        return techniques.accumulation_of(self.parsed_techniques())

    def emulated(self) -> bool:
        """Whether a technique multiplies in bfloat16 and this machine only emulates bfloat16."""
        return any(technique.in_bf16 for technique in self.parsed_techniques()) and not machine.bf16_is_fast()

    def flags(self) -> dict[str, object]:
        """Flags for ``transformers.TrainingArguments`` besides those of the techniques."""
        return {}

    @property
    def n_processes(self):
        return self.processes

    def build(
        self, *, gpu: str | Gpu | None = None, parts: int | None = None, shapes: Sequence[StepShape] = ()
    ) -> Callable[[], Step]:
        """The argument of ``profiler.measure`` and ``profiler.predict``: sets up the run and returns its step.

        The step runs one whole update on random tokens, through ``Trainer.training_step``. ``gpu`` is the GPU to
        predict for; techniques that need a GPU are then allowed. ``parts`` limits an accumulated batch to its first
        parts; two parts reach the peak of any larger number. With ``shapes``, the n-th step makes a batch of the n-th
        shape, whatever the run's own.

        Raises
        ------
        Unavailable
            When a technique, the attention or the optimizer cannot run on this machine, or on ``gpu``.
        """
        chosen = self.parsed_techniques()
        card = find_gpu(gpu) if isinstance(gpu, str) else gpu
        techniques.check_available(chosen, capability=card and card.compute_capability)
        if card and getattr(self, "attention", "") == "flash" and card.compute_capability < (8, 0):
            raise Unavailable(f"attention flash needs a GPU from Ampere on (capability 8.0), and this is {card.name}")
        if card and str(self.flags().get("optim", "")).startswith("paged_"):
            raise Unavailable(
                "a paged optimizer is not predicted: the GPU driver decides where its state is kept; technique "
                "paged_adamw_8bit is predicted without that state"
            )

        def make() -> Step:
            set_seed(self.seed)
            unused = Path(tempfile.gettempdir(), "memstudy-unused")  # the Trainer wants a folder
            with local_torch_dtype(next(filter(None, (t.weights_dtype for t in chosen)), torch.float32)):
                model = self.make_model()
            self._check_positions(model)
            trainer = make_trainer(self, model, unused, train_steps=1, predicted=card is not None)
            try:
                trainer.create_optimizer()
            except ImportError as error:
                raise Unavailable(" ".join(str(error).split())) from None
            # As the Trainer does, but without device placement: a model of fake tensors cannot be moved.
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
            batch = {} if shapes else self.make_batch()
            waiting = iter(shapes)
            size = self.batch_size // self.accumulation
            share, place = size // self.processes, trainer.args.process_index  # this process's share of each part
            starts = range(place * share, self.batch_size, size)[:parts]
            split = [{name: tensor[start : start + share] for name, tensor in batch.items()} for start in starts]

            def step():
                shape = next(waiting) if shapes else None
                if shape:
                    trainer.current_gradient_accumulation_steps = 2 if shape.part else 1  # any number above 1
                for number, part in enumerate([self.batch_of(shape)] if shape else split, start=1):
                    with nullcontext() if number == len(split) else keep():  # only the last part exchanges gradients
                        trainer.training_step(model, part)
                if not shape or shape.part in ("", "last"):
                    optimizer.step()
                    optimizer.zero_grad()

            step.n_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
            return step

        return make

    def batch_of(self, shape: StepShape) -> dict[str, torch.Tensor]:
        """A batch of ``shape`` as a collator makes it: with a mask, or with positions where sequences share a row."""
        attention = getattr(self, "attention", "")
        if shape.rows * shape.tokens > MOST_IN_STEP and (shape.padded or shape.sequences) and attention != "flash":
            raise ValueError(
                f"a batch of {shape.rows} × {shape.tokens} tokens, padded or in one row: up to {MOST_IN_STEP:,} can be "
                "followed, take a smaller batch"
            )
        if shape.sequences:
            lengths = [len(part) for part in np.array_split(range(shape.tokens), shape.sequences)]
            collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
            return collate([{"input_ids": [0] * length} for length in lengths])
        batch = self.model_copy(update={"batch_size": shape.rows, "seq_len": shape.tokens}).make_batch()
        mask = torch.ones_like(batch["input_ids"])
        if shape.padded:
            mask[-1, -1] = 0  # that anything is padded decides the kernels, and not how much
        return batch | {"attention_mask": mask, "labels": batch["labels"].clone()}

    def _check_positions(self, model: PreTrainedModel) -> None:
        more = sum(technique.more_tokens for technique in self.parsed_techniques())
        positions = getattr(model.config, "max_position_embeddings", None)
        if more and positions and self.seq_len + more > positions:
            raise ValueError(
                f"seq_len={self.seq_len} and {more} virtual tokens are more than the model's {positions} positions: "
                f"take seq_len={positions - more}"
            )

    def foretell_lengths(
        self,
        shapes: Sequence[StepShape],
        gpu: str | Gpu | None = None,
        **choices,
    ) -> LengthsReport:
        """Predict steps with batches of ``shapes``; raises as `build`. ``choices`` are those of `over_lengths`.

        With accumulation, each of ``shapes`` is a part of an update, and so is each step of the report.
        """
        if self.processes > 1:
            raise ValueError(
                f"processes={self.processes}: batches of unequal lengths are predicted for one process, whose share "
                "each process takes: leave --processes out and give one process's batch"
            )
        return over_lengths(
            lambda some: self.build(gpu=gpu or None, shapes=some),
            accumulated(shapes, self.accumulation),
            gpu=gpu or None,
            **choices,
        )

    def steps_to_settle(self) -> int:
        """Number of steps after which memory no longer changes."""
        return steps_to_settle(self.processes)

    def foretell(self, gpu: str | Gpu | None = None, *, expandable_segments: bool = False) -> MemoryReport:
        """Predict a step on ``gpu``, or on this CPU if ``gpu`` is empty; raises as `build`."""
        return predict(
            self.build(gpu=gpu or None, parts=2),
            gpu=gpu or None,
            iterations=self.steps_to_settle(),
            expandable_segments=expandable_segments,
            processes=self.processes,
            repeats=max(0, self.accumulation - 2),
        )

    def execute(self, checkpoints):
        result = self.carry_out(checkpoints)
        return _without_times(result) if self.emulated() else result

    def carry_out(self, checkpoints: Path) -> dict:
        """As `execute`, but keeps the times of an emulated run."""
        result: dict = {"metrics": {}, "curves": {}, "data": {}}
        if self.measure_steps:
            self._measure(result)
        return result

    def _measure(self, result: dict) -> None:
        if self.budget_mib and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.budget_mib * MIB / total))
        report, step = measured(self.build(), iterations=self.steps_to_settle())
        self.check_budget(report.peak_allocated_mib)
        result["metrics"] |= report.scalars() | {"n_parameters": step.n_parameters}
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

    def check_budget(self, peak_mib: float) -> None:
        """Raise ``MemoryError`` when ``peak_mib`` [MiB] passes the run's budget, if it has one."""
        if self.budget_mib and peak_mib > self.budget_mib:
            raise MemoryError(f"peak {peak_mib:.1f} MiB passes the budget of {self.budget_mib:g} MiB")

    def n_steps(self) -> int:
        """Number of steps that the run takes, without evaluation."""
        return self.steps_to_settle() + self.measure_steps if self.measure_steps else 0

    def needs(self, gpu=""):
        card = find_gpu(gpu) if gpu else None
        try:
            report = once_for_equal_steps(self, gpu, partial(self.foretell, card))
        except (Unavailable, ValueError):  # the run itself reports why
            return {"mem_mb": megabytes(PROCESS_MIB)}
        except (NotImplementedError, ImportError):  # no fake tensors for it, or no package here: ask for a whole card
            host = {"mem_mb": self.processes * megabytes(2 * PROCESS_MIB)}
            return host | ({"gpu": self.processes, "gpu_mem_mb": megabytes(card.memory_mib)} if card else {})
        if gpu:
            host = {"mem_mb": self.processes * megabytes(2 * PROCESS_MIB)}
            return host | gpu_needs(report, self.n_steps(), processes=self.processes)
        return {"mem_mb": self.processes * megabytes(PROCESS_MIB + SLACK * report.peak_allocated_mib)}


def _without_times(result: dict) -> dict:
    def timeless(values: dict) -> dict:
        return {name: value for name, value in values.items() if not name.endswith(("_ms", "_s"))}

    return result | {"metrics": timeless(result["metrics"]) | {"emulated": True}, "curves": timeless(result["curves"])}
