"""What a few seeds tell: the interval of a mean, and the difference that they would have shown."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import optimize, stats

LEVEL, POWER = 0.05, 0.8


def interval(values: pd.DataFrame) -> pd.DataFrame:
    """Mean of each column of ``values``, a row for each seed, with Student's 95 % interval.

    Differences of two runs with the same seed give the paired interval, which leaves out what the seed does to both.

    Returns
    -------
    pd.DataFrame
        By column: ``mean``, ``low``, ``high``, and ``shown``: the true mean that as many seeds with the same spread
        tell from 0 in four of five tries. All but the mean are missing for one seed.
    """
    n = len(values)
    mean, error = values.mean(), values.std() / np.sqrt(n)
    half = stats.t.ppf(1 - LEVEL / 2, n - 1)
    frame = pd.DataFrame({"mean": mean, "low": mean - half * error, "high": mean + half * error})
    return frame.assign(shown=error * _shown(n) if n > 1 else np.nan)


def told(change: pd.DataFrame) -> pd.Series:
    """Whether each interval of ``change`` (`interval`) tells a change from none; false for one seed."""
    return change["low"] * change["high"] > 0


def shown(change: pd.DataFrame) -> str:
    """The true changes [%] that the seeds would have shown, from least to most, where they tell none; or a dash."""
    untold = change.loc[~told(change), "shown"].dropna()
    return f"{untold.min():.1f} to {untold.max():.1f} %" if len(untold) else "–"


def plus_minus(values: pd.DataFrame, form: str) -> pd.Series:
    """Each mean of ``values`` (`interval`) in the format ``form``, with half its interval; for one seed, without."""

    def text(row: pd.Series) -> str | None:
        half = row["high"] - row["mean"]
        spread = "" if np.isnan(half) else f" ± {half:{form.removeprefix('+')}}"
        return None if np.isnan(row["mean"]) else f"{row['mean']:{form}}{spread}"

    return values.apply(text, axis=1)


def _shown(n: int) -> float:
    """The true mean, in standard errors, that Student's test on ``n`` values tells from 0 with `POWER`."""
    least = stats.t.ppf(1 - LEVEL / 2, n - 1)
    return optimize.brentq(lambda mean: stats.nct.sf(least, n - 1, mean) - POWER, 0, 3 * least)
