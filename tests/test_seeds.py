"""The interval over seeds, and the difference that they would have shown."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from memstudy.studies.seeds import interval, plus_minus, shown, told


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


def test_what_is_told_is_not_among_what_would_have_been_shown():
    change = interval(pd.DataFrame({"up": [1.0, 1.1, 1.2], "none": [-1.0, 0.0, 1.0], "wide": [-30.0, 0.0, 30.0]}))
    assert told(change).to_dict() == {"up": True, "none": False, "wide": False}
    least, most = change.loc[["none", "wide"], "shown"]
    assert shown(change) == f"{least:.1f} to {most:.1f} %"
    assert shown(change.loc[["up"]]) == "–"


def test_a_mean_is_printed_with_half_its_interval_if_that_is_known():
    values = pd.DataFrame({"of three": [1.0, 1.2, 1.4]})
    half = stats.t.ppf(0.975, 2) * 0.2 / 3**0.5
    assert plus_minus(interval(values), "+.3f")["of three"] == f"+1.200 ± {half:.3f}"
    assert plus_minus(interval(values[:1]), ".1f")["of three"] == "1.0"
