"""Data sets of pairs: the source to read, the target to write, and the scores of written texts.

Translations are lower-cased and cleaned as in the source study. Scores are those of sacrebleu (Post 2018,
arXiv:1804.08771), whose signature records its settings, and of rouge-score; an answer to a question is right or wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sacrebleu
from rouge_score import rouge_scorer

from memstudy.data import LoadedData

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class PairTask:
    """How a data set of pairs is read and scored.

    ``read`` returns source and target of a row; ``score`` returns metrics of the written and the wanted texts;
    ``signatures`` returns the metrics' settings; ``tests`` are the splits to evaluate; with ``characters`` tokens are
    characters, and source and target have separate vocabularies.
    """

    read: Callable[[dict], tuple[str, str]]
    score: Callable[[Sequence[str], Sequence[str]], dict[str, float]]
    tests: tuple[str, ...] = ("test",)
    characters: bool = False
    signatures: Callable[[], dict[str, str]] = dict


def bleu(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF of a whole test set, 0 to 100."""
    return {
        "bleu": sacrebleu.corpus_bleu(list(written), [list(wanted)]).score,
        "chrf": sacrebleu.corpus_chrf(list(written), [list(wanted)]).score,
    }


def signatures() -> dict[str, str]:
    """sacrebleu's signatures: version, tokenisation, case."""
    metrics = {"bleu": sacrebleu.BLEU(), "chrf": sacrebleu.CHRF()}
    for metric in metrics.values():
        metric.corpus_score(["a"], [["a"]])  # the signature contains the number of references
    return {name: str(metric.get_signature()) for name, metric in metrics.items()}


def rouge(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F1, stemmed), the mean over rows, 0 to 100."""
    scorer = rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=True)
    rows = [scorer.score(target, text) for text, target in zip(written, wanted, strict=True)]
    return {name: 100 * sum(row[name].fmeasure for row in rows) / len(rows) for name in ROUGE}


def exact_match(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """The share of answers that are right to the letter, 0 to 1."""
    right = sum(text == target for text, target in zip(written, wanted, strict=True))
    return {"exact_match": right / len(written)}


def clean(text: str) -> str:
    """Lower-case ``text``, drop all but letters, digits and punctuation of sentences, join runs of spaces."""
    return " ".join(re.sub(r"[^\w\s.,!?'-]", " ", text.lower()).split())


def _translation(row: dict) -> tuple[str, str]:
    return clean(row["translation"]["en"]), clean(row["translation"]["de"])


def _instruction(row: dict) -> tuple[str, str]:
    return row["question"], row["response"]


TASKS = {
    **{name: PairTask(_translation, bleu, signatures=signatures) for name in ("wmt16-de-en", "multi30k-de-en")},
    "xsum": PairTask(lambda row: (row["document"], row["summary"]), rouge),
    **{name: PairTask(_instruction, rouge, ("validation",)) for name in ("openorca", "flan-cot", "alpaca")},
    "mathematics-numbers-place-value": PairTask(
        lambda row: (row["question"], row["answer"]), exact_match, ("test", "extrapolate"), characters=True
    ),
}


def task_of(loaded: LoadedData) -> PairTask:
    """The task of a data set.

    Raises
    ------
    ValueError
        When the data set holds no pairs, or a split is missing or empty.
    """
    name = "mathematics-numbers-place-value" if loaded.name.startswith("place-value-") else loaded.name
    if name not in TASKS:
        raise ValueError(f"{loaded.name} holds no pairs of source and target; take one of {', '.join(TASKS)}")
    for split in ("train", *TASKS[name].tests):
        if not loaded.splits.get(split):
            raise ValueError(f"{loaded.name}: the split {split} is empty or missing")
    return TASKS[name]
