"""Runs carried out: a frozen description in (`configs`), flat metrics out; Hugging Face's ``Trainer`` inside.

A run does up to two things. It *measures* a step on random tokens (memory needs no data) at its exact
size, and it *trains* on a data set and evaluates. The step that is measured is the Trainer's own:
its autocast, its loss, its optimizer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, set_seed

from memstudy import data, finetuning, glue, inference, layers, pairs, seq2seq, techniques
from memstudy.attention import Unavailable
from memstudy.configs import LanguageModelRun, LayerRun, StepRun
from memstudy.hub_configs import FineTuneRun, HubModelRun, InferenceRun
from memstudy.lever_trainer import make_trainer
from memstudy.memory import MIB, Gpu, MemoryReport, find_gpu, fit, predict
from memstudy.memory.processes import steps_to_settle
from memstudy.memory.trace import Step
from memstudy.prediction_configs import LargestBatchRun, PredictionRun
from memstudy.reformer_configs import ReformerRun
from memstudy.seq2seq_configs import Seq2SeqRun

__all__ = [
    "FineTuneRun", "HubModelRun", "InferenceRun", "LanguageModelRun", "LargestBatchRun", "LayerRun", "PredictionRun",
    "ReformerRun", "Seq2SeqRun", "StepRun", "build", "execute", "foretell", "load_data", "parse_run",
]  # fmt: skip

TIMELINE_POINTS = 400
Run = StepRun | LayerRun | PredictionRun
RUNS: dict[str, type[Run]] = {
    "language_model": LanguageModelRun,
    "hub_model": HubModelRun,
    "inference": InferenceRun,
    "fine_tune": FineTuneRun,
    "layer": LayerRun,
    "reformer": ReformerRun,
    "seq2seq": Seq2SeqRun,
    "prediction": PredictionRun,
    "largest_batch": LargestBatchRun,
}


def parse_run(given: object) -> Run:
    """The run that the JSON value ``given`` describes; its ``kind`` says which.

    Raises
    ------
    ValueError
        For an unknown kind or field, a value out of range, choices that contradict each other.
    """
    kind = given.get("kind") if isinstance(given, dict) else given
    if not isinstance(given, dict) or not isinstance(kind, str) or kind not in RUNS:
        raise ValueError(f"unknown kind of run {kind!r}; known: {', '.join(RUNS)}")
    known = RUNS[given["kind"]].model_fields
    for name in given:
        if name not in known:
            raise ValueError(f"unknown field {name!r} of a {given['kind']} run; known: {', '.join(known)}")
    return RUNS[given["kind"]].model_validate(given)


def load_data(run: LanguageModelRun | FineTuneRun | Seq2SeqRun) -> data.LoadedData:
    """The data set that ``run`` trains on.

    Raises
    ------
    ValueError
        When there is no such data set, it is not the one that the run was planned with, or its rows do not suit.
    """
    loaded = _as_planned("data set", run.dataset, run.data_hash)
    if isinstance(run, FineTuneRun) and run.task == "classification":
        glue.task_of(loaded)
    if isinstance(run, Seq2SeqRun):
        pairs.task_of(loaded)
    return loaded


def _as_planned(what: str, name: str, planned_hash: str) -> data.LoadedData:
    """The data set ``name``, refused when it is not the one that the run was planned with."""
    loaded = data.load(name)
    if loaded.content_hash != planned_hash:
        raise ValueError(
            f"{what} {name!r} has content hash {loaded.content_hash}, the run was planned with "
            f"{planned_hash or 'none'}: plan it again"
        )
    return loaded


def build(run: StepRun, *, gpu: str | Gpu | None = None, parts: int | None = None) -> Callable[[], Step]:
    """What ``memory.measure`` and ``memory.predict`` take: makes everything and returns the step.

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


def execute(run: Run, checkpoints: Path) -> dict:
    """Carry out ``run`` in this process.

    Parameters
    ----------
    run : StepRun, LayerRun or PredictionRun
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
    if isinstance(run, LargestBatchRun):
        return _fit(run)
    if isinstance(run, PredictionRun):
        return _predict(run)
    if isinstance(run, LayerRun):
        return layers.execute(run)
    if isinstance(run, InferenceRun):
        return inference.execute(run)
    if isinstance(run, FineTuneRun):
        return finetuning.execute(run, load_data(run), checkpoints)
    result: dict = {"metrics": {}, "curves": {}, "data": {}}
    if run.measure_steps:
        _measure(run, result)
    if isinstance(run, LanguageModelRun) and run.train_steps:
        _train(run, checkpoints, result)
    if isinstance(run, Seq2SeqRun):
        if run.generated:
            result["metrics"] |= seq2seq.generate(run)
        if run.train_steps:
            trained = seq2seq.execute(run, load_data(run), checkpoints)
            result = {name: result[name] | trained[name] for name in result}
    return result


def foretell(run: StepRun, gpu: str | Gpu | None, *, expandable_segments: bool = False) -> MemoryReport:
    """The step of ``run``, predicted for ``gpu``, or for this CPU where that is empty; raises as `build`."""
    return predict(
        build(run, gpu=gpu or None, parts=2),
        gpu=gpu or None,
        iterations=_iterations(run),
        expandable_segments=expandable_segments,
        processes=run.processes,
    )


def _iterations(run: StepRun) -> int:
    return 1 if isinstance(run, InferenceRun) else steps_to_settle(run.processes)


def _predict(run: PredictionRun) -> dict:
    report = foretell(run.of, run.gpu)
    metrics = report.scalars()
    if run.gpu:
        metrics |= {"whole_gpu_mib": report.whole_gpu_mib, "fits": report.out_of_memory is None}
    return {"metrics": metrics, "curves": {"unverified_ops": list(report.unverified)}, "data": {}}


def _fit(run: LargestBatchRun) -> dict:
    found = fit(
        lambda size: build(run.of.model_copy(update={"batch_size": size}), gpu=run.gpu),
        gpu=run.gpu,
        processes=run.of.processes,
    )
    metrics = {"largest_batch": found.batch_size, "headroom_percent": found.headroom_percent} | found.report.scalars()
    curves = {"unverified_ops": list(found.report.unverified)}
    return {"metrics": metrics | {"whole_gpu_mib": found.needed_mib}, "curves": curves, "data": {}}


def _measure(run: StepRun, result: dict) -> None:
    if run.budget_mib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, run.budget_mib * MIB / total))
    report, step = layers.measured(build(run), iterations=_iterations(run))
    if run.budget_mib and report.peak_allocated_mib > run.budget_mib:
        raise MemoryError(f"peak {report.peak_allocated_mib:.1f} MiB passes the budget of {run.budget_mib:g} MiB")
    times = [layers.timed(step) for _ in range(run.measure_steps)]
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
    techniques.check_available(run.levers())
    loaded = load_data(run)
    blocks = data.blocks(loaded, _tokenizer(run, loaded), run.seq_len)
    held_back = {name: rows.select(range(min(run.eval_blocks, len(rows)))) for name, rows in blocks.items()}
    set_seed(run.seed)
    validated = {}
    if isinstance(run, ReformerRun) and run.validations:
        validated = {"validation": held_back["validation"], "validations": run.validations}
    trainer = make_trainer(
        run, run.make_model(), checkpoints, train_steps=run.train_steps, train=blocks["train"], **validated
    )
    seconds = trainer.go_on()
    history = trainer.state.log_history
    result["metrics"] |= {
        "train_time_s": seconds,
        "epochs": trainer.state.epoch,
        "epoch_steps": math.ceil(len(blocks["train"]) / run.batch_size),
        "train_loss": [row["loss"] for row in history if "loss" in row][-1],
    }
    for split in ("validation", "test"):
        rows = held_back[split]
        loss = trainer.evaluate(rows, metric_key_prefix=split)[f"{split}_loss"]
        result["metrics"] |= {
            f"{split}_loss": loss,
            f"{split}_perplexity": math.exp(loss),
            f"{split}_tokens": len(rows) * (run.seq_len - 1),
        }
    result["curves"]["train_loss"] = [[row["step"], round(row["loss"], 4)] for row in history if "loss" in row]
    if validated:
        result["curves"]["validation_loss"] = [
            [row["step"], round(row["eval_loss"], 4)] for row in history if "eval_loss" in row
        ]
    result["data"] = loaded.provenance()


def _tokenizer(run: LanguageModelRun, loaded: data.LoadedData) -> PreTrainedTokenizerFast:
    """What cuts the text into tokens: pieces of the text itself, or what a Reformer's ``vocabulary`` names."""
    if not isinstance(run, ReformerRun):
        return data.train_tokenizer(loaded.splits["train"]["text"], run.vocab_size)
    if run.vocabulary == "bytes":
        return data.train_tokenizer(loaded.splits["train"]["text"][:1], 257)
    pieces = _as_planned("vocabulary", run.vocabulary, run.vocabulary_hash)
    return data.train_tokenizer(pieces.splits["train"]["text"], run.vocab_size, unit="character")
