"""Lab 4's experiments, combinations of techniques, and the batch that fills a memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pandas as pd

from memstudy import techniques
from memstudy.trainers.language_model import LanguageModelRun

PAPER = {
    "n_layers": 6, "hidden_size": 512, "n_heads": 8, "feed_forward": 2048, "vocab_size": 10_000, "seq_len": 512,
}  # fmt: skip
EAGER = {"variant": "softmax", "implementation": "eager"}


def experiments(
    seq_len: int, *, flash: str, plain: Sequence[str] = (), only: Sequence[str] = (), skip: Sequence[str] = ()
) -> pd.DataFrame:
    """The source's eight experiments, five single techniques, and ``best_of_all``, whose techniques are to be found.

    Parameters
    ----------
    seq_len : int
        Length of the sequences and of the longer window [tokens].
    flash : str
        Implementation of flash attention: ``sdpa`` or ``flash_attention_2``.
    plain : sequence of str
        Techniques of every row in fp32.
    only, skip : sequence of str
        Names to keep (all when empty) and names to drop; the baseline is always kept.

    Returns
    -------
    pd.DataFrame
        By ``experiment``: ``attention`` (settings of the variant) and ``techniques`` (tuple of str).

    Raises
    ------
    ValueError
        For an unknown name in ``only`` or ``skip``.
    """
    fp32, bf16, fused = tuple(plain), ("bf16",), EAGER | {"implementation": flash}
    rows = {
        "baseline": (EAGER, fp32),
        "bf16": (EAGER, bf16),
        "flash_attn": (fused, bf16),
        "window_512": ({"variant": "window", "window": seq_len}, bf16),
        "window_256": ({"variant": "window", "window": seq_len // 2}, bf16),
        "grad_checkpoint": (EAGER, (*fp32, "checkpointing")),
        "bf16_gradcp": (EAGER, (*bf16, "checkpointing")),
        "flash_gradcp": (fused, (*bf16, "checkpointing")),
        "chunked_loss": (EAGER, (*fp32, "chunked_loss")),
        "adamw_8bit": (EAGER, (*fp32, "adamw_8bit")),
        "selective_gradcp": (EAGER, (*fp32, "selective_checkpointing=0.5")),
        "offload_activations": (EAGER, (*fp32, "offload_activations")),
        "optimizer_in_backward": (EAGER, (*fp32, "optimizer_in_backward")),
        "best_of_all": (fused, fp32),  # until found: a plan trains no more for this row
    }
    unknown = {*only, *skip} - set(rows)
    if unknown:
        raise ValueError(f"only or skip: unknown experiments {sorted(unknown)}; known: {', '.join(rows)}")
    kept = {"baseline", *(set(only or rows) - set(skip))}
    grid = pd.DataFrame.from_dict(rows, orient="index", columns=["attention", "techniques"]).rename_axis("experiment")
    return grid[grid.index.isin(kept)].copy()


def within(texts: Sequence[str], precision: Sequence[str]) -> tuple[str, ...]:
    """The techniques ``texts`` without bf16, unless ``precision`` has bf16."""
    return tuple(text for text in texts if text != "bf16" or text in precision)


def leaders(grid: pd.DataFrame, seq_len: int) -> pd.Series:
    """By experiment of ``grid``, the first one that computes the same: exact techniques and kernels only add rounding.

    A window of ``seq_len`` or more tokens is no window.
    """
    first: dict[tuple, str] = {}

    def leader(row: pd.Series) -> str:
        inexact = frozenset(text for text in row["techniques"] if not techniques.parse([text])[0].exact)
        return first.setdefault((min(row["attention"].get("window", seq_len), seq_len), inexact), row.name)

    return grid.apply(leader, axis=1)


def learning_curves(rows: pd.DataFrame) -> pd.DataFrame:
    """The validation perplexity on the way, and its ``change`` from the baseline with the same seed [%].

    One row for each ``experiment``, ``seed`` and number of ``tokens`` trained on [millions].
    """
    points = [
        (row["experiment"], row["seed"], updates * row["batch_size"] * row["seq_len"] / 1e6, math.exp(loss))
        for row in rows[rows["status"] == "ok"].to_dict("records")
        for updates, loss in row["curves"]["validation_loss"]
    ]
    frame = pd.DataFrame(points, columns=["experiment", "seed", "tokens", "perplexity"]).set_index(["seed", "tokens"])
    baseline = frame.loc[frame["experiment"] == "baseline", "perplexity"]
    return frame.assign(change=100 * (frame["perplexity"] / baseline.reindex(frame.index) - 1)).reset_index()


def runs(grid: pd.DataFrame, **choices: object) -> list[LanguageModelRun]:
    """One run for each row of ``grid``; the index, the columns and ``choices`` are the fields of the run."""
    return [LanguageModelRun(**row, **choices) for row in grid.reset_index().to_dict("records")]


def combinations(texts: Sequence[str], *, flash: str, **choices: object) -> list[LanguageModelRun]:
    """Runs of ``best_of_all`` with flash attention, one for each set of the techniques ``texts`` that may be combined.

    Raises
    ------
    ValueError
        For an unknown technique.
    """
    for text in texts:
        techniques.parse([text])  # below, an unknown technique would count as excluded
    choices["attention"] = EAGER | {"implementation": flash}
    sets = (chosen for n in range(len(texts) + 1) for chosen in itertools.combinations(texts, n))
    allowed = [chosen for chosen in sets if not techniques.excluded(chosen)]
    return [LanguageModelRun(experiment="best_of_all", techniques=chosen, **choices) for chosen in allowed]


def for_cpu(run: LanguageModelRun) -> LanguageModelRun:
    """``run`` as a CPU can predict it: PyTorch's flash attention, which stores as much, in place of flash-attn's."""
    if run.attention.get("implementation") != "flash_attention_2":
        return run
    return run.model_copy(update={"attention": run.attention | {"implementation": "sdpa"}})


def largest_batches(predictions: pd.DataFrame, column: str, memory_mib: float) -> pd.Series:
    """The batch [sequences], not rounded, at which ``column`` [MiB] of each experiment reaches ``memory_mib``.

    ``predictions`` has rows of `PredictionRun` at two batches for each experiment; between them memory is linear.
    """
    batch = predictions["of"].map(lambda run: run.batch_size)
    taken = predictions.assign(batch=batch).pivot(index="experiment", columns="batch", values=column)
    small, large = taken.columns
    return small + (memory_mib - taken[small]) / ((taken[large] - taken[small]) / (large - small))
