"""Fine-tuning of converted pretrained models: as classifiers of sentences (`tasks`) or as masked language models.

A language model is evaluated by pseudo-perplexity (Salazar et al. 2020, arXiv:1910.14659, equation 4), with each token
of the text masked in turn::

    PPPL = exp(- 1/N Σ_t log P(w_t | all other tokens of the block))

It compares models with the same tokens, and is not the perplexity of a left-to-right model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import torch
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from memstudy import data, techniques
from memstudy.huggingface.pretrained import weights_folder
from memstudy.studies.glue import tasks
from memstudy.trainers.trainer import TechniqueTrainer, make_trainer

if TYPE_CHECKING:
    from memstudy.studies.glue.run import FineTuneRun

MASKED = 0.15  # share of tokens masked in training


def execute(run: FineTuneRun, loaded: data.LoadedData, checkpoints: Path) -> dict:
    """Execute ``run`` in this process, on its data set ``loaded``.

    Returns
    -------
    dict
        ``metrics`` (flat, units in the names), ``curves`` (the training loss; a classifier's predictions and the
        labels, row by row) and ``data``.

    Raises
    ------
    Unavailable
        When a technique cannot run on this machine.
    ValueError
        When the weights are not available, or the data set does not suit the task.
    """
    techniques.check_available(run.parsed_techniques())
    tokenizer = AutoTokenizer.from_pretrained(weights_folder(run.model))
    carry_out = _classify if run.task == "classification" else _fill_in
    result = carry_out(run, loaded, tokenizer, checkpoints)
    result["data"] = loaded.provenance()
    return result


def _classify(run: FineTuneRun, loaded: data.LoadedData, tokenizer: PreTrainedTokenizerBase, checkpoints: Path) -> dict:
    task = tasks.task_of(loaded)
    train = _drawn(loaded.splits["train"], run.train_rows, run.seed)
    held_back = loaded.splits[task.validation]
    held_back = held_back.select(range(min(run.eval_rows, len(held_back))))
    (train, cut), (held_back, _) = (tasks.encode(rows, task, tokenizer, run.seq_len) for rows in (train, held_back))
    set_seed(run.seed)
    model = run.load_model(task.n_labels)
    trainer, metrics, curves = _trained(run, model, train, DataCollatorWithPadding(tokenizer), checkpoints)
    output = trainer.predict(held_back, metric_key_prefix="eval")
    labels = held_back["labels"]
    predictions = output.predictions[:, 0] if task.n_labels == 1 else output.predictions.argmax(-1)
    metrics |= tasks.score(task, predictions, labels) | {
        "eval_loss": output.metrics["eval_loss"],
        "eval_rows": len(labels),
        "cut_rows": cut,
    }
    if task.n_labels == 1:
        predictions = np.round(predictions.astype(float), 4)
    return {"metrics": metrics, "curves": curves | {"predictions": predictions.tolist(), "labels": list(labels)}}


def _fill_in(run: FineTuneRun, loaded: data.LoadedData, tokenizer: PreTrainedTokenizerBase, checkpoints: Path) -> dict:
    if tokenizer.mask_token_id is None:
        raise ValueError(f"the tokenizer of {run.model} has no mask token; take a masked language model")
    tokenizer.eos_token = tokenizer.sep_token
    for split in ("train", "validation"):
        if split not in loaded.splits:
            raise ValueError(f"{loaded.name} has no split {split}; take another data set")
    needed = max(run.train_rows, run.eval_rows, 1) * run.seq_len
    blocks = data.blocks(loaded, tokenizer, run.seq_len, limit_tokens=needed)
    train = blocks["train"].select(range(min(run.train_rows, len(blocks["train"]))))
    held_back = blocks["validation"].select(range(min(run.eval_rows, len(blocks["validation"]))))
    set_seed(run.seed)
    model = run.load_model(1)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
    trainer, metrics, curves = _trained(run, model, train, collate, checkpoints)
    losses = _pseudo_losses(trainer, torch.tensor(held_back["input_ids"]), tokenizer.mask_token_id)
    metrics |= {
        "eval_loss": losses.mean().item(),
        "pseudo_perplexity": math.exp(losses.mean().item()),
        "eval_tokens": losses.numel(),
    }
    return {"metrics": metrics, "curves": curves}


def _drawn(rows: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    return rows.select(order.tolist())


def _trained(run: FineTuneRun, model, train, collate, checkpoints: Path) -> tuple[TechniqueTrainer, dict, dict]:
    """Train ``model``; return the Trainer, metrics and curves."""
    steps = run.epochs * math.ceil(len(train) / run.batch_size)
    trainer = make_trainer(run, model, checkpoints, train_steps=max(1, steps), train=train, collate=collate)
    if run.task == "classification":
        _train_head(model)
    metrics: dict = {
        "train_rows": len(train),
        "train_steps": steps,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if not steps:
        return trainer, metrics, {}
    seconds = trainer.go_on()
    curve = trainer.curve("loss")
    metrics |= {"train_time_s": seconds, "epoch_time_s": seconds / run.epochs, "train_loss": curve[-1][1]}
    return trainer, metrics, {"train_loss": curve}


def _train_head(model: PreTrainedModel) -> None:
    """Train the new head of ``model`` also beside adapters, which freeze it; in their number format.

    As peft's ``modules_to_save`` does for classifiers of sequences (peft/peft_model.py).
    """
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{model.base_model_prefix}."):
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)


@torch.no_grad()
def _pseudo_losses(trainer: TechniqueTrainer, blocks: torch.Tensor, mask: int) -> torch.Tensor:
    """-log P of each token, masked in turn, given the other tokens of its block; ``(blocks, seq)``."""
    model = trainer.model.eval()
    seq = blocks.shape[1]
    chosen: list[torch.Tensor] = []
    # Compute logits only at the masked positions: a block's logits at all positions would be (seq, seq, vocab).
    head = model.get_output_embeddings()
    only_masked = head.register_forward_pre_hook(
        lambda module, args: (args[0][torch.arange(len(chosen[0])), chosen[0]][:, None],)
    )
    losses = []
    size = trainer.args.per_device_eval_batch_size
    for block in blocks.to(trainer.args.device):
        for positions in torch.arange(seq, device=block.device).split(size):
            masked = block.repeat(len(positions), 1)
            masked[torch.arange(len(positions)), positions] = mask
            chosen[:] = [positions]
            with trainer.accelerator.autocast():
                logits = model(input_ids=masked).logits[:, 0]
            losses.append(F.cross_entropy(logits.float(), block[positions], reduction="none"))
    only_masked.remove()
    return torch.cat(losses).view(-1, seq)
