"""Encoder-decoders trained on pairs and scored by the targets they write (`pairs`); memory and time of decoding.

An answer is right when each of its tokens is the most likely one after the right tokens before. Greedy decoding writes
exactly these answers, and the check takes one forward pass, so training can log the share of right answers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    EncoderDecoderCache,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

from memstudy import data, techniques
from memstudy.data import place_value
from memstudy.profiler import MIB
from memstudy.profiler.roles import Step
from memstudy.studies.memsizer import pairs
from memstudy.studies.memsizer.encoder_decoder import Seq2SeqLM, state_bytes
from memstudy.trainers.timing import measured, timed
from memstudy.trainers.trainer import TechniqueTrainer, make_trainer

if TYPE_CHECKING:
    from memstudy.studies.memsizer.run import Seq2SeqRun

SHOWN = 5  # texts of each split that a record keeps


def execute(run: Seq2SeqRun, loaded: data.LoadedData, checkpoints: Path) -> dict:
    """Train the model of ``run`` on its data set ``loaded``, and write targets for held-out rows.

    The trained model (safetensors) and its tokenizers are saved in ``build/models/<run_id>``.

    Returns
    -------
    dict
        ``metrics`` (flat, units in the names; scores as ``<split>_<metric>``), ``curves`` (losses, right answers in
        training, some of the texts) and ``data``.

    Raises
    ------
    Unavailable
        When a technique cannot run on this machine.
    ValueError
        When the data set holds no pairs, or more characters than the model has tokens.
    """
    techniques.check_available(run.parsed_techniques())
    task = pairs.task_of(loaded)
    texts = {split: [task.read(row) for row in loaded.splits[split]] for split in ("train", *task.tests)}
    read, write = vocabularies(run, task, texts["train"])
    train = texts["train"][: run.train_rows or None]
    held_back = {split: texts[split][: run.eval_rows] for split in task.tests}
    encoded = {split: encode(rows, read, write, run) for split, rows in {"train": train, **held_back}.items()}
    set_seed(run.seed)
    model = run.make_model()
    trainer, result = _trained(run, task, model, encoded, read, checkpoints)
    for split in task.tests:
        _judge(run, task, trainer, split, held_back[split], encoded[split], write, result)
    result["curves"]["signatures"] = task.signatures()
    folder = checkpoints.parents[1] / "models" / checkpoints.name
    model.save_pretrained(folder)
    read.save_pretrained(folder / "source")
    write.save_pretrained(folder / "target")
    (folder / "run.json").write_text(run.model_dump_json(), encoding="utf-8")  # last: marks the folder as complete
    size = (folder / "model.safetensors").stat().st_size
    result["metrics"] |= {"n_parameters": sum(p.numel() for p in model.parameters()), "model_mib_on_disk": size / MIB}
    result["data"] = loaded.provenance()
    return result


def vocabularies(
    run: Seq2SeqRun, task: pairs.PairTask, train: Sequence[tuple[str, str]]
) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Tokenizers of sources and targets: two of characters for answers, one of common pieces for other tasks."""
    sources, targets = zip(*train, strict=True)
    if not task.characters:
        both = data.train_tokenizer([*sources, *targets], run.vocab_size, pad=True)
        return both, both
    made = []
    for what, texts, known in (("vocab", sources, run.vocab_size), ("target_vocab", targets, run.target_vocab_size)):
        size = len({*"".join(texts)} | {" "}) + 3  # padding, end, unknown
        if size > known:
            raise ValueError(f"{what}_size={known}: {run.dataset} has {size} characters and special tokens")
        made.append(data.train_tokenizer(texts, size, unit="character", pad=True))
    return made[0], made[1]


def encode(
    rows: Sequence[tuple[str, str]], read: PreTrainedTokenizerFast, write: PreTrainedTokenizerFast, run: Seq2SeqRun
) -> datasets.Dataset:
    """Tokens of sources (``input_ids``) and targets (``labels``), with an end token, truncated to the run's lengths."""
    columns = {}
    for name, tokenizer, texts, most in (
        ("input_ids", read, [source for source, _ in rows], run.seq_len),
        ("labels", write, [target for _, target in rows], run.target_len),
    ):
        tokens = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=most - 1)["input_ids"]
        columns[name] = [[*ids, tokenizer.eos_token_id] for ids in tokens]
    return datasets.Dataset.from_dict(columns)


def _trained(run, task, model, encoded, read, checkpoints) -> tuple[TechniqueTrainer, dict]:
    collate = DataCollatorForSeq2Seq(read)
    first = encoded[task.tests[0]]
    watched = {} if task.characters or not run.validations else {"validation": first, "validations": run.validations}
    trainer = make_trainer(
        run, model, checkpoints, train_steps=run.train_steps, train=encoded["train"], collate=collate, **watched
    )
    if task.characters and run.validations:
        trainer.add_callback(_Answers(trainer, first, max(1, run.train_steps // run.validations)))
    seconds = trainer.go_on()
    seen = run.train_steps * run.batch_size
    mean = sum(map(len, encoded["train"]["labels"])) / len(encoded["train"])
    metrics = {
        "train_time_s": seconds,
        "train_rows": len(encoded["train"]),
        "epochs": trainer.state.epoch,
        "train_rows_per_s": seen / seconds,
        "train_target_tokens_per_s": seen * mean / seconds,
    }
    curves = {
        "train_loss": trainer.curve("loss"),
        "validation_loss": trainer.curve("eval_loss"),
        "right": [row["right"] for row in trainer.state.log_history if "right" in row],
    }
    return trainer, {"metrics": metrics, "curves": curves}


class _Answers(TrainerCallback):
    """Logs the share of right answers in training, as ``right``: [updates, training time [s], share]."""

    def __init__(self, trainer: TechniqueTrainer, rows: datasets.Dataset, every: int):
        self._trainer, self._rows, self._every = trainer, rows, every

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self._every:
            return
        trained, began = self._trainer.clock.seconds(), time.perf_counter()
        share = sum(right_answers(self._trainer, self._rows)) / len(self._rows)
        self._trainer.clock.paused += time.perf_counter() - began
        state.log_history.append({"step": state.global_step, "right": [state.global_step, round(trained, 2), share]})


@torch.no_grad()
def right_answers(trainer: TechniqueTrainer, rows: datasets.Dataset) -> list[bool]:
    """For each row, whether greedy decoding writes the whole target."""
    model, right = trainer.model.eval(), []
    for batch in trainer.get_eval_dataloader(rows):
        batch = trainer._prepare_inputs(batch)
        with trainer.accelerator.autocast():
            found = model(**batch).logits.argmax(-1)
        labels = batch["labels"]
        right += ((found == labels) | (labels == -100)).all(-1).tolist()
    model.train()
    return right


def _judge(run, task, trainer, split, texts, encoded, write, result) -> None:
    """Write targets for ``split``; add texts and scores to ``result``."""
    wanted = [target for _, target in texts]
    loss = trainer.evaluate(encoded, metric_key_prefix=split)[f"{split}_loss"]
    began = time.perf_counter()
    tokens = written(trainer, encoded, run)
    seconds = time.perf_counter() - began
    found = [write.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
    scores = task.score(found, wanted) | {
        "loss": loss,
        "perplexity": math.exp(loss),
        "rows": len(texts),
        "written_tokens_per_s": sum(map(len, tokens)) / seconds,
    }
    result["metrics"] |= {f"{split}_{name}": value for name, value in scores.items()}
    result["curves"][f"{split}_texts"] = [[*row, text] for row, text in zip(texts[:SHOWN], found, strict=False)]
    if task.characters:
        asked, right = Counter(), Counter()
        for (question, answer), text in zip(texts, found, strict=True):
            asked[place_value.place(question)] += 1
            right[place_value.place(question)] += text == answer
        result["curves"][f"{split}_by_place"] = {place: [right[place], asked[place]] for place in asked}


@torch.no_grad()
def written(trainer: TechniqueTrainer, rows: datasets.Dataset, run: Seq2SeqRun) -> list[list[int]]:
    """The tokens that the model writes for each row, up to the end token; batches have sources of similar length."""
    model = trainer.model.eval()
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), run.batch_size):
        part = order[start : start + run.batch_size]
        batch = trainer._prepare_inputs(trainer.data_collator([rows[row] for row in part]))
        batch.pop("labels")
        output = model.generate(**batch, max_new_tokens=run.target_len, num_beams=run.num_beams, do_sample=False)
        for row, ids in zip(part, output[:, 1:].tolist(), strict=True):
            end = ids.index(model.config.eos_token_id) + 1 if model.config.eos_token_id in ids else len(ids)
            found[row] = ids[:end]
    return [found[row] for row in range(len(rows))]


def build_generation(run: Seq2SeqRun) -> Callable[[], Step]:
    """The argument of ``profiler.measure``: encodes a batch of random sources, decodes the first and the last token.

    The last of ``run.generated`` tokens is decoded as if the tokens between had been: the memory does not depend on
    their values, and a trace of thousands of tokens would not fit.
    """

    def make() -> Step:
        model, source = _untrained(run)

        @torch.no_grad()
        def step():
            encoded = model.get_encoder()(source)
            token = torch.full((len(source), 1), model.config.decoder_start_token_id, device=source.device)
            token, cache = _next(model, encoded, token, None)
            for layer in cache.self_attention_cache.layers:
                if layer.is_initialized:  # a layer of keys and values, not MemSizer's
                    layer.keys, layer.values = (
                        kept.repeat(1, 1, run.generated - 1, 1) for kept in (layer.keys, layer.values)
                    )
            return state_bytes(_next(model, encoded, token, cache)[1])

        return step

    return make


def _untrained(run: Seq2SeqRun) -> tuple[Seq2SeqLM, torch.Tensor]:
    set_seed(run.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return run.make_model().eval().to(device), run.make_batch()["input_ids"].to(device)


@torch.no_grad()
def decode(model: Seq2SeqLM, source: torch.Tensor, count: int) -> int:
    """Decode ``count`` tokens greedily, past any end token; return the size of the last decoding state [bytes]."""
    encoded = model.get_encoder()(source)
    token = torch.full((len(source), 1), model.config.decoder_start_token_id, device=source.device)
    cache = None
    for _ in range(count):
        token, cache = _next(model, encoded, token, cache)
    return state_bytes(cache)


def _next(model: Seq2SeqLM, encoded, token: torch.Tensor, cache) -> tuple[torch.Tensor, EncoderDecoderCache]:
    output = model(encoder_outputs=encoded, decoder_input_ids=token, past_key_values=cache, use_cache=True)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def generate(run: Seq2SeqRun) -> dict[str, float]:
    """Metrics of decoding: peak beside the parameters and decoding state [MiB]; tokens/s of the whole batch."""
    report, last = measured(build_generation(run), iterations=1)
    peak, parameters = max(report.iteration_peaks), report.most_by_category["parameters"]
    held = last()
    model, source = _untrained(run)
    times = [timed(lambda: decode(model, source, run.generated)) for _ in range(3)]
    return {
        "generation_beside_parameters_mib": (peak - parameters) / MIB,
        "generation_state_mib": held / MIB,
        "generation_tokens_per_s": run.batch_size * run.generated / statistics.median(times),
    }
