"""A run's step: built as its Trainer takes it, and predicted.

Apart from `trainers`, so that a prediction imports neither data sets nor what judges trainings.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from transformers import set_seed

from memstudy import inference, techniques
from memstudy.attention import Unavailable
from memstudy.configs import StepRun
from memstudy.hub_configs import InferenceRun
from memstudy.lever_trainer import make_trainer
from memstudy.profiler import Gpu, MemoryReport, find_gpu, predict
from memstudy.profiler.roles import Step
from memstudy.profiler.search import steps_to_settle


def build(run: StepRun, *, gpu: str | Gpu | None = None, parts: int | None = None) -> Callable[[], Step]:
    """What ``profiler.measure`` and ``profiler.predict`` take: makes everything and returns the step.

    The step runs one whole update on random tokens, through ``Trainer.training_step``; of an `InferenceRun` it is one
    forward pass. ``gpu`` names the GPU that it is to be predicted for, so that what only a GPU can do is not refused.
    Of an accumulated batch only the first ``parts`` parts are run when they are given; two take all the memory that
    more do.

    Raises
    ------
    Unavailable
        When a technique, the attention or the optimizer cannot run on this machine, or on that GPU.
    """
    if isinstance(run, InferenceRun):
        return inference.build(run)
    levers = run.levers()
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    techniques.check_available(levers, capability=card and card.compute_capability)
    if card and str(run.flags().get("optim", "")).startswith("paged_"):
        raise Unavailable("how much of a paged optimizer's state a GPU holds is its driver's to say: not predicted")

    def make() -> Step:
        set_seed(run.seed)
        trainer = make_trainer(run, run.make_model(), Path("build/unused"), train_steps=1, predicted=card is not None)
        try:
            trainer.create_optimizer()
        except ImportError as error:
            raise Unavailable(" ".join(str(error).split())) from None
        # As the Trainer does it. The model is on its device already; under fake tensors it could not be moved again.
        accelerator = trainer.accelerator
        if trainer.is_distributed_loading_by_transformers:
            model = accelerator.prepare_model(trainer.model, device_placement=False, evaluation_mode=True)
            optimizer = accelerator.prepare(trainer.optimizer, device_placement=[False])
            keep = trainer._defer_fsdp_gradient_reduction
        else:
            model, optimizer = accelerator.prepare(trainer.model, trainer.optimizer, device_placement=[False, False])
            keep = partial(accelerator.no_sync, model)
        trainer.current_gradient_accumulation_steps = run.accumulation
        batch = run.make_batch()
        size = run.batch_size // run.accumulation
        share, place = size // run.processes, trainer.args.process_index  # of each part
        starts = range(place * share, run.batch_size, size)[:parts]
        split = [{name: tensor[start : start + share] for name, tensor in batch.items()} for start in starts]

        def step():
            for number, part in enumerate(split, start=1):
                with nullcontext() if number == len(split) else keep():  # the last part's go to the other processes
                    trainer.training_step(model, part)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return make


def foretell(run: StepRun, gpu: str | Gpu | None, *, expandable_segments: bool = False) -> MemoryReport:
    """The step of ``run``, predicted for ``gpu``, or for this CPU where that is empty; raises as `build`."""
    return predict(
        build(run, gpu=gpu or None, parts=2),
        gpu=gpu or None,
        iterations=iterations(run),
        expandable_segments=expandable_segments,
        processes=run.processes,
    )


def iterations(run: StepRun) -> int:
    """How many of its steps show all that it takes."""
    return 1 if isinstance(run, InferenceRun) else steps_to_settle(run.processes)
