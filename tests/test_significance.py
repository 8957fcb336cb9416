"""Whether two models differ: the test and the interval by hand, and their error rates."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics

from memstudy.studies.glue import significance
from memstudy.studies.glue.experiments import constant_answers, differences
from memstudy.studies.glue.significance import compare, mcnemar


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(significance, "RESAMPLES", 200)


def guesses(generator, labels, seeds, right):
    """Return predictions of 0 or 1, ``(seeds, examples)``, each right with probability ``right``."""
    wrong = generator.random((seeds, len(labels))) >= right
    return np.where(wrong, 1 - labels, labels)


@pytest.fixture
def labels():
    return np.random.default_rng(1).integers(2, size=300)


# --- the test


def test_one_seed_is_mcnemars_of_the_two_disagreements():
    generator = np.random.default_rng(2)
    labels = generator.integers(2, size=200)
    ours, theirs = guesses(generator, labels, 1, 0.8), guesses(generator, labels, 1, 0.7)
    b = int(((ours == labels) & (theirs != labels)).sum())
    c = int(((ours != labels) & (theirs == labels)).sum())
    assert b != c
    assert mcnemar(ours, theirs, labels) == pytest.approx(stats.chi2.sf((b - c) ** 2 / (b + c), 1))


def test_a_known_table_of_mcnemar():
    """150 approved only in the first survey, 86 only in the second (Agresti 1990, section 10.1): χ² = 17.36."""
    labels = np.zeros(1600, int)
    ours, theirs = labels.copy()[None], labels.copy()[None]
    theirs[0, :150], ours[0, 150:236] = 1, 1
    assert mcnemar(ours, theirs, labels) == pytest.approx(stats.chi2.sf(17.36, 1), rel=0.01)


def test_several_seeds_are_durkalskis_sums_by_loops():
    labels = [0, 1, 1, 0, 1, 0]
    ours = [[0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1], [0, 0, 1, 0, 1, 0]]
    theirs = [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1]]
    numerator = denominator = 0
    for example, label in enumerate(labels):
        more = 0
        for seed in range(3):
            more += (ours[seed][example] == label) - (theirs[seed][example] == label)
        numerator += more
        denominator += more**2
    assert (numerator, denominator) == (3, 11)  # per example: 2, -1, 1, 0, 2, -1
    expected = stats.chi2.sf(9 / 11, 1)
    assert mcnemar(np.array(ours), np.array(theirs), np.array(labels)) == pytest.approx(expected)


def test_seeds_that_repeat_one_another_are_no_more_evidence():
    generator = np.random.default_rng(3)
    labels = generator.integers(2, size=100)
    ours, theirs = guesses(generator, labels, 1, 0.8), guesses(generator, labels, 1, 0.7)
    once, thrice = (mcnemar(ours.repeat(n, 0), theirs.repeat(n, 0), labels) for n in (1, 3))
    assert once == pytest.approx(thrice)
    assert 0 < once < 1


# --- the comparison


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
def test_equal_predictions_do_not_differ(metric, labels):
    ours = guesses(np.random.default_rng(4), labels, 3, 0.8)
    found = compare(ours, ours.copy(), labels, metric)
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert not found.significant


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "pearson"])
def test_a_large_difference_is_significant_and_changes_its_sign_with_the_models(metric, labels):
    generator = np.random.default_rng(5)
    ours, theirs = guesses(generator, labels, 3, 0.9), guesses(generator, labels, 3, 0.7)
    better, worse = compare(ours, theirs, labels, metric), compare(theirs, ours, labels, metric)
    assert better.significant
    assert worse.significant
    assert 0 < better.low < better.difference < better.high
    mirrored = (-worse.difference, -worse.high, -worse.low)
    assert (better.difference, better.low, better.high) == pytest.approx(mirrored)
    assert better.p_value == worse.p_value
    assert (better.p_value is None) == (metric == "pearson")


def test_the_difference_is_that_of_the_metric_averaged_over_the_seeds(labels):
    generator = np.random.default_rng(6)
    ours, theirs = guesses(generator, labels, 2, 0.8), guesses(generator, labels, 2, 0.7)
    for metric, reference in (("accuracy", metrics.accuracy_score), ("matthews", metrics.matthews_corrcoef)):
        expected = np.mean([reference(labels, row) for row in ours]) - np.mean(
            [reference(labels, row) for row in theirs]
        )
        assert compare(ours, theirs, labels, metric).difference == pytest.approx(expected)


def test_the_difference_of_amounts_is_that_of_pearsons_coefficients():
    generator = np.random.default_rng(7)
    labels = generator.normal(size=100)
    ours, theirs = (labels + noise * generator.normal(size=(2, 100)) for noise in (0.3, 2.0))
    expected = np.mean([stats.pearsonr(row, labels).statistic for row in ours]) - np.mean(
        [stats.pearsonr(row, labels).statistic for row in theirs]
    )
    found = compare(ours, theirs, labels, "pearson")
    assert found.difference == pytest.approx(expected)
    assert found.p_value is None
    assert found.significant


def test_the_same_comparison_gives_the_same_interval(labels):
    generator = np.random.default_rng(8)
    ours, theirs = guesses(generator, labels, 2, 0.8), guesses(generator, labels, 2, 0.78)
    assert compare(ours, theirs, labels, "accuracy") == compare(ours, theirs, labels, "accuracy")


def test_the_ends_are_the_percentiles_of_differences_of_redrawn_examples_and_seeds(monkeypatch):
    """Computed by loops that draw the generator's numbers in the same order."""
    monkeypatch.setattr(significance, "RESAMPLES", 30)
    generator = np.random.default_rng(9)
    labels = generator.integers(2, size=12)
    ours, theirs = guesses(generator, labels, 3, 0.8), guesses(generator, labels, 3, 0.6)
    draws, differences = np.random.default_rng(0), []
    for _ in range(30):
        examples, seeds = draws.integers(12, size=12), draws.integers(3, size=3)
        count = 0
        for seed in seeds:
            for example in examples:
                count += int(ours[seed, example] == labels[example]) - int(theirs[seed, example] == labels[example])
        differences.append(count / 36)
    found = compare(ours, theirs, labels, "accuracy")
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))


def test_an_interval_that_leaves_out_0_is_not_enough_where_the_test_disagrees():
    agrees = significance.Difference(0.1, 0.01, 0.2, 0.04)
    assert agrees.significant
    assert not significance.Difference(0.1, 0.01, 0.2, 0.06).significant
    assert not significance.Difference(0.1, -0.01, 0.2, 0.04).significant
    assert significance.Difference(-0.1, -0.2, -0.01, None).significant


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(("seeds", "metric"), [(1, "accuracy"), (3, "accuracy"), (3, "matthews")])
def test_models_equally_good_are_rarely_said_to_differ(seeds, metric):
    """In 60 data sets, 3 differences are expected at 5 %; more than 8 occur in one of 200 such series."""
    generator = np.random.default_rng(10)
    covered, found = 0, 0
    for _ in range(60):
        labels = generator.integers(2, size=150)
        ours, theirs = (guesses(generator, labels, seeds, 0.75) for _ in range(2))
        difference = compare(ours, theirs, labels, metric)
        covered += difference.low <= 0 <= difference.high
        found += difference.significant
    assert covered >= 52
    assert found <= 8


@pytest.mark.usefixtures("few_resamples")
def test_the_interval_covers_the_true_difference_and_a_large_one_is_found():
    generator = np.random.default_rng(11)
    covered, found = 0, 0
    for _ in range(60):
        labels = generator.integers(2, size=300)
        ours, theirs = guesses(generator, labels, 3, 0.80), guesses(generator, labels, 3, 0.68)
        difference = compare(ours, theirs, labels, "accuracy")
        covered += difference.low <= 0.12 <= difference.high
        found += difference.significant
    assert covered >= 52
    assert found >= 52


@pytest.mark.parametrize(("seeds", "widest"), [(1, 1.0), (20, 3**0.5)])
def test_the_interval_is_as_wide_as_the_normal_one_or_wider_by_what_seeds_add(seeds, widest):
    """With independent errors, redrawing seeds counts the noise of examples two more times: at most √3 too wide.

    Drawing examples, drawing seeds and drawing both each add the variance once (Owen 2007, doi:10.1214/07-AOAS122).
    """
    generator = np.random.default_rng(12)
    labels = generator.integers(2, size=1000)
    ours, theirs = guesses(generator, labels, seeds, 0.8), guesses(generator, labels, seeds, 0.7)
    normal = 2 * 1.96 * np.sqrt((0.8 * 0.2 + 0.7 * 0.3) / 1000 / seeds)
    found = compare(ours, theirs, labels, "accuracy")
    assert 0.9 * normal < found.high - found.low < 1.1 * widest * normal


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("constant", ["predictions", "labels", "both"])
@pytest.mark.parametrize("value", [1, 0.1])  # in floats, the mean of three 0.1 is not 0.1
def test_the_correlation_with_what_never_changes_is_0(value, constant):
    varying = np.arange(3.0)
    ours = varying if constant == "labels" else np.full(3, value)
    labels = varying if constant == "predictions" else np.full(3, value)
    assert significance._correlation(ours[None], labels) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("ours", "theirs", "labels"),
    [((2, 5), (3, 5), (5,)), ((2, 5), (2, 5), (4,)), ((2, 5), (2, 4), (5,)), ((5,), (5,), (5,))],
    ids=["seeds", "labels", "examples", "no-seeds"],
)
def test_shapes_that_do_not_match_are_refused(ours, theirs, labels):
    with pytest.raises(ValueError, match=r"\(seeds, examples\) of the same seeds and examples are needed") as refused:
        compare(np.zeros(ours), np.zeros(theirs), np.zeros(labels), "accuracy")
    assert str(ours) in str(refused.value)


@pytest.mark.parametrize("metric", ["f1", "spearman", ""])
def test_a_metric_that_cannot_be_compared_is_refused(metric):
    with pytest.raises(ValueError, match=f"metric '{metric}' can't be compared; known: accuracy, matthews, pearson"):
        compare(np.zeros((1, 5)), np.zeros((1, 5)), np.zeros(5), metric)


# --- the constant answer


def test_a_model_that_learned_beats_the_most_frequent_label_and_one_that_answers_it_does_not(few_resamples):
    generator = np.random.default_rng(5)
    labels = (generator.random(300) < 0.3).astype(int)
    answers = {"unchanged": guesses(generator, labels, 2, 0.9), "lazy": np.zeros((2, 300), int)}
    rows = pd.DataFrame(
        {"dataset": "glue/wnli", "experiment": name, "seed": seed, "curves": {"labels": labels, "predictions": answer}}
        for name, of_seeds in answers.items()
        for seed, answer in enumerate(of_seeds)
    )
    constant = constant_answers(rows.query("experiment == 'unchanged'"))
    found = differences(pd.concat([rows, constant]), baseline="constant").loc["wnli"]
    assert found["significant"].to_dict() == {"unchanged": True, "lazy": False}
    right = (answers["unchanged"] == labels).mean()
    assert right - found.at["unchanged", "difference"] == pytest.approx((labels == 0).mean())
