"""Hugging Face's Trainer with the techniques that are not flags, and one set of arguments for all runs."""

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
    from memstudy.trainers.base import StepRun

SAVE_STEPS = 100  # a training that is killed loses at most so many updates


def last_whole_checkpoint(folder: Path) -> str | None:
    """The last one that was not cut short: the Trainer writes ``trainer_state.json`` at the end."""
    whole: dict[int, Path] = {}
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with suppress(ValueError):
            whole[json.loads(state.read_text(encoding="utf-8"))["global_step"]] = state.parent
    return str(whole[max(whole)]) if whole else None


class _ByLength(LengthGroupedSampler):
    """Orders each epoch by seed and epoch alone, so that a training that was killed goes on with the same rows."""

    def __init__(self, like: LengthGroupedSampler, seed: int):
        super().__init__(like.batch_size, lengths=like.lengths)
        self._seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self._seed + epoch)


class Clock(TrainerCallback):
    """The time that updates take, evaluations left out; goes on from where a checkpoint's log stands.

    Attributes
    ----------
    paused : float [s]
        What of the time since the training began is not to count.
    """

    def on_train_begin(self, args, state, control, **_):
        self._before = next((row["trained_s"] for row in reversed(state.log_history) if "trained_s" in row), 0.0)
        self.paused, self._began = 0.0, time.perf_counter()

    def on_evaluate(self, args, state, control, metrics, **_):
        self.paused += next(seconds for name, seconds in metrics.items() if name.endswith("_runtime"))

    def seconds(self) -> float:
        """Of training until now."""
        return self._before + time.perf_counter() - self._began - self.paused


class LeverTrainer(Trainer):
    """Hugging Face's Trainer with the techniques that are not flags."""

    def __init__(self, *args, levers, **kwargs):
        self._levers = levers
        self.clock = Clock()
        super().__init__(*args, **kwargs)
        self.add_callback(self.clock)

    def go_on(self) -> float:
        """Train to the end, from the last whole checkpoint where there is one; give the seconds of all updates."""
        self.train(resume_from_checkpoint=last_whole_checkpoint(Path(self.args.output_dir)))
        return self.clock.seconds()

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs["trained_s"] = self.clock.seconds()
        super().log(logs, *args, **kwargs)

    def compute_loss_context_manager(self):
        stack = ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        for lever in self._levers:
            stack.enter_context(lever.around_loss())
        return stack

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A part's share of the loss of a batch that is accumulated.

        Many models of transformers take ``num_items_in_batch`` and forget it, and the Trainer then adds up the means of
        the parts. Asked without it every model gives its part's mean.
        """
        whole = return_outputs or self.current_gradient_accumulation_steps == 1  # outputs are for evaluation
        if whole or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        share = self._get_num_items_in_batch([inputs], self.args.device) / num_items_in_batch
        return super().compute_loss(model, inputs) * share

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        return _ByLength(sampler, self.args.seed) if isinstance(sampler, LengthGroupedSampler) else sampler

    def _get_eval_sampler(self, eval_dataset):
        # Else, where training batches are grouped by length, predictions come in another order than the rows.
        return SequentialSampler(eval_dataset)

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
) -> LeverTrainer:
    """The Trainer for ``run``, whose techniques ``model`` gets.

    Parameters
    ----------
    run : StepRun
    model : PreTrainedModel
    checkpoints : Path
        Where they go; few updates need none.
    train_steps : int
        Updates.
    train : Dataset, optional
        What to train on; None where only a step is wanted.
    collate : callable
        Makes a batch of rows.
    validation : Dataset, optional
        Whose loss is taken in training, ``validations`` times.
    predicted : bool
        Whether for a prediction, which runs on the CPU in any case.

    Raises
    ------
    ValueError
        When this process is not one of ``run.processes``.
    """
    levers = run.levers()
    flags = run.flags()
    for lever in levers:
        flags |= lever.flags()
    scaled = predicted and flags.pop("fp16", False)
    if predicted:
        flags.pop("tf32", None)  # refused without a GPU, and of no account to memory
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
        # Where a loss is logged, the mean of those since the last: one cut in two by a kill would be another mean.
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
    for lever in sorted(levers, key=lambda lever: lever.prepared_last):
        lever.prepare(model)
    found = None if "optim" in flags else next(filter(None, (lever.optimizer(model) for lever in levers)), None)
    trainer = LeverTrainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=validation,
        optimizer_cls_and_kwargs=found and (found[0], {"lr": run.learning_rate, **found[1]}),
        levers=levers,
    )
    trainer.remove_callback(PrinterCallback)
    if scaled:
        _scale_loss(trainer)
    return trainer


def _scale_loss(trainer: Trainer) -> None:
    """As Accelerate does it on a GPU; without one it refuses fp16, which a prediction for one needs."""
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cuda")
