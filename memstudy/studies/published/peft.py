"""PEFT's comparison of methods: Llama-3.2-3B on MetaMathQA on an L40S (July 2026), predicted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import local_torch_dtype

from memstudy.data.lengths import batches
from memstudy.huggingface.catalogue import model_config
from memstudy.profiler import MIB, LengthsReport, StepShape, over_lengths, predict
from memstudy.studies.published import GPUS, HERE, Figures

SOFTWARE = (
    "made with torch 2.13.0+cu130, transformers 5.13 to 5.15, peft 0.19.2.dev0 and 0.20.1.dev0; predicted with the "
    "installed libraries, and what peft 0.19.2 trains"
)
CONFIGS = json.loads((HERE / "peft_configs.json").read_bytes())  # adapter_config.json of each method
# Tokens of the longest batch, and of the one before it.
LENGTHS = 110, 690
# Tokens of the longest of the ten batches that come before an evaluation, of all evaluations.
EVALUATED = 626
CHOSEN_ON = {  # lengths are not recorded: these are chosen so that one row comes out right each
    "LENGTHS": "lora/llama-3.2-3B-rank32",
    "EVALUATED": "prefixtuning/llama-3.2-3B-lr_0.005_zero_init",
}
QUESTIONS = 50, 120  # answered at once: of GSM8K's, with at most so many tokens by Llama 3's tokenizer
PREFIXED = ("PREFIX_TUNING", "CARTRIDGE")  # peft's methods that make keys and values for all sequences at once
BATCH, EMPTIES = 4, 10  # texts in a batch; steps after which the cache is emptied
MEAN = 4_198_051 / 5000 / BATCH - 1  # tokens of a text; published are those of 5,000 batches, with an end for each text
SPREAD = 0.35  # of the logarithm of a text's tokens: chosen so that the row's average of reserved memory comes out


def fine_tune(method: str, settings: dict, lengths: Sequence[int] = LENGTHS, evaluated: int = 0) -> Callable[[], None]:
    """One step with a batch of each of ``lengths`` after another, the cache emptied before each.

    By default a short batch, then the longest; with ``evaluated``, then another short one, one of so many tokens and an
    evaluation.

    The source sorts each 80 texts by length, longest first, and takes 20 batches of four from them; it empties the
    allocator's cache every tenth step. So the longest batch meets an empty cache, after the shortest of the texts
    before.

    Every 250th step, 50 questions are answered before the cache is emptied. A learned prefix is then made for all of
    them in fp32, a block of 2.3 GB where the training steps have left none so large. What other methods allocate for
    the answers fits into what training has left, and is not followed.
    """
    model, one = _loop(method, settings)

    def train(lengths):
        for length in lengths:
            torch.cuda.empty_cache()
            one(StepShape(length, BATCH, padded=True))

    def step():
        train(lengths)
        if evaluated:
            train((lengths[0], evaluated))
            _evaluate(model)

    return step


def in_turn(method: str, settings: dict, shapes: Sequence[StepShape]) -> Callable[[], Callable[[], None]]:
    """The ``build`` of steps with batches of ``shapes``, as `over_lengths` takes them."""

    def build():
        _, one = _loop(method, settings)
        waiting = iter(shapes)
        return lambda: one(next(waiting))

    return build


def _loop(method: str, settings: dict) -> tuple[nn.Module, Callable[[StepShape], None]]:
    """The model, and a step of the loop of ``method_comparison/MetaMathQA/run.py``.

    Batches are padded, so attention gets a mask and, with it, keys and values repeated for each query head. The loop
    keeps each step's outputs, with logits and the KV cache, until those of the next step are made.
    """
    with local_torch_dtype(torch.bfloat16):
        model = AutoModelForCausalLM.from_config(model_config("meta-llama/Llama-3.2-3B"))
    if method in CONFIGS:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model

        given = CONFIGS[method] | {"task_type": "CAUSAL_LM"}
        model = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[given["peft_type"]].from_peft_type(**given))
        if prefix := getattr(model.base_model, "prefix", ""):
            for name, parameter in model.named_parameters():
                if prefix not in name:  # peft 0.19.2, BaseTuner._mark_only_adapters_as_trainable
                    parameter.requires_grad = False
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    update_ranks = getattr(model.base_model, "update_and_allocate", None)  # AdaLoRA's
    outputs = None
    counted = itertools.count(1)

    def one(shape: StepShape) -> None:
        nonlocal outputs
        tokens = torch.randint(model.config.vocab_size, (shape.rows, shape.tokens))
        mask = torch.ones_like(tokens)
        if shape.padded:
            mask[0, -1] = 0
        labels = tokens.clone()
        items = mask.sum().item()
        optimizer.zero_grad()
        outputs = model(input_ids=tokens, attention_mask=mask, labels=labels, num_items_in_batch=items)
        outputs.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if update_ranks is not None:
            update_ranks(next(counted))

    return model, one


def _evaluate(model: nn.Module) -> None:
    model.eval()
    questions = torch.randint(model.config.vocab_size, QUESTIONS)
    mask = torch.ones_like(questions)
    mask[0, 0] = 0
    model.generate(input_ids=questions, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)
    model.train()


def lengths(count: int, spread: float = SPREAD) -> list[int]:
    """The lengths of ``count`` texts: log-normal, with the published mean, cut at the longest; drawn with seed 0."""
    drawn = np.random.default_rng(0).lognormal(sigma=spread, size=count)
    return np.clip(np.rint(drawn * MEAN / drawn.mean()), 1, LENGTHS[-1]).astype(int).tolist()


def over_the_run(method: str, settings: dict, steps: int, spread: float = SPREAD) -> LengthsReport:
    """Predict the first ``steps`` of the run, on texts of `lengths`."""
    made = batches(lengths(BATCH * steps, spread), BATCH, "buckets")
    shapes = [StepShape.of(batch) for batch in made]
    return over_lengths(partial(in_turn, method, settings), shapes, gpu=GPUS["peft"], empty_cache_every=EMPTIES)


def figures() -> Figures:
    """Reserved memory, the most of the whole run; the predicted part that is not allocated is 0.4 to 2.7 GB.

    All rows but `CHOSEN_ON` are held out. Outside by more than 1 %: FRoD (-1.7 %), whose frozen factors stay on the
    host and are copied at each use, while the prediction has them on the GPU once; and full fine-tuning (+1.2 %).
    """
    for row in pd.read_csv(HERE / "peft_method_comparison.csv").itertuples():
        prefixed = row.peft_type in PREFIXED
        settings = json.loads(row.optimizer_kwargs)
        build = partial(fine_tune, row.experiment, settings, evaluated=EVALUATED if prefixed else 0)
        yield row.experiment, row.memory_reserved_max_bytes / MIB, partial(_reserved, build)


def _reserved(build: Callable) -> float:
    return predict(build, gpu=GPUS["peft"], iterations=1).peak_reserved_mib
