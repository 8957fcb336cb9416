"""Hugging Face's Trainer with the techniques that have no flag, and one set of arguments for all runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

if TYPE_CHECKING:
    from memstudy.trainers.step import StepRun

SAVE_STEPS = 100  # updates between checkpoints, rounded up to whole logging intervals


def last_whole_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint in ``folder``: the Trainer writes ``trainer_state.json`` last."""
    whole: dict[int, Path] = {}
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with suppress(ValueError):
            whole[json.loads(state.read_text(encoding="utf-8"))["global_step"]] = state.parent
    return str(whole[max(whole)]) if whole else None


class _ByLength(LengthGroupedSampler):
    """Orders rows by seed and epoch alone, so that a resumed training continues with the same rows."""

    def __init__(self, like: LengthGroupedSampler, seed: int):
        super().__init__(like.batch_size, lengths=like.lengths)
        self._seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self._seed + epoch)


class Clock(TrainerCallback):
    """Training time without evaluations; continues from the time in a checkpoint's log.

    Attributes
    ----------
    paused : float [s]
        Time since training began that does not count.
    """

    def on_train_begin(self, args, state, control, **_):
        self._before = next((row["trained_s"] for row in reversed(state.log_history) if "trained_s" in row), 0.0)
        self.paused, self._began = 0.0, time.perf_counter()

    def on_evaluate(self, args, state, control, metrics, **_):
        self.paused += next(seconds for name, seconds in metrics.items() if name.endswith("_runtime"))

    def seconds(self) -> float:
        """Training time so far."""
        return self._before + time.perf_counter() - self._began - self.paused


class TechniqueTrainer(Trainer):
    """Hugging Face's Trainer with the techniques that have no flag."""

    def __init__(self, *args, techniques, predicted, **kwargs):
        self._techniques, self._predicted = techniques, predicted
        self.clock = Clock()
        super().__init__(*args, **kwargs)
        self.add_callback(self.clock)

    def go_on(self) -> float:
        """Train to the end, from the last complete checkpoint if there is one; return the training time [s]."""
        self.train(resume_from_checkpoint=last_whole_checkpoint(Path(self.args.output_dir)))
        return self.clock.seconds()

    def curve(self, name: str) -> list[list[float]]:
        """What training logged as ``name``: ``[updates, value]`` each."""
        return [[row["step"], round(row[name], 4)] for row in self.state.log_history if name in row]

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs["trained_s"] = self.clock.seconds()
        super().log(logs, *args, **kwargs)

    def compute_loss_context_manager(self):
        stack = ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        for technique in self._techniques:
            stack.enter_context(technique.around_loss())
        return stack

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a part of an accumulated batch, weighted by the part's share of the batch's tokens.

        Many transformers models accept ``num_items_in_batch`` and ignore it, and the Trainer then adds up the means of
        the parts. Without this argument every model returns the mean of its part.
        """
        whole = return_outputs or self.current_gradient_accumulation_steps == 1  # only evaluation asks for outputs
        if whole or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        share = self._get_num_items_in_batch([inputs], self.args.device) / num_items_in_batch
        return super().compute_loss(model, inputs) * share

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        return _ByLength(sampler, self.args.seed) if isinstance(sampler, LengthGroupedSampler) else sampler

    def _get_eval_sampler(self, eval_dataset):
        # The Trainer would group these rows by length like the training rows, and reorder the predictions.
        return SequentialSampler(eval_dataset)

    def _move_model_to_device(self, model, device):
        if model.device != device:
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model=None):
        if "bitsandbytes" in sys.modules:
            # Its manager keeps earlier models and would apply their 32-bit settings by parameter position.
            sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance().initialize()
        optimizer = super().create_optimizer(model)
        for technique in self._techniques:
            if self._predicted:
                technique.as_on_a_gpu(optimizer)
            technique.attach(self.model, optimizer)
        return optimizer


def collate_blocks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of blocks of tokens, which are their own labels."""
    tokens = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


def make_trainer(
    run: StepRun,
    model: PreTrainedModel,
    checkpoints: Path,
    *,
    train_steps: int,
    train=None,
    collate: Callable = collate_blocks,
    validation=None,
    validations: int = 0,
    predicted: bool = False,
) -> TechniqueTrainer:
    """The Trainer for ``run``; applies the run's techniques to ``model``.

    Parameters
    ----------
    run : StepRun
    model : PreTrainedModel
    checkpoints : Path
        Folder for checkpoints, which only trainings of more than ``SAVE_STEPS`` updates write.
    train_steps : int
        Number of updates.
    train : Dataset, optional
        Rows to train on; None to run single steps.
    collate : callable
        Makes a batch from rows.
    validation : Dataset, optional
        Rows whose loss is computed ``validations`` times in training.
    predicted : bool
        True for a prediction for a GPU, which runs on the CPU.

    Raises
    ------
    ValueError
        When the number of processes started is not ``run.processes``.
    """
    chosen = run.parsed_techniques()
    flags = run.flags()
    for technique in chosen:
        flags |= technique.flags()
    scaled = predicted and flags.pop("fp16", False)
    if predicted and flags.pop("tf32", None):  # the Trainer refuses TF32 without a GPU
        torch.set_float32_matmul_precision("high")
    logging_steps = max(1, train_steps // 50)
    if validation is not None:
        flags |= {"eval_strategy": "steps", "eval_steps": max(1, train_steps // validations)}
    defaults = {
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,  # clipping needs all gradients at once, which optimizer_in_backward never has
        "prediction_loss_only": True,
        "save_strategy": "steps" if train_steps > SAVE_STEPS else "no",
    }
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=train_steps,
        per_device_train_batch_size=run.batch_size // run.accumulation // run.processes,
        per_device_eval_batch_size=run.batch_size,
        learning_rate=run.learning_rate,
        seed=run.seed,
        logging_steps=logging_steps,
        # Checkpoints fall on logged steps: a resumed training could not complete a mean loss begun before.
        save_steps=-(-SAVE_STEPS // logging_steps) * logging_steps,
        save_total_limit=1,
        use_cpu=predicted or not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        **(defaults | flags),
    )
    if arguments.world_size != run.processes:
        raise ValueError(
            f"processes={run.processes}, but {arguments.world_size} were started: memstudy run starts as many, and a "
            "prediction needs one"
        )
    for technique in sorted(chosen, key=lambda technique: technique.prepared):
        model = technique.prepare(model) or model
    # An optimizer comes before the one that bf16_weights brings.
    by_group = sorted(chosen, key=lambda technique: technique.group != "optimizer")
    optimizers = (technique.optimizer(model) for technique in by_group)
    found = None if "optim" in flags else next(filter(None, optimizers), None)
    trainer = TechniqueTrainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=validation,
        optimizer_cls_and_kwargs=found and (found[0], {"lr": run.learning_rate, **found[1]}),
        techniques=chosen,
        predicted=predicted,
    )
    trainer.remove_callback(PrinterCallback)
    if scaled:
        _scale_loss(trainer)
    return trainer


def _scale_loss(trainer: Trainer) -> None:
    """Scale the loss as Accelerate does on a GPU; on the CPU, where predictions run, Accelerate refuses fp16."""
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cuda")
