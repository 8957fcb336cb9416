"""Tests whether two models differ, from their predictions for the same examples and seeds.

The interval is a percentile bootstrap (Efron and Tibshirani 1993, chapter 13). Examples and seeds are both drawn with
replacement, identically for the two models; with few seeds the interval is rather too wide. The test is McNemar's for
clusters (Durkalski et al. 2003, doi:10.1002/sim.1438), here the seeds of each example. With d_i the number of seeds
that are right on example i under one model, minus the number under the other::

    χ² = (Σ d_i)² / Σ d_i²        with one degree of freedom,

For one seed this is McNemar's test without continuity correction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """Difference between the scores of two models.

    ``difference`` is between means over seeds; ``low`` and ``high`` bound its 95 % interval; ``p_value`` is McNemar's
    (None if predictions are not classes); ``significant``: the interval excludes 0 and the test, if any, agrees.
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
        Predictions for the same seeds and examples.
    labels : (examples,)
    metric : {"accuracy", "matthews", "pearson"}
        Score to compare. For two classes Matthews' coefficient equals Pearson's of the 0s and 1s.

    Raises
    ------
    ValueError
        For shapes that do not match, or an unknown metric.
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
    """Pearson's coefficient, the mean over seeds; 0 for constant predictions or labels."""
    left = predictions - predictions.mean(1, keepdims=True)
    right = labels - labels.mean()
    size = np.sqrt((left**2).sum(1) * (right**2).sum())
    varies = (np.ptp(predictions, 1) > 0) & (np.ptp(labels) > 0)  # the mean of equal numbers is not always their value
    return float(np.divide(left @ right, size, out=np.zeros(len(left)), where=varies).mean())
