"""The search for the largest batch: with made-up peaks for every threshold, then with real runs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_run import tiny_run

from memstudy import records
from memstudy.profiler import largest_batch
from memstudy.project import notebook_parameters
from memstudy.study import Study


def search(largest: int, *, start: int, limit: int):
    """Search where each sequence needs 10 MiB and `largest` sequences fit; return result and trials in order."""
    trials = []

    def trial(batch: int) -> float | None:
        trials.append(batch)
        return 10.0 * batch if batch <= largest else None

    found = largest_batch(trial, budget_mib=10.0 * largest + 5, start=start, limit=limit)
    return found, trials


@pytest.mark.parametrize("limit", [1, 2, 3, 64, 4096])
@pytest.mark.parametrize("start", [1, 2, 7, 33, 64])
def test_exactly_the_largest_fitting_batch_is_found(start, limit):
    start = min(start, limit)
    for largest in range(71):
        found, trials = search(largest, start=start, limit=limit)
        assert found.batch_size == min(largest, limit)
        assert found.refused_at == (largest + 1 if largest < limit else None)
        assert found.tested == tuple(trials)
        assert len(set(trials)) == len(trials), f"largest {largest}: a batch was run twice"
        assert all(1 <= batch <= limit for batch in trials)


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_number_of_trials_is_logarithmic_in_the_distance_from_the_start(largest, start, limit):
    start = min(start, limit)
    found, trials = search(largest, start=start, limit=limit)
    assert found.batch_size == min(largest, limit)
    assert len(trials) <= 2 * math.log2(abs(found.batch_size - start) + 1) + 3


@given(st.lists(st.none() | st.floats(0.1, 100), min_size=1, max_size=64), st.data())
def test_only_a_batch_that_ran_and_fitted_is_reported_also_where_fitting_is_erratic(peaks, data):
    start = data.draw(st.integers(1, len(peaks)))
    found = largest_batch(lambda batch: peaks[batch - 1], budget_mib=100, start=start, limit=len(peaks))
    if found.batch_size == 0:
        assert (found.peak_mib, found.headroom_percent) == (None, None)
        assert peaks[0] is None
        assert 1 in found.tested
    else:
        assert found.batch_size in found.tested
        assert found.peak_mib == peaks[found.batch_size - 1]
        assert found.headroom_percent == pytest.approx(100 - found.peak_mib)
    if found.refused_at is not None:
        assert found.refused_at == found.batch_size + 1
        assert found.refused_at in found.tested
        assert peaks[found.refused_at - 1] is None


@pytest.mark.parametrize("budget_mib", [0, -1.0])
def test_a_budget_of_nothing_is_refused(budget_mib):
    with pytest.raises(ValueError, match=f"budget_mib={budget_mib}: a budget above 0 MiB is needed"):
        largest_batch(lambda batch: None, budget_mib=budget_mib)


@pytest.mark.parametrize(("start", "limit"), [(0, 8), (-1, 8), (9, 8)])
def test_a_start_outside_the_range_is_refused(start, limit):
    with pytest.raises(ValueError, match=f"start={start}: a batch size from 1 to {limit} is needed"):
        largest_batch(lambda batch: None, budget_mib=1, start=start, limit=limit)


@pytest.fixture
def study(tmp_path):
    places = {"results_dir": str(tmp_path / "results"), "out_dir": str(tmp_path), "run_missing": True}
    return Study("lab4_grid", notebook_parameters("lab4_grid") | places)


def test_a_real_search_reports_what_its_runs_measured_and_repeats_none(study, tmp_path):
    run = tiny_run(seq_len=64)
    budget = 3  # MiB; a batch of 4 takes 2.3 MiB
    found = largest_batch(study.trials(run, budget_mib=budget), budget_mib=budget, start=4, limit=64)
    tried = {r["config"]["batch_size"]: r for r in records.read_records(tmp_path / "results" / "lab4_grid")}
    assert set(found.tested) == tried.keys()
    fitting, refused = tried[found.batch_size], tried[found.refused_at]
    assert fitting["status"] == "ok"
    assert fitting["metrics"]["peak_allocated_mib"] == found.peak_mib <= budget
    assert found.headroom_percent == pytest.approx(100 * (1 - found.peak_mib / budget))
    assert refused["status"] == "oom"
    assert "passes the budget of 3 MiB" in refused["reason"]
    assert found.refused_at == found.batch_size + 1

    again = largest_batch(study.trials(run, budget_mib=float(budget)), budget_mib=budget, start=4, limit=64)
    assert again == found
    assert {r["config"]["batch_size"]: r for r in records.read_records(tmp_path / "results" / "lab4_grid")} == tried


@pytest.mark.filterwarnings("ignore:run ")  # the sweep's warning about the failed run
def test_a_trial_that_did_not_run_is_an_error_and_not_a_batch_that_does_not_fit(study):
    run = tiny_run(train_steps=1, dataset="miniature", data_hash="of an older version")
    with pytest.raises(RuntimeError, match="batch 4: failed: exit status 2; error: data set"):
        study.trials(run, budget_mib=1)(4)
