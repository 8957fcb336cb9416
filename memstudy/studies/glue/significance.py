"""Whether two models differ, from their predictions for the same examples: paired over examples and seeds.

The interval is the percentile bootstrap's (Efron and Tibshirani 1993, chapter 13): examples are drawn with replacement,
and so are seeds, the same for both models; with few seeds that errs to the wide side. The test is McNemar's for
examples seen once a seed (Durkalski et al. 2003, doi:10.1002/sim.1438): with d_i how many more seeds are right on
example i under one model than under the other::

    χ² = (Σ d_i)² / Σ d_i²        with one degree of freedom,

which for one seed is McNemar's without continuity correction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """What one model scores above another.

    ``difference`` of the means over seeds, ``low`` and ``high`` ends of its 95 % interval, ``p_value`` of McNemar's
    test (None where predictions are no classes), ``significant``: the interval leaves out 0 and the test agrees.
    """

    difference: float
    low: float
    high: float
    p_value: float | None

    @property
    def significant(self) -> bool:
        tested = self.p_value is None or self.p_value < LEVEL
        return tested and not self.low <= 0 <= self.high


def compare(ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray, metric: str) -> Difference:
    """Compare the predictions of two models.

    Parameters
    ----------
    ours, theirs : (seeds, examples)
        Of the same seeds and examples.
    labels : (examples,)
    metric : {"accuracy", "matthews", "pearson"}
        What is compared. Of two classes Matthews' coefficient is Pearson's of the 0s and 1s.

    Raises
    ------
    ValueError
        For shapes that do not match, or another metric.
    """
    ours, theirs, labels = (np.asarray(array) for array in (ours, theirs, labels))
    if ours.shape != theirs.shape or ours.shape[1:] != labels.shape:
        raise ValueError(
            f"predictions {ours.shape} and {theirs.shape} for labels {labels.shape}: (seeds, examples) of the same "
            "seeds and examples are needed"
        )
    if metric not in ("accuracy", "matthews", "pearson"):
        raise ValueError(f"metric {metric!r} can't be compared; known: accuracy, matthews, pearson")
    score = _accuracy if metric == "accuracy" else _correlation
    generator = np.random.default_rng(0)
    seeds, examples = ours.shape
    drawn = []
    for _ in range(RESAMPLES):
        some = generator.integers(examples, size=examples)
        of = generator.integers(seeds, size=seeds)
        drawn.append(score(ours[of][:, some], labels[some]) - score(theirs[of][:, some], labels[some]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    p_value = None if metric == "pearson" else mcnemar(ours, theirs, labels)
    return Difference(score(ours, labels) - score(theirs, labels), float(low), float(high), p_value)


def mcnemar(ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray) -> float:
    """The p-value of McNemar's test for ``(seeds, examples)`` predictions of classes; 1 when they never differ."""
    more = (ours == labels).sum(0) - (theirs == labels).sum(0)
    squares = int((more**2).sum())
    return float(stats.chi2.sf(more.sum() ** 2 / squares, 1)) if squares else 1.0


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float((predictions == labels).mean())


def _correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean over seeds; 0 where predictions or labels are all the same."""
    left = predictions - predictions.mean(1, keepdims=True)
    right = labels - labels.mean()
    size = np.sqrt((left**2).sum(1) * (right**2).sum())
    varies = (np.ptp(predictions, 1) > 0) & (np.ptp(labels) > 0)  # the mean of equal numbers is not always their value
    return float(np.divide(left @ right, size, out=np.zeros(len(left)), where=varies).mean())
