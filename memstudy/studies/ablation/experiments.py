"""The memory ablation's experiments: steps of the decoder with techniques, alone and combined; BERT-large.

A set of techniques goes by its name: ``bf16+checkpointing``, or ``baseline`` for none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import torch

from memstudy import techniques
from memstudy.profiler import MIB
from memstudy.trainers.hub_model import HubModelRun
from memstudy.trainers.language_model import LanguageModelRun

# Fields of `LanguageModelRun` that a study's parameters set.
SIZE = ("n_layers", "hidden_size", "n_heads", "feed_forward", "vocab_size", "seq_len", "batch_size", "measure_steps")
_SIXTEEN_BITS = {"bf16", "fp16", "bf16_weights"}
_PUBLISHED = {
    "batch 1 × 4": "accumulation=4", "checkpointing": "checkpointing", "fp16": "fp16", "Adafactor": "adafactor",
    "8-bit Adam": "adamw_8bit",
}  # fmt: skip


def name_of(texts: Iterable[str]) -> str:
    """The name of the techniques ``texts`` together."""
    return "+".join(filter(None, texts)) or "baseline"


def steps(names: Iterable[str], size: Mapping[str, object], *, flash: str = "sdpa") -> list[LanguageModelRun]:
    """The decoder's run for each of ``names``.

    ``size`` has the fields of `LanguageModelRun`; ``flash`` is the attention kernel of runs in 16 bits.
    """
    runs = []
    for name in names:
        texts = () if name == "baseline" else tuple(name.split("+"))
        kernel = flash if _SIXTEEN_BITS & set(texts) else "sdpa"
        attention = {"variant": "softmax", "implementation": kernel}
        runs.append(LanguageModelRun(experiment=name, techniques=texts, attention=attention, **size))
    return runs


def third_loss(run: LanguageModelRun) -> float:
    """The loss [nats] in the third of three updates by SGD, with the run's techniques used as the Trainer does."""
    torch.manual_seed(run.seed)
    model, tokens = run.make_model().train(), run.make_batch()["input_ids"]
    for technique in run.parsed_techniques():
        technique.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for technique in run.parsed_techniques():
        technique.attach(model, optimizer)
    for _ in range(3):
        parts = [model(input_ids=part, labels=part)["loss"] for part in tokens.chunk(run.accumulation)]
        loss = torch.stack(parts).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def combinations(by_kind: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """All combinations of one technique from each kind, ``""`` for none, whose techniques do not exclude each other.

    A row each, by name; the columns are the kinds.
    """
    choices = [c for c in itertools.product(*by_kind.values()) if not techniques.excluded([*filter(None, c)])]
    return pd.DataFrame(choices, columns=list(by_kind), index=[name_of(choice) for choice in choices])


def beyond_mb(rows: pd.DataFrame) -> pd.Series:
    """Memory at the peak beyond parameters and optimizer state [MB of 10^6 bytes], for each of a sweep's ``rows``."""
    return (rows["peak_allocated_mib"] - rows["peak_parameters_mib"] - rows["peak_optimizer_mib"]) * MIB / 1e6


def descent(name: str, peaks: pd.Series) -> pd.Series:
    """The way from the baseline to the combination ``name``: each step adds the technique that lowers the peak most.

    ``peaks`` has the peak of every combination on the way, by name. Returns the technique that each step adds, by the
    name of the combination reached; the first is the baseline.
    """
    texts, added = [text for text in name.split("+") if text != "baseline"], {"baseline": "baseline"}
    while len(added) <= len(texts):
        left = [text for text in texts if text not in added.values()]
        reached = {name_of(t for t in texts if t == more or t not in left): more for more in left}
        lowest = peaks[list(reached)].idxmin()
        added[lowest] = reached[lowest]
    return pd.Series(added)


def bert_large(settings: Iterable[str]) -> list[HubModelRun]:
    """Fine-tuning of BERT-large with 512 tokens for each of ``settings``, rows of ``bert_large_memory.csv``."""
    fixed = {"model": "bert-large-uncased", "task": "classification", "attention": "eager", "batch_size": 4}
    runs = []
    for setting in settings:
        texts = tuple(_PUBLISHED[part] for part in setting.split(", ") if part in _PUBLISHED)
        runs.append(HubModelRun(experiment=setting, techniques=texts, seq_len=512, measure_steps=1, **fixed))
    return runs
