"""Sentences with labels: the tasks of GLUE (Wang et al. 2018, arXiv:1804.07461) or a user's CSV, and their scores.

A user's CSV has a column ``label``, whole numbers from 0 (or decimals, for a regression), and a column ``sentence``,
or ``sentence1`` and ``sentence2``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from scipy import stats
from sklearn import metrics
from transformers import PreTrainedTokenizerBase

from memstudy.data import LoadedData

METRICS: dict[str, Callable[[Sequence, Sequence], float]] = {  # of (labels, predictions)
    "accuracy": metrics.accuracy_score,
    "f1": metrics.f1_score,
    "matthews": metrics.matthews_corrcoef,
    "pearson": lambda labels, predictions: stats.pearsonr(labels, predictions).statistic,
    "spearman": lambda labels, predictions: stats.spearmanr(labels, predictions).statistic,
}


@dataclass(frozen=True)
class Task:
    """What a task reads and how it is scored.

    ``columns`` hold the sentences; ``n_labels`` is 1 for a regression; ``metrics`` are names in ``METRICS``, of which
    the first compares models; ``validation`` names the held-out split; ``whole`` says whether the data folder has all
    rows of GLUE's sets: scores on fewer rows are not comparable with published ones.
    """

    columns: tuple[str, ...]
    n_labels: int
    metrics: tuple[str, ...]
    validation: str = "validation"
    whole: bool = True


TASKS = {
    "cola": Task(("sentence",), 2, ("matthews", "accuracy")),
    "sst2": Task(("sentence",), 2, ("accuracy",)),
    "mrpc": Task(("sentence1", "sentence2"), 2, ("accuracy", "f1")),
    "stsb": Task(("sentence1", "sentence2"), 1, ("pearson", "spearman")),
    "rte": Task(("sentence1", "sentence2"), 2, ("accuracy",)),
    "wnli": Task(("sentence1", "sentence2"), 2, ("accuracy",)),
    "qqp": Task(("question1", "question2"), 2, ("accuracy", "f1"), whole=False),
    "qnli": Task(("question", "sentence"), 2, ("accuracy",), whole=False),
    "mnli": Task(("premise", "hypothesis"), 3, ("accuracy",), "validation_matched", whole=False),
}


def task_of(loaded: LoadedData) -> Task:
    """The task of a data set, after a check of its splits, columns and labels.

    Raises
    ------
    ValueError
        For a data set that is no task, a missing or empty split, a missing column, or a label out of range.
    """
    known = TASKS.get(loaded.name.removeprefix("glue/"))
    if known is None and not loaded.name.endswith(".csv"):
        raise ValueError(
            f"{loaded.name} has no sentences with labels; take one of {', '.join(f'glue/{name}' for name in TASKS)}, "
            "or a .csv of your own"
        )
    task = known or _own_task(loaded)
    for split in ("train", task.validation):
        if not loaded.splits.get(split):
            raise ValueError(f"{loaded.name}: the split {split} is empty or missing")
        _check_labels(loaded, split, task)
    return task


def _own_task(loaded: LoadedData) -> Task:
    columns = set(loaded.splits["train"].column_names)
    pairs = ("sentence1", "sentence2")
    sentences = ("sentence",) if "sentence" in columns else pairs
    if missing := {"label", *sentences} - columns:
        raise ValueError(
            f"{loaded.name}: no column {', '.join(sorted(missing))}; a column label is needed and a column sentence, "
            f"or sentence1 and sentence2; it has {', '.join(map(repr, sorted(columns)))}"
        )
    labels = [label for split in loaded.splits.values() for label in split["label"]]
    for label in labels:
        if not isinstance(label, int | float) or isinstance(label, bool) or not math.isfinite(label):
            raise ValueError(f"{loaded.name}: label {label!r}; number the classes from 0")
    if any(label != int(label) for label in labels):
        return Task(sentences, 1, ("pearson", "spearman"))
    found = sorted(set(labels))
    if found != list(range(len(found))) or len(found) < 2:
        raise ValueError(
            f"{loaded.name}: the labels are {found[:10]}; number two classes or more from 0, without a gap"
        )
    return Task(sentences, len(found), ("accuracy",))


def _check_labels(loaded: LoadedData, split: str, task: Task) -> None:
    rows = loaded.splits[split]
    if missing := {"label", *task.columns} - set(rows.column_names):
        raise ValueError(f"{loaded.name}: the split {split} has no column {', '.join(sorted(missing))}")
    if task.n_labels == 1:
        return
    for number, label in enumerate(rows["label"]):
        if label not in range(task.n_labels):
            raise ValueError(
                f"{loaded.name}: row {number} of {split} has label {label!r}; 0 to {task.n_labels - 1} are possible"
            )


def encode(
    rows: datasets.Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_len: int
) -> tuple[datasets.Dataset, int]:
    """Tokenize sentences in memory, truncated to ``max_len`` tokens.

    Returns
    -------
    Dataset
        The tokenizer's columns (``input_ids``, ...) and ``labels``; rows of unequal lengths.
    int
        Number of truncated rows.
    """
    if not len(rows):
        return rows, 0
    sentences = [[str(text) for text in rows[column]] for column in task.columns]
    whole = tokenizer(*sentences, verbose=False)["input_ids"]
    tokens = tokenizer(*sentences, truncation=True, max_length=max_len)
    kind = float if task.n_labels == 1 else int
    columns = {**tokens, "labels": [kind(label) for label in rows["label"]]}
    return datasets.Dataset.from_dict(columns), sum(len(ids) > max_len for ids in whole)


def score(task: Task, predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Each of the task's metrics, as scikit-learn and SciPy compute them.

    The correlation with constant predictions or labels, which is undefined, is given as 0.
    """
    if task.n_labels == 1 and 1 in (len(np.unique(predictions)), len(np.unique(labels))):
        return dict.fromkeys(task.metrics, 0.0)
    return {name: float(METRICS[name](labels, predictions)) for name in task.metrics}
