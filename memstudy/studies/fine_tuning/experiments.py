"""The study of ways of fine-tuning: training steps to predict, trainings to compare, and what a 4-bit layer stores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import torch

from memstudy.studies.fine_tuning.epoch import EpochRun
from memstudy.studies.glue.run import FineTuneRun
from memstudy.studies.published import HERE
from memstudy.trainers.hub_model import HubModelRun


def steps(models: Iterable[str], methods: Mapping[str, Sequence[str]], **choices: object) -> list[HubModelRun]:
    """A training step of each of ``models`` by each of ``methods`` (techniques by name), with ``choices`` for all."""
    return [
        HubModelRun(experiment=name, model=model, techniques=tuple(texts), **choices)
        for model in models
        for name, texts in methods.items()
    ]


# Ways to make batches: the sampler, and whether the texts of a batch share a row without padding.
BATCHES = {
    "shuffled": ("shuffled", False),
    "grouped": ("grouped", False),
    "buckets": ("buckets", False),
    "padding-free": ("shuffled", True),
    "packed": ("packed", True),
}


def epochs(datasets: Iterable[str], gpu: str, steps: int, **recipe: object) -> list[EpochRun]:
    """The first ``steps`` of an epoch on each of ``datasets`` with each of `BATCHES`, of a step with ``recipe``.

    Batches without padding take flash attention's kernels for joined sequences.
    """
    return [
        EpochRun(
            experiment=name,
            of=HubModelRun(experiment=name, attention="flash" if flattened else "sdpa", **recipe),
            gpu=gpu,
            dataset=dataset,
            sampler=sampler,
            flattened=flattened,
            steps=steps,
        )
        for dataset in datasets
        for name, (sampler, flattened) in BATCHES.items()
    ]


def fine_tunings(
    tasks: Iterable[dict], methods: Mapping[str, dict], seeds: Iterable[int], *, precision: Sequence[str], **choices
) -> list[FineTuneRun]:
    """A fine-tuning on each of ``tasks`` by each of ``methods`` from each seed, with ``choices`` for all.

    A task has fields of the run; a method has ``techniques``, to which ``precision`` is added, and a
    ``learning_rate``.
    """
    return [
        FineTuneRun(
            experiment=name,
            techniques=(*method["techniques"], *precision),
            learning_rate=method["learning_rate"],
            seed=seed,
            **task,
            **choices,
        )
        for task in tasks
        for name, method in methods.items()
        for seed in seeds
    ]


def published_limits(gpus: Iterable[str]) -> pd.DataFrame:
    """The longest sequences [tokens] that others published, on cards with the memory of ``gpus``; 0: none fits."""
    published = pd.read_csv(HERE / "context_lengths.csv")
    return published[published["gpu"].isin(gpus)]


def bands(predicted: pd.DataFrame) -> pd.DataFrame:
    """The peak of each step of the sweep ``predicted``, from fused kernels to op by op, beside torchtune's of its kind.

    Torchtune published the memory of its own model. The width is that of the band, as a share of its middle.
    """
    same = ["model", "batch_size", "seq_len", "gpu", "experiment"]
    published = pd.read_csv(HERE / "compiled.csv").set_index(same)["published_gib"]
    rows = {}
    for row in predicted.itertuples():
        of, most = row.of, row.peak_allocated_mib / 1024
        fused = most if pd.isna(row.fused_peak_allocated_mib) else row.fused_peak_allocated_mib / 1024
        said = published.get((of.model, of.batch_size, of.seq_len, row.gpu, row.experiment))
        rows[f"{of.model}, {row.experiment}"] = said, fused, most, 200 * (most - fused) / (most + fused)
    columns = ["published [GiB]", "fused [GiB]", "op by op [GiB]", "width [%]"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns, dtype=float)


def stored_bytes(layer: torch.nn.Module) -> int:
    """Bytes that a 4-bit ``layer`` of bitsandbytes stores for its weight, with the codes of the number formats.

    The tensors are those of ``QuantState`` (bitsandbytes/functional.py).
    """
    state = layer.weight.quant_state
    tensors = [layer.weight, state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in tensors)
