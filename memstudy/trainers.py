"""Runs: a frozen description in, flat metrics out; Hugging Face's ``Trainer`` inside.

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
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from memstudy import data, techniques
from memstudy.attention import ATTENTION, AttentionConfig
from memstudy.memory import MIB, measure
from memstudy.memory.trace import Step
from memstudy.models import DecoderLM, decoder

TIMELINE_POINTS = 400
SAVE_STEPS = 100  # a training that is killed loses at most so many updates


class LanguageModelRun(BaseModel):
    """Every choice of one run of a decoder language model; sizes in tokens, memory in MiB.

    ``measure_steps`` timed steps are taken on random tokens, ``train_steps`` updates on ``dataset``;
    either may be 0. With ``budget_mib`` the measured step is refused when its peak passes the budget.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["language_model"] = "language_model"
    experiment: str
    n_layers: PositiveInt
    hidden_size: PositiveInt
    n_heads: PositiveInt
    feed_forward: PositiveInt
    vocab_size: PositiveInt
    seq_len: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt
    attention: dict[str, str | int | float] = {"variant": "softmax", "implementation": "eager"}
    techniques: tuple[str, ...] = ()
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    measure_steps: NonNegativeInt = 0
    budget_mib: Annotated[float, Field(gt=0)] | None = None
    train_steps: NonNegativeInt = 0
    eval_blocks: PositiveInt = 32
    dataset: str = ""
    data_hash: str = ""
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _consistent(self):
        if self.hidden_size % self.n_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of n_heads={self.n_heads}")
        if self.train_steps and not self.dataset:
            raise ValueError(f"train_steps={self.train_steps} needs a dataset")
        if not self.train_steps and not self.measure_steps:
            raise ValueError("measure_steps and train_steps are both 0: nothing to run")
        window = getattr(self.mixer(), "window", 0)
        if window > self.seq_len:
            raise ValueError(f"window={window} is larger than seq_len={self.seq_len}")
        parts = self.accumulation
        if self.batch_size % parts:
            raise ValueError(f"accumulation={parts} does not divide batch_size={self.batch_size}")
        return self

    def levers(self) -> tuple[techniques.Technique, ...]:
        """The techniques as objects."""
        return techniques.parse(self.techniques)

    def mixer(self) -> AttentionConfig:
        """The attention variant as its config."""
        settings = dict(self.attention)
        variant = settings.pop("variant", None)
        if variant not in ATTENTION:
            raise ValueError(f"unknown attention variant {variant!r}; known: {', '.join(ATTENTION)}")
        try:
            return ATTENTION[variant](**settings)
        except TypeError as error:
            known = ", ".join(field.name for field in fields(ATTENTION[variant]))
            raise ValueError(f"attention {variant!r}: {error}; its settings: {known}") from None

    @property
    def accumulation(self) -> int:
        """In how many parts a batch is run."""
        flags = (lever.flags() for lever in self.levers())
        return next((f[k] for f in flags for k in f if k == "gradient_accumulation_steps"), 1)

    def model(self) -> DecoderLM:
        """The model with random weights."""
        return decoder(
            vocab_size=self.vocab_size,
            n_layers=self.n_layers,
            hidden_size=self.hidden_size,
            n_heads=self.n_heads,
            feed_forward=self.feed_forward,
            max_len=self.seq_len,
            attention=self.mixer(),
        )


RUNS: dict[str, type[BaseModel]] = {"language_model": LanguageModelRun}


def parse_run(given: object) -> LanguageModelRun:
    """The run that the JSON value ``given`` describes; its ``kind`` says which.

    Raises
    ------
    ValueError
        For an unknown kind or field, a value out of range, choices that contradict each other.
    """
    if not isinstance(given, dict) or given.get("kind") not in RUNS:
        kind = given.get("kind") if isinstance(given, dict) else given
        raise ValueError(f"unknown kind of run {kind!r}; known: {', '.join(RUNS)}")
    known = RUNS[given["kind"]].model_fields
    for name in given:
        if name not in known:
            raise ValueError(f"unknown field {name!r} of a {given['kind']} run; known: {', '.join(known)}")
    return RUNS[given["kind"]].model_validate(given)


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


def build(run: LanguageModelRun) -> Callable[[], Step]:
    """What ``memory.measure`` and ``memory.predict`` take: makes everything and returns the step.

    The step runs one whole update on random tokens, through ``Trainer.training_step``.

    Raises
    ------
    Unavailable
        When a technique or the attention cannot run on this machine.
    """
    levers = run.levers()
    techniques.check_available(levers)

    def make() -> Step:
        set_seed(run.seed)
        trainer = _trainer(run, levers, Path("build/unused"), train_steps=1)
        trainer.create_optimizer()
        # The model is on its device already; under fake tensors it could not be moved again.
        model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer, device_placement=[False, True])
        trainer.current_gradient_accumulation_steps = run.accumulation
        tokens = torch.randint(run.vocab_size, (run.batch_size, run.seq_len))
        parts = [{"input_ids": part, "labels": part} for part in tokens.chunk(run.accumulation)]

        def step():
            for part in parts:
                trainer.training_step(model, part)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return make


def execute(run: LanguageModelRun, checkpoints: Path) -> dict:
    """Carry out ``run`` in this process.

    Parameters
    ----------
    run : LanguageModelRun
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
        When a technique or the attention cannot run on this machine.
    MemoryError
        When the measured peak passes ``run.budget_mib``.
    ValueError
        When the data set is not the one that the run names.
    """
    result: dict = {"metrics": {}, "curves": {}, "data": {}}
    if run.measure_steps:
        _measure(run, result)
    if run.train_steps:
        _train(run, checkpoints, result)
    return result


def _measure(run: LanguageModelRun, result: dict) -> None:
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
    times = [_timed(steps[0]) for _ in range(run.measure_steps)]
    median = statistics.median(times)
    result["metrics"] |= report.scalars() | {
        "step_time_ms": median * 1e3,
        "step_time_min_ms": min(times) * 1e3,
        "step_time_max_ms": max(times) * 1e3,
        "tokens_per_s": run.batch_size * run.seq_len / median,
        "n_parameters": sum(p.numel() for p in run.model().parameters()),
    }
    result["curves"] |= {
        "memory_timeline": report.timeline_mib(TIMELINE_POINTS),
        "activations_by_module_mib": {
            name: round(size / MIB, 3) for name, size in report.modules.items() if size > MIB / 1000
        },
        "step_times_ms": [round(t * 1e3, 3) for t in times],
    }


def _timed(step: Step) -> float:
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


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
        optimizer = super().create_optimizer(model)
        for lever in self._levers:
            lever.attach(self.model, optimizer)
        return optimizer


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([row["input_ids"] for row in rows])
    labels = tokens.clone()
    labels[:, 0] = -100  # never predicted, so never among the tokens that the loss is a mean of
    return {"input_ids": tokens, "labels": labels}


def _trainer(run, levers, checkpoints: Path, *, train_steps: int, train=None) -> _LeverTrainer:
    flags: dict = {}
    for lever in levers:
        flags |= lever.flags()
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
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        **flags,
    )
    model = run.model()
    for lever in levers:
        lever.prepare(model)
    trainer = _LeverTrainer(model, arguments, data_collator=_collate, train_dataset=train, levers=levers)
    trainer.remove_callback(PrinterCallback)
    return trainer
