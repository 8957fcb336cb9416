"""Runs carried out: a frozen description in (`configs`), flat metrics out; Hugging Face's ``Trainer`` inside.

A run does up to two things. It *measures* a step on random tokens (memory needs no data) at its exact
size, and it *trains* on a data set and evaluates. The step that is measured is the Trainer's own:
its autocast, its loss, its optimizer.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from memstudy import data, layers, techniques
from memstudy.attention import Unavailable
from memstudy.configs import HubModelRun, LanguageModelRun, LayerRun, StepRun, parse_run
from memstudy.memory import MIB, Gpu, find_gpu, measure
from memstudy.memory.trace import Step

__all__ = ["HubModelRun", "LanguageModelRun", "LayerRun", "StepRun", "build", "execute", "load_data", "parse_run"]

TIMELINE_POINTS = 400
SAVE_STEPS = 100  # a training that is killed loses at most so many updates


def load_data(run: LanguageModelRun) -> data.LoadedData:
    """The data set that ``run`` trains on.

    Raises
    ------
    ValueError
        When there is no such data set, or it is not the one that the run was planned with.
    """
    loaded = data.load(run.dataset)
    if loaded.content_hash != run.data_hash:
        raise ValueError(
            f"data set {run.dataset!r} has content hash {loaded.content_hash}, the run was planned with "
            f"{run.data_hash or 'none'}: plan it again"
        )
    return loaded


def build(run: StepRun, *, gpu: str | Gpu | None = None, parts: int | None = None) -> Callable[[], Step]:
    """What ``memory.measure`` and ``memory.predict`` take: makes everything and returns the step.

    The step runs one whole update on random tokens, through ``Trainer.training_step``. ``gpu`` names the GPU that it
    is to be predicted for, so that what only a GPU can do is not refused. Of an accumulated batch only the first
    ``parts`` parts are run when they are given; two take all the memory that more do.

    Raises
    ------
    Unavailable
        When a technique, the attention or the optimizer cannot run on this machine, or on that GPU.
    """
    levers = run.levers()
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    techniques.check_available(levers, capability=card and card.compute_capability)
    if card and str(run.flags().get("optim", "")).startswith("paged_"):
        raise Unavailable("how much of a paged optimizer's state a GPU holds is its driver's to say: not predicted")

    def make() -> Step:
        set_seed(run.seed)
        trainer = _trainer(run, levers, Path("build/unused"), train_steps=1, predicted=card is not None)
        try:
            trainer.create_optimizer()
        except ImportError as error:
            raise Unavailable(" ".join(str(error).split())) from None
        # The model is on its device already; under fake tensors it could not be moved again.
        model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer, device_placement=[False, True])
        trainer.current_gradient_accumulation_steps = run.accumulation
        batch = run.make_batch()
        size = run.batch_size // run.accumulation
        split = [
            {name: tensor[start : start + size] for name, tensor in batch.items()}
            for start in range(0, run.batch_size, size)[:parts]
        ]

        def step():
            for part in split:
                trainer.training_step(model, part)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return make


def execute(run: StepRun | LayerRun, checkpoints: Path) -> dict:
    """Carry out ``run`` in this process.

    Parameters
    ----------
    run : StepRun or LayerRun
        What to do.
    checkpoints : Path
        Folder for the checkpoints of a training that may be killed; it resumes from the last.

    Returns
    -------
    dict
        ``metrics`` (flat, units in the names), ``curves`` and ``data``.

    Raises
    ------
    Unavailable
        When a technique, the attention or a peer cannot run on this machine.
    MemoryError
        When the measured peak passes ``run.budget_mib``.
    ValueError
        When the data set is not the one that the run names.
    """
    if isinstance(run, LayerRun):
        return layers.execute(run)
    result: dict = {"metrics": {}, "curves": {}, "data": {}}
    if run.measure_steps:
        _measure(run, result)
    if isinstance(run, LanguageModelRun) and run.train_steps:
        _train(run, checkpoints, result)
    return result


def _measure(run: StepRun, result: dict) -> None:
    if run.budget_mib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, run.budget_mib * MIB / total))
    made = build(run)
    steps: list[Step] = []

    def kept() -> Step:
        steps.append(made())
        return steps[0]

    report = measure(kept, iterations=2)
    if run.budget_mib and report.peak_allocated_mib > run.budget_mib:
        raise MemoryError(f"peak {report.peak_allocated_mib:.1f} MiB passes the budget of {run.budget_mib:g} MiB")
    times = [layers.timed(steps[0]) for _ in range(run.measure_steps)]
    median = statistics.median(times)
    result["metrics"] |= report.scalars() | {
        "step_time_ms": median * 1e3,
        "step_time_min_ms": min(times) * 1e3,
        "step_time_max_ms": max(times) * 1e3,
        "tokens_per_s": run.batch_size * run.seq_len / median,
        "n_parameters": sum(p.numel() for p in run.make_model().parameters()),
    }
    result["curves"] |= {
        "memory_timeline": report.timeline_mib(TIMELINE_POINTS),
        "activations_by_module_mib": {
            name: round(size / MIB, 3) for name, size in report.modules.items() if size > MIB / 1000
        },
        "step_times_ms": [round(t * 1e3, 3) for t in times],
    }


def _train(run: LanguageModelRun, checkpoints: Path, result: dict) -> None:
    levers = run.levers()
    techniques.check_available(levers)
    loaded = load_data(run)
    tokenizer = data.train_tokenizer(loaded.splits["train"]["text"], run.vocab_size)
    blocks = data.blocks(loaded, tokenizer, run.seq_len)
    set_seed(run.seed)
    trainer = _trainer(run, levers, checkpoints, train_steps=run.train_steps, train=blocks["train"])
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(checkpoints))
    seconds = time.perf_counter() - began
    history = trainer.state.log_history
    result["metrics"] |= {
        "train_time_s": seconds,
        "epochs": trainer.state.epoch,
        "epoch_steps": math.ceil(len(blocks["train"]) / run.batch_size),
        "train_loss": [row["loss"] for row in history if "loss" in row][-1],
    }
    for split in ("validation", "test"):
        rows = blocks[split].select(range(min(run.eval_blocks, len(blocks[split]))))
        loss = trainer.evaluate(rows, metric_key_prefix=split)[f"{split}_loss"]
        result["metrics"] |= {
            f"{split}_loss": loss,
            f"{split}_perplexity": math.exp(loss),
            f"{split}_tokens": len(rows) * (run.seq_len - 1),
        }
    result["curves"]["train_loss"] = [[row["step"], round(row["loss"], 4)] for row in history if "loss" in row]
    result["data"] = {
        "name": loaded.name,
        "source": loaded.source,
        "revision": loaded.revision,
        "content_hash": loaded.content_hash,
    }


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The last one that was not cut short: the Trainer writes ``trainer_state.json`` at the end."""
    whole: dict[int, Path] = {}
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with suppress(ValueError):
            whole[json.loads(state.read_text(encoding="utf-8"))["global_step"]] = state.parent
    return str(whole[max(whole)]) if whole else None


class _LeverTrainer(Trainer):
    """Hugging Face's Trainer with the techniques that are not flags."""

    def __init__(self, *args, levers, **kwargs):
        self._levers = levers
        super().__init__(*args, **kwargs)

    def compute_loss_context_manager(self):
        stack = ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        for lever in self._levers:
            stack.enter_context(lever.around_loss())
        return stack

    def _move_model_to_device(self, model, device):
        if model.device != device:
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model=None):
        if "bitsandbytes" in sys.modules:
            # It keeps which parameters, by their number, of all models so far have states of 32 bits, and those models.
            sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance().initialize()
        optimizer = super().create_optimizer(model)
        for lever in self._levers:
            lever.attach(self.model, optimizer)
        return optimizer


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


def _trainer(
    run: StepRun, levers, checkpoints: Path, *, train_steps: int, train=None, predicted: bool = False
) -> _LeverTrainer:
    flags = run.flags()
    for lever in levers:
        flags |= lever.flags()
    if predicted:
        flags.pop("tf32", None)  # refused without a GPU, and of no account to memory
    logging_steps = max(1, train_steps // 50)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=train_steps,
        per_device_train_batch_size=run.batch_size // run.accumulation,
        per_device_eval_batch_size=run.batch_size,
        learning_rate=run.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # clipping needs all gradients at once, which optimizer_in_backward never has
        seed=run.seed,
        logging_steps=logging_steps,
        save_strategy="steps" if train_steps > SAVE_STEPS else "no",
        # Where a loss is logged, the mean of those since the last: one cut in two by a kill would be another mean.
        save_steps=-(-SAVE_STEPS // logging_steps) * logging_steps,
        save_total_limit=1,
        prediction_loss_only=True,
        use_cpu=predicted or not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        **flags,
    )
    model = run.make_model()
    for lever in levers:
        lever.prepare(model)
    trainer = _LeverTrainer(model, arguments, data_collator=_collate, train_dataset=train, levers=levers)
    trainer.remove_callback(PrinterCallback)
    return trainer
