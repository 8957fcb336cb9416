"""Runs carried out: a frozen description in (`configs`), flat metrics out; Hugging Face's ``Trainer`` inside.

A run does up to two things. It *measures* a step on random tokens (memory needs no data) at its exact
size, and it *trains* on a data set and evaluates. The step that is measured is the Trainer's own:
its autocast, its loss, its optimizer.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, set_seed

from memstudy import data, finetuning, glue, inference, layers, pairs, seq2seq, techniques
from memstudy.configs import LanguageModelRun, LayerRun, StepRun
from memstudy.hub_configs import FineTuneRun, HubModelRun, InferenceRun
from memstudy.lever_trainer import make_trainer
from memstudy.prediction_configs import LargestBatchRun, PredictionRun, PublishedRowRun
from memstudy.profiler import MIB, fit
from memstudy.published.rows import predicted_mib
from memstudy.reformer_configs import ReformerRun
from memstudy.seq2seq_configs import Seq2SeqRun
from memstudy.step import build, foretell, iterations

__all__ = [
    "FineTuneRun", "HubModelRun", "InferenceRun", "LanguageModelRun", "LargestBatchRun", "LayerRun", "PredictionRun",
    "PublishedRowRun", "ReformerRun", "Seq2SeqRun", "StepRun", "build", "execute", "foretell", "load_data", "parse_run",
]  # fmt: skip

TIMELINE_POINTS = 400
Run = StepRun | LayerRun | PredictionRun | PublishedRowRun
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
    "published_row": PublishedRowRun,
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
        ``metrics`` (flat, units in the names), ``curves`` and ``data``. Of a run in emulated bfloat16 the metrics say
        so (``emulated``) and have no times: these would be the emulation's.

    Raises
    ------
    Unavailable
        When a technique, the attention or a peer cannot run on this machine.
    MemoryError
        When the measured peak passes ``run.budget_mib``.
    ValueError
        When the data set is not the one that the run names.
    """
    if isinstance(run, PublishedRowRun):
        return {"metrics": {"predicted_mib": predicted_mib(run.table, run.of)}, "curves": {}, "data": {}}
    if isinstance(run, LargestBatchRun):
        return _fit(run)
    if isinstance(run, PredictionRun):
        return _predict(run)
    if isinstance(run, LayerRun):
        return layers.execute(run)
    result = _carry_out(run, checkpoints)
    return _without_times(result) if run.emulated() else result


def _without_times(result: dict) -> dict:
    def timeless(values: dict) -> dict:
        return {name: value for name, value in values.items() if not name.endswith(("_ms", "_s"))}

    return result | {"metrics": timeless(result["metrics"]) | {"emulated": True}, "curves": timeless(result["curves"])}


def _carry_out(run: StepRun, checkpoints: Path) -> dict:
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
    report, step = layers.measured(build(run), iterations=iterations(run))
    if run.budget_mib and report.peak_allocated_mib > run.budget_mib:
        raise MemoryError(f"peak {report.peak_allocated_mib:.1f} MiB passes the budget of {run.budget_mib:g} MiB")
    result["metrics"] |= report.scalars() | {"n_parameters": sum(p.numel() for p in run.make_model().parameters())}
    result["curves"] |= {
        "memory_timeline": report.timeline_mib(TIMELINE_POINTS),
        "activations_by_module_mib": {
            name: round(size / MIB, 3) for name, size in report.modules.items() if size > MIB / 1000
        },
    }
    if run.emulated():
        return
    times = [layers.timed(step) for _ in range(run.measure_steps)]
    median = statistics.median(times)
    result["metrics"] |= {
        "step_time_ms": median * 1e3,
        "step_time_min_ms": min(times) * 1e3,
        "step_time_max_ms": max(times) * 1e3,
        "tokens_per_s": run.batch_size * run.seq_len / median,
    }
    result["curves"]["step_times_ms"] = [round(t * 1e3, 3) for t in times]


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
