"""The interval over seeds, and the difference that they would have shown."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from memstudy.studies.seeds import interval


def test_the_interval_is_students():
    values = pd.DataFrame({"near": [1.0, 1.2, 1.4], "far": [-3.0, 2.0, 7.0]})
    found = interval(values)
    for name in values:
        expected = stats.ttest_1samp(values[name], 0).confidence_interval()
        assert found.loc[name, ["low", "high"]].tolist() == pytest.approx([expected.low, expected.high])
    assert found["mean"].tolist() == pytest.approx([1.2, 2.0])


@pytest.mark.parametrize("n", [3, 5])
def test_what_was_to_be_shown_is_shown_in_four_of_five_tries(n):
    spread = pd.DataFrame({"change": np.linspace(-1, 1, n)})
    true = interval(spread)["shown"].item()
    tries = np.random.default_rng(0).normal(true, spread["change"].std(), (20_000, n))
    assert (stats.ttest_1samp(tries, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)


def test_one_seed_has_a_mean_and_no_interval():
    found = interval(pd.DataFrame({"change": [2.0]}))
    assert found["mean"].item() == 2.0
    assert found[["low", "high", "shown"]].isna().all(axis=None)
